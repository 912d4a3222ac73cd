"""Rates: buckets against arithmetic, and what is reserved, given back and settled through the dispatcher."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.admission.support import TTL, Desk, instance, model, report
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.fairness import MAX_IDLE, TenantRule, Tenants
from tidegate_admission.limits import Limits
from tidegate_admission.rates import GUESS, Allowance, Bucket, Meter, Rates, RateState, Used
from tidegate_admission.session import Held, Session
from tidegate_admission.supply import InstanceState
from tidegate_admission.ticket import LeaseEnd, Outcome, Reason, Ticket
from tidegate_admission.views import tenants as shown

GAPS = st.sampled_from([0.0, 1e-9, 0.001, 0.1, 1.0, 7.3, 60.0]) | st.floats(0.0, 100.0)


# --- one bucket -----------------------------------------------------------------------------------------


@given(
    limit=st.integers(1, 10**10),
    full=st.booleans(),
    steps=st.lists(st.tuples(GAPS, st.integers(1, 10**10)), max_size=40),
)
def test_no_window_lets_more_through_than_a_burst_and_the_rate(
    limit: int, full: bool, steps: list[tuple[float, int]]
) -> None:
    """In t seconds at most limit + limit·t/60 is taken, and what is refused changes nothing."""
    now, bucket = 1000.0, Bucket(limit, limit if full else 0, 1000.0)
    taken: list[tuple[float, int]] = []
    for gap, asked in steps:
        now, count = now + gap, min(asked, limit)
        before = bucket.allowance(now)
        if bucket.wait(count, now):
            assert bucket.allowance(now) == before
            continue
        bucket.take(count, now)
        taken.append((now, count))
    for i, (since, _) in enumerate(taken):
        for j, (until, _) in enumerate(taken[i:], i):
            total = sum(count for _, count in taken[i : j + 1])
            seconds = Fraction(round(until * 1e9) - round(since * 1e9), 10**9)
            assert total <= limit + limit * seconds / 60
    if taken and not full:
        seconds = Fraction(round(taken[-1][0] * 1e9) - round(1000.0 * 1e9), 10**9)
        assert sum(count for _, count in taken) <= limit * seconds / 60


@given(
    limit=st.integers(1, 10**7),
    steps=st.lists(st.tuples(GAPS, st.integers(1, 10**7), st.booleans()), max_size=30),
)
def test_what_is_given_back_is_exactly_what_was_taken(
    limit: int, steps: list[tuple[float, int, bool]]
) -> None:
    """A bucket that gives and takes back is at each moment like one of which only the rest was taken."""
    now, one, other = 0.0, Bucket(limit, limit, 0.0), Bucket(limit, limit, 0.0)
    for gap, count, kept in steps:
        now += gap
        if not kept:
            one.take(count, now)
            one.put(count)
        else:
            one.take(count, now)
            other.take(count, now)
        assert one.allowance(now) == other.allowance(now)


@given(limit=st.integers(1, 10**6), debt=st.integers(0, 10**7), asked=st.integers(1, 10**6))
def test_the_wait_is_the_exact_one(limit: int, debt: int, asked: int) -> None:
    """A nanosecond before it is over the bucket lacks something; then it holds what was asked."""
    asked, now = min(asked, limit), 0.0
    bucket = Bucket(limit, limit, now)
    bucket.take(debt, now)
    wait = bucket.wait(asked, now)
    exact = max(Fraction(0), Fraction((asked - (limit - debt)) * 60, limit))
    assert abs(Fraction(wait) - exact) < Fraction(2, 10**9)
    assert bucket.wait(asked, wait + 1e-8) == 0.0
    if wait > 1e-6:
        again = Bucket(limit, limit, now)
        again.take(debt, now)
        assert again.wait(asked, wait - 1e-6) > 0.0


def test_a_bucket_does_not_drift() -> None:
    """Many looks in between change nothing: after 30 s it holds exactly half of a minute's worth."""
    bucket = Bucket(7, 0, 0.0)
    for i in range(1, 100_001):
        bucket.wait(7, i * 300e-6)
    assert bucket.allowance(30.0) == Allowance(7, 3, 30.0)


def test_a_clock_that_goes_back_gives_nothing() -> None:
    """The same moment never counts twice."""
    bucket = Bucket(60, 0, 100.0)
    assert bucket.allowance(110.0).remaining == 10
    assert bucket.allowance(105.0).remaining == 10
    assert bucket.allowance(110.0).remaining == 10


FREE = TenantRule()

# --- tenants --------------------------------------------------------------------------------------------


def rules(default: TenantRule = FREE, **named: TenantRule) -> Tenants:
    """Tenants by name."""
    return Tenants(default, named)


def ticket(tenant: str = "", n: int = 1, tokens: int = 0, name: str = "m") -> Ticket:
    """One of the session `s`."""
    return Ticket(("s", n), name, 0.0, tenant, tokens=tokens)


def test_only_tenants_with_a_rate_have_meters() -> None:
    """A configured one without rates is free, though the default has one; strangers go by the default's."""
    rates = Rates(rules(TenantRule(requests=60), free=TenantRule(), team=TenantRule(tokens=9)), 0.0)
    rates.heard(True)
    assert rates.find("free", 0.0) is None
    assert rates.state("team", 0.0) == RateState(None, Allowance(9, 9, 0.0))
    assert rates.state("", 0.0) == rates.state("stranger", 0.0)
    assert rates.find("", 0.0) is not rates.find("stranger", 0.0)
    assert rates.find("stranger", 0.0) is rates.find("stranger", 1.0)
    assert Rates(rules(team=TenantRule(requests=1)), 0.0).find("stranger", 0.0) is None


def test_made_up_names_lead_around_no_limit_and_fill_no_memory() -> None:
    """Beyond the bound new names share one meter until an old one is full again and can be forgotten."""
    rates = Rates(rules(TenantRule(requests=10)), 0.0)
    rates.heard(True)
    let = sum(rates.reserve(ticket(f"t{n}", n), 0.0) is None for n in range(MAX_IDLE + 500))
    assert let == MAX_IDLE + 10
    assert len(list(rates.meters())) == MAX_IDLE + 2
    for meter in rates.meters():  # nobody has anything reserved any more, and a minute later all are full
        for held in list(meter.held):
            del meter.held[held]
    assert rates.reserve(ticket("new", 9999), 60.0) is None
    assert rates.find("new", 60.0) not in (rates.find("t1499", 60.0), rates.find("", 60.0))
    assert len(list(rates.meters())) == MAX_IDLE + 2


def test_a_meter_with_a_reservation_is_not_forgotten() -> None:
    """Its debt would go with it: a name can't be used again to begin afresh."""
    rates = Rates(rules(TenantRule(tokens=100)), 0.0)
    rates.heard(True)
    held = ticket("long", 1, tokens=10)
    assert rates.reserve(held, 0.0) is None
    for n in range(MAX_IDLE * 2):
        rates.find(f"t{n}", 120.0)
    meter = held.meter
    assert meter is not None
    meter.settle(held, Outcome.OK, Used(500, 500), 120.0)
    assert rates.reserve(ticket("long", 2, tokens=10), 121.0) is not None


@given(
    requests=st.integers(0, 50),
    tokens=st.integers(0, 5000),
    steps=st.lists(
        st.tuples(GAPS, st.integers(0, 9000), st.sampled_from(["refund", "lost", "settle", "hold"])),
        max_size=30,
    ),
)
def test_a_meter_takes_all_or_nothing(
    requests: int, tokens: int, steps: list[tuple[float, int, str]]
) -> None:
    """What is refused spends nothing of either rate; with everything given back it is as it was."""
    now, meter = 0.0, Meter(TenantRule(requests=requests, tokens=tokens), True, 0.0)
    kept = set()
    for n, (gap, asked, end) in enumerate(steps):
        now += gap
        one, before, held = ticket("t", n, asked), meter.state(now), dict(meter.held)
        if short := meter.reserve(one, now):
            assert (meter.state(now), meter.held, one.meter) == (before, held, None)
            assert short.wait > 0.0
            continue
        assert one.meter is meter
        if end == "refund":
            meter.refund(one)
            assert meter.state(now) == before
        elif end == "lost":
            meter.lost(one)
        elif end == "settle":
            meter.settle(one, Outcome.OK, Used(asked, 0), now)
        else:
            kept.add(one.id)
    assert set(meter.held) == kept


# --- through the dispatcher -----------------------------------------------------------------------------


def used_up(prompt: int = 0, completion: int = 0, **words: bool) -> Used:
    """What a lease has used."""
    return Used(prompt, completion, **words)


class Rated(Desk):
    """A desk with rates, as after a first boot, and a session."""

    def __init__(
        self,
        tenants: Tenants,
        max_queue: int = 200,
        slots: int = 2,
        first: bool = True,
        queue_timeout: float = 300.0,
    ) -> None:
        super().__init__(max_queue, queue_timeout, tenants)
        self.first = first
        self.slots = slots
        self.ready()
        self.session, self.outbox = self.open()

    def ready(self, *names: str) -> None:
        """Supply comes: models with one instance each."""
        models = [model(instance(f"{name}1", self.slots), name=name) for name in names or ("m",)]
        said = replace(report(*models), first_admission=self.first)
        self.dispatcher.supply(said, self.now)

    def left(self, tenant: str = "") -> tuple[int, int]:
        """What is left: requests, tokens (-1 = no such rate)."""
        assert self.dispatcher.books.rates is not None
        state = self.dispatcher.books.rates.state(tenant, self.now)
        assert state is not None
        rates = (state.requests, state.tokens)
        return tuple(-1 if one is None else one.remaining for one in rates)  # type: ignore[return-value]

    def answers(self) -> list[tuple[object, ...]]:
        """Grants and refusals since the last time, without what isn't looked at here."""
        return [
            answer[:2] + answer[2:3] * (answer[0] == "refuse")
            for answer in self.outbox.take("grant", "refuse")
        ]

    def give_back(self, n: int, outcome: int = Outcome.OK, *used: int, **words: Any) -> None:
        """A lease or ticket ends."""
        self.dispatcher.done(self.session, n, outcome, self.now, used_up(*used, **words))
        self.dispatcher.settle(self.now)
        self.check()


LIMITED = ("refuse", 3, Reason.RATE_LIMITED)


def test_a_rate_counts_over_models_and_edges_and_comes_back_evenly() -> None:
    """Two a minute: the third is refused wherever it comes from; 30 s later there is one more."""
    desk = Rated(rules(TenantRule(requests=2)))
    desk.ready("m", "other")
    second, outbox = desk.open("second")
    desk.acquire(desk.session, 1)
    desk.acquire(second, 1, model="other")
    assert outbox.take("grant")
    desk.acquire(second, 2)
    assert outbox.take("grant", "refuse") == [("refuse", 2, Reason.RATE_LIMITED)]
    desk.wait(30.0)
    desk.beat(second, 1, (1,))
    desk.acquire(second, 3)
    assert outbox.take("grant", "refuse")[0][:2] == ("grant", 3)
    desk.acquire(desk.session, 2)
    assert desk.answers()[-1] == ("refuse", 2, Reason.RATE_LIMITED)
    desk.check()


def test_a_refusal_says_the_limit_what_was_asked_and_when_it_may_come_again() -> None:
    """Retry-After is never earlier than the moment from which it can succeed, nor more than 120 s."""
    desk = Rated(rules(team=TenantRule(requests=100, tokens=600)))
    gate = desk.dispatcher.books.gate("m", desk.now)
    rates = desk.dispatcher.books.rates
    assert rates is not None
    assert rates.reserve(ticket("team", 1, 500), desk.now) is None
    for chance in (0.0, 0.5, 1.0):
        gate._chance = lambda chance=chance: chance  # type: ignore[misc]
        refusal = gate.offer(ticket("team", 2, 200), desk.now)
        assert refusal is not None
        assert refusal.message == (
            "tenant 'team' may have 600 tokens per minute: 100 left, 200 asked for; try again in 10 s"
        )
        assert refusal.retry_after == pytest.approx(10.0 * (1.0 + 0.2 * chance))
    meter = rates.find("team", desk.now)
    assert meter is not None
    assert meter.tokens is not None
    meter.tokens.take(10_000, desk.now)
    refusal = gate.offer(ticket("team", 3, 1), desk.now)
    assert refusal is not None
    assert refusal.retry_after == 120.0
    assert "991 s" in refusal.message


@pytest.mark.parametrize(
    "end", ["cancelled", "expired", "impatient", "goodbye", "session_lost", "unused", "gone"]
)
def test_what_ends_without_a_used_lease_gives_everything_back(end: str) -> None:
    """Cancelled, past its deadline, out of patience, with its session, unused, or its model gone."""
    desk = Rated(rules(TenantRule(requests=10, tokens=1000)), slots=1, queue_timeout=3.0)
    desk.acquire(desk.session, 1, tokens=100)
    assert desk.left() == (9, 900)
    desk.acquire(desk.session, 2, tokens=300, deadline=desk.now + 2.0 if end == "expired" else math.inf)
    assert desk.left() == (8, 600)
    if end == "cancelled":
        desk.give_back(2, Outcome.CLIENT_GONE)
    elif end == "expired":
        desk.wait(2.0)
        assert ("refuse", 2, Reason.DEADLINE_EXCEEDED) in desk.answers()
    elif end == "impatient":
        desk.wait(3.0)
        assert ("refuse", 2, Reason.QUEUE_TIMEOUT) in desk.answers()
    elif end == "goodbye":
        desk.dispatcher.goodbye(desk.session, desk.now)
    elif end == "session_lost":
        desk.wait(TTL)
    elif end == "unused":
        desk.give_back(1, Outcome.OK, 100)
        desk.give_back(2, Outcome.UNUSED)
    elif end == "gone":
        desk.supply(model(reason=Reason.MODEL_FAILED), n=2, settled=False, whole=False)
        desk.supply(n=3)
        assert desk.dispatcher.books.sessions["s"].tickets == {}
    later = desk.now - 1000.0  # what came back by itself
    assert desk.left() == (9 + int(later / 6), min(1000, 900 + int(later * 1000 / 60)))
    desk.check()


def test_refusals_before_the_rates_spend_nothing_and_a_limited_one_displaces_nobody() -> None:
    """Order at the offer: no model, full queue, rates, and only then somebody has to leave."""
    tenants = rules(TenantRule(requests=100), few=TenantRule(requests=1))
    desk = Rated(tenants, max_queue=2, slots=1)
    desk.acquire(desk.session, 1, 2, 3)
    desk.outbox.take()
    desk.acquire(desk.session, 4)
    assert desk.answers() == [("refuse", 4, Reason.QUEUE_FULL)]
    assert desk.left() == (97, -1)
    desk.acquire(desk.session, 5, tenant="few")  # below its share: it displaces one of the flood's
    assert desk.answers() == [("refuse", 3, Reason.QUEUE_FULL)]
    assert (desk.left(), desk.left("few")) == ((98, -1), (0, -1))
    desk.give_back(5)
    assert desk.left("few") == (1, -1)
    desk.acquire(desk.session, 6, tenant="few")
    desk.acquire(desk.session, 7)
    assert desk.answers() == [("refuse", 7, Reason.QUEUE_FULL)]
    desk.give_back(6)
    desk.acquire(desk.session, 8)
    meter = desk.dispatcher.books.rates.find("few", desk.now)  # type: ignore[union-attr]
    assert meter is not None
    assert meter.requests is not None
    meter.requests.take(1, desk.now)
    desk.acquire(desk.session, 9, tenant="few")
    assert desk.answers() == [("refuse", 9, Reason.RATE_LIMITED)]
    assert set(desk.session.tickets) == {2, 8}
    desk.supply(model(name="no", reason=Reason.NO_CAPACITY), n=2)
    before = desk.left()
    desk.acquire(desk.session, 10, model="no")
    desk.acquire(desk.session, 11, model="unknown")
    assert [answer[2] for answer in desk.answers()[-2:]] == [Reason.NO_CAPACITY, Reason.MODEL_NOT_FOUND]
    assert desk.left()[0] >= before[0]
    desk.check()


@pytest.mark.parametrize(
    ("outcome", "used", "words", "requests", "tokens"),
    [
        (Outcome.OK, (40, 60), {}, 9, 900),
        (Outcome.OK, (1500, 700), {}, 9, -1200),
        (Outcome.CLIENT_GONE, (40, 3), {"estimated": True}, 9, 957),
        (Outcome.OK, (9000, 3), {"estimated": True}, 9, -3),
        (Outcome.OK, (), {}, 9, 700),
        (Outcome.TIMEOUT, (), {}, 9, 700),
        (Outcome.OK, (), {"nothing": True}, 9, 1000),
        (Outcome.UPSTREAM_ERROR, (), {}, 9, 1000),
        (Outcome.UPSTREAM_ERROR, (40, 2), {}, 9, 958),
        (Outcome.BACKPRESSURE, (), {}, 9, 1000),
        (Outcome.CONNECT_FAILED, (), {}, 9, 1000),
        (Outcome.UNUSED, (), {}, 10, 1000),
    ],
)
def test_settlement(
    outcome: Outcome, used: tuple[int, ...], words: dict[str, bool], requests: int, tokens: int
) -> None:
    """A lease with 300 of 1000 tokens reserved ends: what that costs; a debt is paid before the next."""
    desk = Rated(rules(TenantRule(requests=10, tokens=1000)))
    desk.acquire(desk.session, 1, tokens=300)
    assert desk.left() == (9, 700)
    desk.give_back(1, outcome, *used, **words)
    assert desk.left() == (requests, max(0, tokens))
    desk.acquire(desk.session, 2, tokens=1)
    assert desk.answers()[-1][0] == ("grant" if tokens > 0 else "refuse")
    if tokens < 0:
        desk.wait((1 - tokens) * 0.06 - 0.01)
        desk.acquire(desk.session, 4, tokens=1)
        desk.wait(0.02)
        desk.beat(desk.session, 1, ())
        desk.acquire(desk.session, 5, tokens=1)
        found = [answer[:2] for answer in desk.answers()]
        assert ("refuse", 4) in found
        assert ("grant", 5) in found
    desk.check()


@pytest.mark.parametrize("end", ["expired", "revoked", "reclaimed", "instance_lost"])
def test_a_lost_lease_keeps_what_it_reserved(end: str) -> None:
    """Nobody knows what it used; it is settled neither then nor later."""
    desk = Rated(rules(TenantRule(tokens=6000)))
    desk.acquire(desk.session, 1, tokens=3000)
    before = desk.now
    if end == "expired":
        desk.wait(TTL)
    elif end == "revoked":
        assert desk.dispatcher.revoke(("s", 1), desk.now)
    elif end == "reclaimed":
        desk.beat(desk.session, 1, ())
        desk.dispatcher.statement(desk.session, 1, 10**9, (), desk.now)
    else:
        desk.supply(model(), n=2)
    assert desk.dispatcher.tallies["m"].lease_ends[LeaseEnd(end)] == 1
    assert desk.left() == (-1, 3000 + round(desk.now - before) * 100)
    desk.give_back(1, Outcome.OK, 5, 5)
    assert desk.left() == (-1, 3000 + round(desk.now - before) * 100)


def test_a_move_keeps_the_reservation() -> None:
    """A failed connection costs no second request, and the end settles once."""
    desk = Rated(rules(TenantRule(requests=10, tokens=1000)))
    desk.acquire(desk.session, 1, tokens=300)
    desk.move(desk.session, 1, "m1")
    assert desk.left() == (9, 700)
    desk.wait(5.0)
    assert 1 in desk.session.leases
    desk.give_back(1, Outcome.OK, 10, 10)
    assert desk.left()[1] == 1000
    desk.acquire(desk.session, 1, tokens=1)  # a repeat of an id that has ended is a new ticket
    desk.check()


def test_a_repeated_acquire_reserves_once() -> None:
    """While it waits and when it is a lease."""
    desk = Rated(rules(TenantRule(requests=10)), slots=1)
    desk.acquire(desk.session, 1, 2)
    desk.acquire(desk.session, 1, 2)
    assert desk.left() == (8, -1)


def test_a_request_beyond_a_minutes_worth_waits_for_a_full_bucket() -> None:
    """It is never impossible for ever, and pays afterwards what it used."""
    desk = Rated(rules(TenantRule(tokens=600)))
    desk.acquire(desk.session, 1, tokens=1)
    desk.acquire(desk.session, 2, tokens=10**6)
    assert desk.answers() == [("grant", 1), ("refuse", 2, Reason.RATE_LIMITED)]
    desk.give_back(1, Outcome.OK, nothing=True)
    desk.acquire(desk.session, 3, tokens=10**6)
    assert desk.answers() == [("grant", 3)]
    desk.give_back(3, Outcome.OK, 1000, 200)
    desk.acquire(desk.session, 4, tokens=1)
    assert desk.answers() == [("refuse", 4, Reason.RATE_LIMITED)]
    desk.now += 60.2
    desk.acquire(desk.session, 5, tokens=1)
    assert desk.answers()[-1] == ("grant", 5)


def test_the_estimate_without_a_maximum_is_the_tenants_mean_for_the_model() -> None:
    """A guess at first; then what this tenant's requests to this model used of late."""
    desk = Rated(rules(TenantRule(tokens=100_000)))
    desk.ready("m", "other")
    desk.acquire(desk.session, 1)
    assert desk.left() == (-1, 100_000 - GUESS)
    desk.give_back(1, Outcome.OK, 30, 90)
    desk.acquire(desk.session, 2)
    assert desk.left() == (-1, 100_000 - 240)
    desk.acquire(desk.session, 3, model="other")
    assert desk.left() == (-1, 100_000 - 240 - GUESS)
    desk.acquire(desk.session, 4, tenant="stranger")
    assert desk.left("stranger") == (-1, 100_000 - GUESS)
    desk.give_back(2)  # unknown: nothing is learned of it
    desk.acquire(desk.session, 5)
    assert desk.left() == (-1, 100_000 - 240 - GUESS - 120)


def test_after_a_restart_there_is_no_burst_and_restated_ones_are_not_paid_twice() -> None:
    """One request and no token at once, then the rate; what was let through before is settled by nobody."""
    desk = Rated(rules(TenantRule(requests=60, tokens=6000)), first=False)
    assert desk.left() == (1, 0)
    gone, _ = desk.open(
        "edge", held=(Held(7, "m", "m1"),), waiting=(Ticket(("edge", 8), "m", 990.0, tokens=50),)
    )
    assert desk.left() == (1, 0)
    desk.wait(1.0)
    assert desk.left() == (2, 100)
    desk.dispatcher.done(gone, 7, Outcome.OK, desk.now, Used(4000, 4000))
    desk.dispatcher.done(gone, 8, Outcome.OK, desk.now, Used(4000, 4000))
    desk.dispatcher.settle(desk.now)
    assert desk.left() == (2, 100)
    desk.first = True  # a later word doesn't change what the first one said
    desk.ready()
    assert desk.left() == (2, 100)
    desk.now += 3600.0
    desk.dispatcher.shift(3600.0, desk.now)
    assert desk.left() == (60, 6000)
    assert desk.left("stranger") == (60, 6000)
    desk.check()


def test_before_the_first_word_of_lifecycle_there_is_no_burst_either() -> None:
    """It fills up when lifecycle says that nothing can have been used; what was spent stays spent."""
    dispatcher = Dispatcher(Limits(tenants=rules(TenantRule(requests=10, tokens=600))), TTL, 0.0)
    rates = dispatcher.books.rates
    assert rates is not None
    assert rates.reserve(ticket("", 1, 600), 0.0) is not None
    assert rates.reserve(ticket("", 2, 10), 1.0) is None
    rates.heard(True)
    assert rates.state("", 1.0) == RateState(Allowance(10, 9, 5.0), Allowance(600, 600, 0.0))


def test_rates_cost_nothing_where_none_are_set() -> None:
    """No book of rates at all; tenants are shown only when they have one."""
    desk = Desk()
    desk.supply(model(instance()))
    assert desk.dispatcher.books.rates is None
    session, _ = desk.open()
    desk.acquire(session, 1)
    assert session.leases[1].meter is None
    assert shown(desk.dispatcher, desk.now) == []
    rated = Rated(rules(TenantRule(requests=5), free=TenantRule(), team=TenantRule(tokens=7)))
    assert [name for name, _ in shown(rated.dispatcher, rated.now)] == ["default", "team"]


def test_the_books_notice_a_reservation_that_belongs_to_nobody() -> None:
    """The conservation figure counts it."""
    desk = Rated(rules(TenantRule(requests=5)))
    desk.acquire(desk.session, 1)
    desk.check()
    lease: Ticket = desk.session.leases[1]
    lease.meter = None
    with pytest.raises(AssertionError):
        desk.check()


def test_the_gate_of_a_loading_model_reserves_at_the_offer() -> None:
    """Not at the grant: those that wait for a load count, so that a burst can't hide behind it."""
    desk = Rated(rules(TenantRule(requests=2)))
    starting = instance("l1", state=InstanceState.STARTING)
    desk.supply(model(starting, name="slow", start_deadline=60.0), n=2)
    desk.acquire(desk.session, 1, 2, 3, model="slow")
    assert desk.answers() == [LIMITED]
    assert isinstance(desk.session, Session)
    desk.check()
