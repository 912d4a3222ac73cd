"""Deadlines that can't be met, the interest that they leave, and what refused callers are told."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.admission.support import Desk, Recorder, instance, model
from tidegate_admission import estimate
from tidegate_admission.fairness import TenantRule, Tenants
from tidegate_admission.gate import Gate
from tidegate_admission.limits import Limits
from tidegate_admission.link import to_wire
from tidegate_admission.supply import InstanceState, ModelSupply
from tidegate_admission.tally import Tally
from tidegate_admission.ticket import Outcome, Reason, Refusal, Ticket

STARTING = instance(state=InstanceState.STARTING)


class Words(Recorder):
    """An outbox that keeps refusals whole."""

    def refuse(self, refusal: Refusal) -> None:
        self._add("refuse", refusal.ticket.id[1], refusal.reason, refusal.retry_after, refusal.message)


def stopped(ready_in: float | None) -> ModelSupply:
    """A model that doesn't run, with its learned load time."""
    return ModelSupply("m", ready_in=ready_in)


def loading(ready_in: float | None) -> ModelSupply:
    """A model that starts, with what remains of that."""
    return ModelSupply("m", (STARTING,), ready_in=ready_in, start_deadline=600.0, under_way=True)


def interest(desk: Desk) -> float:
    """What lifecycle would be told now, by the wire's words."""
    told = to_wire(desk.dispatcher.demand(True, desk.now), 1)
    return sum(entry.interest_ms for entry in told.models) / 1000


def test_a_deadline_before_the_model_can_be_ready_is_refused_at_once_with_the_estimate() -> None:
    """The refusal says when the model will be ready and when to come back; lifecycle hears at once."""
    desk = Desk()
    desk.supply(stopped(12.0))
    session, _ = desk.open()
    session.outbox = outbox = Words()
    desk.urgent.clear()
    desk.acquire(session, 1, deadline=desk.now + 0.5)
    ((_, n, reason, retry, words),) = outbox.take()
    assert (n, reason) == (1, Reason.DEADLINE_UNREACHABLE)
    assert isinstance(retry, float)
    assert 12.0 <= retry <= 12.0 * 1.2
    assert "ready in 12.0 s" in str(words)
    assert "deadline of 0.5 s" in str(words)
    assert desk.urgent == [True]
    assert interest(desk) == 180.0
    assert desk.dispatcher.demand(True, desk.now).models[0].waiting == 0
    desk.check()


@pytest.mark.parametrize(("ready_in", "seconds"), [(5.0, 180.0), (120.0, 180.0), (300.0, 360.0)])
def test_an_interest_lasts_until_a_minute_after_the_model_is_ready(ready_in: float, seconds: float) -> None:
    """`ready_in` + 60 s, at least 180 s; later refusals make it longer, and the gate lives as long."""
    desk = Desk()
    desk.supply(stopped(ready_in))
    session, _ = desk.open()
    desk.acquire(session, 1, deadline=desk.now + 1.0)
    assert interest(desk) == seconds
    desk.now += 100.0
    desk.acquire(session, 2, deadline=desk.now + 1.0)
    assert interest(desk) == seconds
    desk.wait(seconds - 1.0)
    assert interest(desk) == pytest.approx(1.0)
    assert "m" in desk.dispatcher.gates
    desk.wait(1.0)
    assert interest(desk) == 0.0
    assert desk.dispatcher.gates == {}, "a gate that nobody is interested in is dropped"
    desk.check()


def test_only_a_callers_own_deadline_is_compared() -> None:
    """Without one a ticket waits, however long the load; and so does one whose deadline can be met."""
    desk = Desk(queue_timeout=5.0)
    desk.supply(stopped(60.0))
    session, outbox = desk.open()
    desk.acquire(session, 1)
    desk.acquire(session, 2, deadline=desk.now + 60.0)
    assert outbox.take("refuse") == []
    assert interest(desk) == 0.0
    desk.check()


def test_nobody_is_refused_while_nothing_is_known() -> None:
    """No learned load time, or a model that supply hasn't named yet: the ticket's own deadline ends it."""
    desk = Desk()
    session, outbox = desk.open()
    desk.acquire(session, 1, deadline=desk.now + 0.2)
    desk.supply(stopped(None))
    desk.acquire(session, 2, deadline=desk.now + 0.2)
    assert outbox.take("refuse") == []
    desk.wait(0.2)
    assert outbox.take("refuse") == [("refuse", n, Reason.DEADLINE_EXCEEDED) for n in (1, 2)]
    assert interest(desk) == 0.0


def test_what_remains_of_a_load_counts_down_and_is_never_at_once() -> None:
    """A start under way is compared with what is left of it; one that takes too long is unknown."""
    desk = Desk()
    desk.supply(loading(10.0))
    session, outbox = desk.open()
    desk.acquire(session, 1, deadline=desk.now + 5.0)
    assert outbox.take("refuse") == [("refuse", 1, Reason.DEADLINE_UNREACHABLE)]
    desk.now += 6.0
    desk.beat(session, 1, ())
    desk.acquire(session, 2, deadline=desk.now + 5.0)
    desk.acquire(session, 3, deadline=desk.now + 3.0)
    assert outbox.take("refuse") == [("refuse", 3, Reason.DEADLINE_UNREACHABLE)]
    desk.now += 4.5
    outlook = desk.dispatcher.gates["m"].outlook
    assert outlook.ready_in(desk.now) is None, "it should be up, and nobody knows when it will be"
    desk.acquire(session, 4, deadline=desk.now + 0.1)
    assert outbox.take("refuse") == []
    desk.check()


def test_a_learned_load_time_does_not_run_down_while_the_model_is_stopped() -> None:
    """What is from whenever somebody asks stays as long, however old the report is."""
    desk = Desk()
    desk.supply(stopped(10.0))
    session, outbox = desk.open()
    desk.now += 9.0
    desk.acquire(session, 1, deadline=desk.now + 5.0)
    assert outbox.take("refuse") == [("refuse", 1, Reason.DEADLINE_UNREACHABLE)]


def test_a_waiting_ticket_is_not_refused_because_the_outlook_gets_worse() -> None:
    """Its own deadline ends it, and not before."""
    desk = Desk()
    desk.supply(stopped(1.0))
    session, outbox = desk.open()
    desk.acquire(session, 1, deadline=desk.now + 3.0)
    desk.supply(loading(50.0), n=2)
    desk.wait(2.9)
    assert outbox.take("refuse") == []
    desk.wait(0.1)
    assert outbox.take("refuse") == [("refuse", 1, Reason.DEADLINE_EXCEEDED)]


def test_a_model_that_is_up_refuses_nobody_for_its_queue() -> None:
    """Only `ready_in` is compared: a long queue ends by the tickets' own deadlines."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    session, outbox = desk.open()
    desk.acquire(session, 1, 2, 3)
    desk.acquire(session, 4, deadline=desk.now + 0.01)
    assert outbox.take("refuse") == []


def test_an_unreachable_ticket_displaces_nobody_and_a_newer_catalogue_is_waited_for() -> None:
    """It is refused before the queue is looked at; a ticket that supply isn't as new as is held."""
    desk = Desk(max_queue=1)
    desk.supply(stopped(10.0))
    session, outbox = desk.open()
    desk.acquire(session, 1, tenant="flood")
    desk.acquire(session, 2, tenant="other", deadline=desk.now + 1.0)
    assert outbox.take("refuse") == [("refuse", 2, Reason.DEADLINE_UNREACHABLE)]
    desk.done(session, 1)
    desk.acquire(session, 3, deadline=desk.now + 1.0, catalog=(1, 2))
    assert outbox.take("refuse") == []
    desk.check()


def test_a_retry_finds_the_model_loading_and_waits() -> None:
    """Once the model loads in time for it, the same caller is taken in; ready, it is granted."""
    desk = Desk()
    desk.supply(stopped(2.0))
    session, outbox = desk.open()
    desk.acquire(session, 1, deadline=desk.now + 0.5)
    desk.supply(loading(2.0), n=2)
    desk.now += 1.6
    desk.acquire(session, 2, deadline=desk.now + 0.5)
    desk.supply(model(instance(slots=1)), n=3)
    assert outbox.take("refuse", "grant") == [
        ("refuse", 1, Reason.DEADLINE_UNREACHABLE),
        ("grant", 2, "i1", 0),
    ]
    desk.check()


def test_reports_of_interest_are_coalesced_after_the_first() -> None:
    """The first refusal is urgent, later ones travel with the next report."""
    desk = Desk()
    desk.supply(stopped(20.0))
    session, _ = desk.open()
    desk.urgent.clear()
    for n in range(1, 6):
        desk.acquire(session, n, deadline=desk.now + 1.0)
        desk.now += 0.01
    assert desk.urgent == [True, False, False, False, False]


def test_a_queue_that_flaps_is_told_at_once_only_once_a_second() -> None:
    """A first waiter is urgent; the next one after an empty moment isn't, until a second without any."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    session, _ = desk.open()
    desk.acquire(session, 1)
    desk.wait(1.0)
    desk.urgent.clear()
    for n in range(2, 12):
        desk.acquire(session, n)
        desk.dispatcher.demand(False, desk.now)
        desk.done(session, n - 1)
        desk.dispatcher.demand(False, desk.now)
    assert desk.urgent.count(True) == 1
    desk.wait(1.0)
    desk.urgent.clear()
    desk.acquire(session, 12)
    assert desk.urgent == [True]


# --- Retry-After ---------------------------------------------------------------------------------------


def gate_of(waiting: dict[str, int], weights: dict[str, int] | None = None, slots: int = 4) -> Gate:
    """A gate with busy slots and so many tickets of each tenant."""
    rules = {name: TenantRule(weight) for name, weight in (weights or {}).items()}
    tally = Tally()
    limits = Limits(50, 1000, 300.0, 60.0, Tenants(named=rules))
    gate = Gate("m", limits, tally, set(), 0.0, lambda: 0.0)
    gate.supply(model(instance(slots=slots)), (1, 1), True, 0.0)
    numbers = itertools.count()
    for name, count in {"busy": slots, **waiting}.items():
        for _ in range(count):
            gate.offer(Ticket(("s", next(numbers)), "m", 0.0, name), 0.0)
        gate.decide(0.0)
    return gate


def test_retry_after_is_the_tenants_own_part() -> None:
    """Waiting × mean ÷ (slots × share): one behind a flood isn't sent away for the flood's length."""
    gate = gate_of({"flood": 400, "small": 2})
    gate.tally.means = {"flood": 1.0, "small": 3.0}
    gate.tally.service_mean = 1.0
    assert gate.outlook.retry_after(1.0, "flood") == 120.0
    assert gate.outlook.retry_after(1.0, "small") == pytest.approx(2 * 3.0 / (4 * 0.5))
    assert gate.outlook.retry_after(1.0, "new") == pytest.approx(1.0), "its first: 1 × 1 s ÷ (4 × ⅓)"
    heavy = gate_of({"flood": 40, "big": 30}, {"big": 3})
    heavy.tally.service_mean = 1.0
    assert heavy.outlook.retry_after(1.0, "big") == pytest.approx(30 / (4 * 0.75))
    assert heavy.outlook.retry_after(1.0, "flood") == pytest.approx(40 / (4 * 0.25))


def test_retry_after_of_a_model_that_loads_includes_the_load() -> None:
    """What remains of the load, then the queue."""
    gate = gate_of({"": 8})
    gate.tally.service_mean = 2.0
    gate.supply(loading(10.0), (1, 1), False, 5.0)
    assert gate.outlook.retry_after(9.0, "") == pytest.approx(6.0 + 8 * 2.0 / 2)
    assert gate.outlook.retry_after(9.0, "nobody") == pytest.approx(6.0 + 2.0 / (2 * 0.5))


@given(
    waiting=st.integers(0, 10_000),
    others=st.dictionaries(st.sampled_from("abc"), st.integers(1, 50)),
    own=st.floats(0, 1e4),
    mean=st.floats(0, 1e4),
    measured=st.floats(0, 1e4),
    slots=st.integers(1, 1000),
    weight=st.integers(1, 1000),
    chance=st.floats(0, 1),
)
def test_retry_after_is_always_within_its_bounds(
    waiting: int,
    others: dict[str, int],
    own: float,
    mean: float,
    measured: float,
    slots: int,
    weight: int,
    chance: float,
) -> None:
    """From 1 to 120 s, never less with more waiting before it, never more with a larger share."""
    share = weight / (weight + sum(others.values()))
    pace = estimate.turnaround(own, mean, measured)

    def retry(position: int, part: float) -> float:
        return estimate.retry_after(estimate.until_slot(position, pace, slots, part), chance)

    assert 1.0 <= retry(waiting, share) <= 120.0
    if pace:
        assert retry(waiting + 1, share) >= retry(waiting, share)
        assert retry(waiting, min(1.0, share * 1.5)) <= retry(waiting, share)


def test_the_pace_of_a_queue_is_measured_while_somebody_waits() -> None:
    """Slots that stand empty for a while between two requests drain a queue slower than their means say."""
    gate = gate_of({"": 500}, slots=2)
    for half in range(1, 120):
        now = half / 2
        if half % 3 == 2:  # held for 1 s each
            for ticket in list(gate.slots["i1"].leases.values()):
                gate.done(ticket, Outcome.OK, now)
        elif half % 3 == 0:  # and taken again half a second later
            gate.decide(now)
        if half % 2 == 0:
            gate.sample(now)
    assert gate.tally.service_mean == pytest.approx(1.0)
    assert gate.outlook.drain_rate(now) == pytest.approx(2 / 1.5, rel=0.1)


def test_a_pace_is_not_measured_while_nobody_waits_or_the_loop_was_away() -> None:
    """Idle seconds and gaps would make it look slow."""
    drain = estimate.Drain()
    for second in range(100):
        drain.released += 1
        drain.sample(float(second), 4.0, waiting=False)
    assert drain.turnaround == 0.0
    for second in range(100, 110):
        drain.released += 8
        drain.sample(float(second), 4.0, waiting=True)
    assert drain.turnaround == pytest.approx(0.5)
    drain.sample(200.0, 4.0, waiting=True)
    assert drain.turnaround == pytest.approx(0.5)


def test_more_instances_drain_faster_before_that_is_measured() -> None:
    """The pace is kept by slot: twice the slots, twice the rate."""
    gate = gate_of({"": 10})
    gate.tally.service_mean = 2.0
    assert gate.outlook.drain_rate(1.0) == pytest.approx(2.0)
    gate.supply(model(instance(slots=4), instance("i2", slots=4)), (1, 1), True, 1.0)
    assert gate.outlook.drain_rate(1.0) == pytest.approx(4.0)


# --- affinity ------------------------------------------------------------------------------------------


def test_the_same_affinity_goes_to_the_same_instance_where_it_has_room() -> None:
    """Else to the one with most free slots, where it stays from then on; tenants don't share affinities."""
    desk = Desk()
    two = (instance("a", 2), instance("b", 3))
    desk.supply(model(*two))
    session, outbox = desk.open()

    def granted(n: int, tenant: str = "", affinity: str = "x") -> object:
        desk.acquire(session, n, tenant=tenant, affinity=affinity)
        return outbox.take("grant")[0][2]

    assert granted(1) == "b"
    assert granted(2) == "b", "two are free on each: but b has served x"
    assert granted(3) == "b"
    assert granted(4) == "a", "b is full"
    desk.done(session, 1, 2, 3)
    assert granted(5) == "a", "it stays where it was served last"
    assert granted(6, tenant="other") == "b"
    desk.supply(model(two[1]), n=2)
    assert granted(7) == "b", "the instance is gone"
    desk.check()


def test_affinities_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest unused are forgotten."""
    monkeypatch.setattr("tidegate_admission.affinity.MAX_AFFINITIES", 3)
    desk = Desk()
    desk.supply(model(instance(slots=50)))
    session, _ = desk.open()
    for n in range(1, 10):
        desk.acquire(session, n, affinity=f"a{n}")
    assert len(desk.dispatcher.gates["m"]._affinities) == 3


def test_an_interest_ends_with_the_admission_that_had_it() -> None:
    """A new process starts without any, and its whole report names none."""
    desk = Desk()
    desk.supply(stopped(20.0))
    session, _ = desk.open()
    desk.acquire(session, 1, deadline=desk.now + 1.0)
    assert interest(desk)
    again = Desk()
    again.supply(stopped(20.0))
    told = to_wire(again.dispatcher.demand(True, again.now), 2)
    assert told.whole
    assert list(told.models) == []
