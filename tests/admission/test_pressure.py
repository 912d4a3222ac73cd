"""Backpressure: slots that a server's 429 and 503 halve, and time gives back one by one."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.admission.support import Desk, instance, model
from tests.support.depth import examples
from tidegate_admission import views
from tidegate_admission.gate import Gate
from tidegate_admission.limits import Limits
from tidegate_admission.pressure import CROWDED, STEP, Pressure
from tidegate_admission.supply import Instance, InstanceState, ModelSupply
from tidegate_admission.tally import Tally
from tidegate_admission.ticket import LeaseEnd, Outcome, Ticket

BUSY = int(Outcome.BACKPRESSURE)


def reporting(queued: int | None, slots: int = 8, running: int | None = 8) -> ModelSupply:
    """A model with one instance whose server reports its load."""
    return model(replace(instance(slots=slots), running=running, queued=queued))


def effective(desk: Desk, name: str = "i1") -> int:
    """Slots in effect now, as operators see them."""
    (gate,) = views.queues(desk.dispatcher, desk.now)
    return {slot.id: slot.effective for slot in gate.instances}[name]


def note(desk: Desk) -> str:
    """What operators read beside the slots."""
    (gate,) = views.queues(desk.dispatcher, desk.now)
    return gate.instances[0].held_back


EVENTS = st.one_of(
    st.tuples(st.just("refused"), st.floats(0, 30)),
    st.tuples(st.just("heard"), st.sampled_from([None, 0, CROWDED, CROWDED + 1, 50])),
    st.tuples(st.just("passed"), st.floats(0, 400)),
)


@given(ceiling=st.integers(1, 64), events=st.lists(EVENTS, max_size=40))
def test_slots_stay_in_bounds_and_come_back_steadily(
    ceiling: int, events: list[tuple[str, float | int | None]]
) -> None:
    """Slots are 1 to the ceiling; only a refusal takes any, by half; they come back with time, unless many
    wait in the server, and never faster than one per step."""
    now, pressure, halved, queued = 1000.0, Pressure(), 0.0, None
    for kind, value in events:
        before = pressure.bound(now, ceiling)
        if kind == "refused":
            granted = now - float(value or 0.0)
            counts = granted >= halved
            assert pressure.halve(granted, now, ceiling) == counts
            assert pressure.bound(now, ceiling) == (max(1, before // 2) if counts else before)
            halved = now if counts else halved
        elif kind == "heard":
            queued = value
            pressure.hear(None if queued is None else int(queued), now, ceiling)
            assert pressure.bound(now, ceiling) == before
        else:
            seconds = float(value or 0.0)
            now += seconds
            gained = pressure.bound(now, ceiling) - before
            assert 0 <= gained <= seconds / STEP + 1
            assert not gained or queued is None or queued <= CROWDED
        assert 1 <= pressure.bound(now, ceiling) <= ceiling
        assert bool(pressure.words(now, ceiling)) == (pressure.bound(now, ceiling) < ceiling)
    pressure.hear(None, now, ceiling)
    now += STEP * ceiling
    assert pressure.bound(now, ceiling) == ceiling, "it has recovered"


class PressureMachine(RuleBasedStateMachine):
    """Random refusals, ends, supplies and times on a gate: no grant beyond the slots in effect."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.gate = Gate("m", Limits(8, 20), Tally(), set(), self.now)
        self.held: list[Ticket] = []
        self.n = 0
        self.served: dict[str, Instance] = {name: instance(name, 8) for name in ("i1", "i2")}
        self.supply("i1", 8, None)

    def decide(self) -> None:
        before = {slot.id: len(slot.leases) for slot in self.gate.slots.values()}
        decisions = self.gate.decide(self.now)
        self.held += [ticket for ticket, _, _, _ in decisions.grants] if decisions else []
        for slot in self.gate.slots.values():
            most = slot.effective(self.now, False)
            assert len(slot.leases) <= max(before[slot.id], most), "a grant above the slots in effect"
            able = [one for one in self.gate.waiting.values() if slot.id not in one.excluded]
            assert not able or len(slot.leases) >= most, "a free slot beside a ticket"

    @rule()
    def offer(self) -> None:
        self.n += 1
        self.gate.offer(Ticket(("s", self.n), "m", self.now), self.now)
        self.decide()

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(), outcome=st.sampled_from([Outcome.OK, Outcome.BACKPRESSURE]), batch=st.integers(1, 8)
    )
    def end(self, data: st.DataObject, outcome: Outcome, batch: int) -> None:
        for _ in range(min(batch, len(self.held))):
            ticket = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            slot = self.gate.slots[ticket.instance_id]
            before, halved = slot.effective(self.now, False), slot.pressure.halved_at
            self.gate.done(ticket, outcome, self.now)
            halves = outcome is Outcome.BACKPRESSURE and ticket.granted >= halved
            assert slot.effective(self.now, False) == (max(1, before // 2) if halves else before)
        self.decide()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        ticket = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.gate.move(ticket, ticket.instance_id, Outcome.BACKPRESSURE, ticket.moves + 1, self.now)
        self.decide()

    @rule(
        name=st.sampled_from(["i1", "i2"]),
        slots=st.integers(1, 8),
        queued=st.sampled_from([None, 0, CROWDED, CROWDED + 1]),
    )
    def supply(self, name: str, slots: int, queued: int | None) -> None:
        self.served[name] = replace(self.served[name], slots=slots, queued=queued)
        self.gate.supply(model(*self.served.values()), (1, 1), True, self.now)
        self.decide()

    @rule(seconds=st.floats(0.01, 40))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.decide()

    @invariant()
    def bounds(self) -> None:
        for slot in self.gate.slots.values():
            assert 1 <= slot.effective(self.now, False) <= slot.slots
        assert self.gate.tally.active == self.gate.active == len(self.held)


TestPressureMachine = PressureMachine.TestCase
TestPressureMachine.settings = settings(
    max_examples=examples(60), stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_a_burst_of_refusals_halves_once() -> None:
    """Requests that were granted before the first refusal came take no further slots; later ones do."""
    desk = Desk()
    desk.supply(model(instance(slots=8)))
    session, _ = desk.open()
    desk.acquire(session, *range(1, 13))
    assert len(session.leases) == 8
    for n in range(1, 8):
        desk.now += 0.001
        desk.done(session, n, outcome=BUSY)
    assert effective(desk) == 4
    assert sorted(session.leases) == [8, 9, 10, 11], "grants go on within what is left"
    desk.now += 0.001
    desk.done(session, 9, outcome=BUSY)
    desk.done(session, 10, outcome=BUSY)
    assert effective(desk) == 2
    desk.now += 0.001
    desk.done(session, 8, outcome=BUSY)
    assert effective(desk) == 2, "granted before the first halving"
    for n in (11, 12):
        desk.now += 0.001
        desk.done(session, n, outcome=BUSY)
    desk.acquire(session, 13)
    desk.now += 0.001
    desk.done(session, 13, outcome=BUSY)
    assert effective(desk) == 1, "never below"
    assert desk.dispatcher.tallies["m"].halvings == 4
    desk.check()


def test_slots_come_back_with_time_alone() -> None:
    """One slot per step, granted by the tick though nothing else happens; a gap of the loop counts."""
    desk = Desk()
    desk.supply(model(instance(slots=4)))
    session, outbox = desk.open()
    desk.acquire(session, *range(1, 9))
    desk.now += 1.0
    desk.done(session, 1, outcome=BUSY)
    outbox.take()
    assert (len(session.leases), effective(desk)) == (3, 2), "leases above the bound stay"
    for n in (2, 3):
        desk.done(session, n)
    assert sorted(session.leases) == [4, 5]
    desk.beat(session, 1, (4, 5))
    desk.wait(STEP - 1.0)
    assert sorted(session.leases) == [4, 5]
    desk.beat(session, 2, (4, 5))
    outbox.take()
    desk.wait(1.0)
    assert outbox.take("grant") == [("grant", 6, "i1", 0)]
    assert "3 of 4 slots" in note(desk)
    desk.now += STEP
    desk.dispatcher.shift(STEP, desk.now)
    desk.wait(0.0)
    assert sorted(session.leases) == [4, 5, 6, 7]
    assert (effective(desk), note(desk)) == (4, "")
    desk.check()


def test_a_crowd_in_the_server_holds_the_increase() -> None:
    """More than three waiting in the server itself: no slot comes back, and none is taken for it."""
    desk = Desk()
    desk.supply(reporting(queued=9))
    session, _ = desk.open()
    desk.acquire(session, 1)
    assert (effective(desk), note(desk)) == (8, ""), "by itself it shrinks nothing"
    desk.done(session, 1, outcome=BUSY)
    desk.wait(3 * STEP)
    assert effective(desk) == 4
    assert "more than 3 waiting" in note(desk)
    desk.supply(reporting(queued=CROWDED), n=2)
    desk.wait(STEP / 2)
    desk.supply(reporting(queued=CROWDED + 1), n=3)
    desk.wait(STEP)
    assert effective(desk) == 4
    desk.supply(reporting(queued=None, running=None), n=4)
    desk.wait(STEP / 2)
    assert effective(desk) == 5, "the halves of a step add up, and what isn't known holds nothing"
    desk.supply(reporting(queued=9), n=5)
    desk.dispatcher.unlinked(desk.now)
    desk.wait(STEP)
    assert effective(desk) == 6, "without lifecycle its last report is old"


def test_backpressure_is_no_fault() -> None:
    """Other instances keep their slots, grants go on at once, and nothing is held back for a connection."""
    desk = Desk()
    desk.supply(model(instance("i1", 2), instance("i2", 2)))
    session, _ = desk.open()
    desk.acquire(session, 1, 2, 3, 4, 5, 6)
    desk.now += 0.01
    busy = [n for n, ticket in session.leases.items() if ticket.instance_id == "i1"]
    desk.done(session, *busy, outcome=BUSY)
    assert (effective(desk, "i1"), effective(desk, "i2")) == (1, 2)
    assert len(session.leases) == 3
    assert "connection" not in note(desk)
    tally = desk.dispatcher.tallies["m"]
    assert (tally.lease_ends[LeaseEnd.RELEASED], tally.service_mean) == (2, 0.0), "a refusal served nothing"
    desk.dispatcher.move(session, next(iter(session.leases)), "", BUSY, 1, desk.now)
    desk.dispatcher.settle(desk.now)
    desk.check()


def test_waits_are_told_by_the_slots_in_effect() -> None:
    """Half the slots, half the pace."""
    desk = Desk()
    desk.supply(model(instance(slots=8)))
    session, _ = desk.open()
    desk.acquire(session, *range(1, 41))
    desk.wait(4.0)
    desk.done(session, 1)
    outlook = desk.dispatcher.gates["m"].outlook
    before = outlook.drain_rate(desk.now)
    desk.done(session, 2, outcome=BUSY)
    assert (before, outlook.drain_rate(desk.now)) == (2.0, 1.0)


def test_a_ceiling_that_rises_later_holds_at_once() -> None:
    """Old backpressure says nothing about slots that were added after the recovery."""
    desk = Desk()
    desk.supply(model(instance(slots=4)))
    session, _ = desk.open()
    desk.acquire(session, 1)
    desk.done(session, 1, outcome=BUSY)
    desk.wait(2 * STEP)
    desk.supply(model(instance(slots=4)), n=2)
    desk.supply(model(instance(slots=40)), n=3)
    assert effective(desk) == 40


def test_a_server_that_fell_silent_confirms_nothing() -> None:
    """After a failed connection a report confirms the instance, but not one whose news is that its server
    no longer answers."""
    desk = Desk()
    desk.supply(reporting(queued=0))
    session, _ = desk.open()
    desk.acquire(session, 1)
    desk.done(session, 1, outcome=int(Outcome.CONNECT_FAILED))
    desk.supply(reporting(queued=None, running=None), n=2)
    assert effective(desk) == 0
    desk.supply(reporting(queued=0, running=0), n=3)
    assert effective(desk) == 8


def test_a_drain_that_is_taken_back_keeps_what_is_known() -> None:
    """The server is the same one, and so is its pressure."""
    desk = Desk()
    desk.supply(model(instance(slots=8)))
    session, _ = desk.open()
    desk.acquire(session, 1)
    desk.done(session, 1, outcome=BUSY)
    desk.supply(model(instance(slots=8, state=InstanceState.DRAINING)), n=2)
    assert effective(desk) == 0
    desk.supply(model(instance(slots=8)), n=3)
    assert effective(desk) == 4
