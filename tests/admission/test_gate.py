"""The gate alone: a naive model beside it under random operations, and the cases worth naming."""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.admission.support import READY, instance, model
from tests.support.depth import examples
from tidegate_admission.fairness import TenantRule, Tenants
from tidegate_admission.gate import Gate
from tidegate_admission.limits import Limits
from tidegate_admission.supply import InstanceState
from tidegate_admission.tally import Tally
from tidegate_admission.ticket import (
    Band,
    IllegalTransitionError,
    LeaseEnd,
    Outcome,
    Phase,
    Reason,
    Ticket,
    TicketEnd,
)

CATALOG = (1, 5)
AGING = 8.0
PATIENCE = 30.0
WEIGHTS = {"": 1, "x": 1, "y": 3}
TENANTS = Tenants(
    TenantRule(top=Band.HIGH),
    {name: TenantRule(weight, Band.HIGH) for name, weight in WEIGHTS.items() if name},
)
STATES = (InstanceState.STARTING, READY, READY, InstanceState.DRAINING, InstanceState.STOPPING)


@dataclass
class Naive:
    """What a gate should do, written as plainly as possible; slow."""

    waiting: list[Ticket] = field(default_factory=list)
    leases: dict[tuple[str, int], str] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)
    held_until: dict[str, float] = field(default_factory=dict)
    due: dict[tuple[str, int], float] = field(default_factory=dict)
    """When each ticket's queue timeout is over."""
    catalog: tuple[int, int] = CATALOG
    max_queue: int = 6
    refuses: bool = False
    """Supply says that the model can't be had."""

    ready: float | None = None
    ready_since: float | None = None
    """When what remains began to run down; None = it doesn't."""
    interest_until: float = 0.0

    def ready_in(self, now: float) -> float:
        """When the model is up, as far as known; what is not known, or should be over, refuses nobody."""
        if READY in self.states.values() or self.ready is None:
            return 0.0
        return self.ready - (now - self.ready_since if self.ready_since is not None else 0.0)

    def free(self, name: str, now: float) -> int:
        if self.states[name] != READY or self.held_until.get(name, 0.0) > now:
            return 0
        return self.slots[name] - sum(on == name for on in self.leases.values())

    def rooms(self, ticket: Ticket, now: float) -> list[str]:
        may = [n for n, state in self.states.items() if state in (READY, InstanceState.STARTING)]
        shut = ticket.excluded if any(n not in ticket.excluded for n in may) else frozenset()
        return [n for n in self.slots if n not in shut and self.free(n, now) > 0]

    def next(self, silent: set[str], now: float, had: Callable[[str], float]) -> Ticket | None:
        """Bands by their oldest head, then tenants by what they `had`, then the order within the flow."""
        standing = [one for one in self.waiting if one.id[0] not in silent and one.catalog <= self.catalog]
        flows: dict[tuple[str, int], list[Ticket]] = {}
        for ticket in sorted(standing, key=lambda one: (not one.moves, one.arrived, one.order)):
            flows.setdefault((ticket.tenant, ticket.band), []).append(ticket)
        able: list[tuple[int, float, bool, float, int, Ticket]] = []
        oldest: dict[int, float] = {}
        for (tenant, band), tickets in flows.items():
            first = next((ticket for ticket in tickets if self.rooms(ticket, now)), None)
            head = tickets[0]
            oldest[band] = min(oldest.get(band, now), head.arrived)
            if first is not None:
                able.append((band, had(tenant), not head.moves, head.arrived, head.order, first))
        raised = {band: sum(old + AGING * k <= now for k in (1, 2)) for band, old in oldest.items()}
        keys = [(max(1, one[0] - raised[one[0]]), *one[1:5], one[5]) for one in able]
        return min(keys, key=lambda key: key[:-1])[5] if keys else None

    def hits(self, arrival: Ticket, limit: int) -> list[Ticket]:
        """Who may be refused when it comes to a full queue: one of each tenant that is equally far above."""
        tickets = [*self.waiting, arrival]
        weights = {ticket.tenant: WEIGHTS[ticket.tenant] for ticket in tickets}
        counts = Counter(ticket.tenant for ticket in tickets)
        share = {name: max(1.0, limit * weights[name] / sum(weights.values())) for name in weights}
        below = counts[arrival.tenant] <= share[arrival.tenant]
        above = [one for one in self.waiting if counts[one.tenant] > share[one.tenant]]
        above = [one for one in above if below or one.band > arrival.band]
        band = max((one.band for one in above), default=0)
        above = [one for one in above if one.band == band]
        most = max((counts[one.tenant] / weights[one.tenant] for one in above), default=0.0)
        newest = {one.tenant: arrival for one in above if counts[one.tenant] / weights[one.tenant] == most}
        newest.update({one.tenant: one for one in above if one.tenant in newest and not one.moves})
        return list(newest.values()) or [arrival]


class GateMachine(RuleBasedStateMachine):
    """Random operations on a gate and on the naive model, which must agree after each."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.silent: set[str] = set()
        self.gate = Gate("m", Limits(3, 6, PATIENCE, AGING, TENANTS), Tally(), self.silent, self.now)
        self.naive = Naive()
        self.tickets: dict[tuple[str, int], Ticket] = {}
        self.n = 0
        self.supply([], None, None, False, False, None, False)

    def take_in(self, ticket: Ticket) -> None:
        self.tickets[ticket.id] = ticket
        self.naive.waiting.append(ticket)
        self.naive.due[ticket.id] = self.now + PATIENCE

    def gone(self, ticket: Ticket) -> None:
        del self.tickets[ticket.id]
        self.naive.waiting.remove(ticket)

    def decide(self) -> None:
        accounts = self.gate.turns.accounts
        had = {name: account.virtual for name in WEIGHTS if (account := accounts.find(name))}
        decisions = self.gate.decide(self.now)
        refused = {refusal.ticket.id: refusal for refusal in decisions.refusals} if decisions else {}
        if self.naive.refuses:
            judged = [one for one in self.naive.waiting if one.catalog <= self.naive.catalog]
            assert all(refused.pop(one.id).reason is Reason.MODEL_FAILED for one in judged)
            for one in judged:
                self.gone(one)

        def turn() -> Ticket | None:
            """Whose turn it is, when those who came to theirs too late have been refused."""
            while wanted := self.naive.next(self.silent, self.now, had.__getitem__):
                if wanted.deadline > self.now:
                    return wanted
                assert refused.pop(wanted.id).reason is Reason.DEADLINE_EXCEEDED
                self.gone(wanted)
            return None

        for ticket, address, _, _ in decisions.grants if decisions else ():
            assert turn() is ticket, "the turn was another ticket's"
            had[ticket.tenant] += ticket.charged / WEIGHTS[ticket.tenant]
            rooms = self.naive.rooms(ticket, self.now)
            assert ticket.instance_id in rooms
            most = max(self.naive.free(name, self.now) for name in rooms)
            assert ticket.affinity or self.naive.free(ticket.instance_id, self.now) == most
            assert address == f"http://{ticket.instance_id}"
            self.naive.waiting.remove(ticket)
            self.naive.leases[ticket.id] = ticket.instance_id
        assert turn() is None, "a slot is free and a ticket was left waiting"
        assert not refused

    @rule(
        session=st.sampled_from("abc"),
        tenant=st.sampled_from(sorted(WEIGHTS)),
        band=st.sampled_from(list(Band)),
        early=st.booleans(),
        affinity=st.sampled_from(["", "", "x", "y"]),
        within=st.sampled_from([math.inf, math.inf, 0.5, 5.0]),
    )
    def offer(self, session: str, tenant: str, band: int, early: bool, affinity: str, within: float) -> None:
        self.n += 1
        self.now += 0.001
        naive = self.naive
        newer = (1, naive.catalog[1] + 1)
        ticket = Ticket((session, self.n), "m", self.now, tenant, band, self.now + within, affinity=affinity)
        ticket.catalog = newer if early and self.n % 5 == 0 else naive.catalog
        full = len(naive.waiting) >= naive.max_queue
        hits = naive.hits(ticket, naive.max_queue)
        refusal = self.gate.offer(ticket, self.now)
        if naive.refuses and ticket.catalog <= naive.catalog:
            assert refusal is not None
            assert (refusal.ticket, refusal.reason) == (ticket, Reason.MODEL_FAILED)
            return
        if ticket.catalog <= naive.catalog and within < naive.ready_in(self.now):
            assert refusal is not None
            assert (refusal.ticket, refusal.reason) == (ticket, Reason.DEADLINE_UNREACHABLE)
            until = self.now + max(180.0, naive.ready_in(self.now) + 60.0)
            naive.interest_until = max(naive.interest_until, until)
            return
        assert (refusal is not None) == full
        self.take_in(ticket)
        if refusal is not None:
            assert refusal.reason is Reason.QUEUE_FULL
            assert 1 <= refusal.retry_after <= 120
            assert refusal.ticket in hits
            self.gone(refusal.ticket)
        self.decide()

    @rule(age=st.floats(0, 50), moves=st.integers(0, 1), tenant=st.sampled_from(sorted(WEIGHTS)))
    def restate_waiting(self, age: float, moves: int, tenant: str) -> None:
        self.n += 1
        ticket = Ticket(("d", self.n), "m", self.now - age, tenant, moves=moves)
        self.gate.restate_waiting(ticket, self.now)
        self.take_in(ticket)
        self.decide()

    @precondition(lambda self: self.naive.slots)
    @rule(data=st.data())
    def restate_held(self, data: st.DataObject) -> None:
        self.n += 1
        where = data.draw(st.sampled_from(sorted(self.naive.slots)))
        ticket = Ticket(("a", self.n), "m", self.now)
        self.gate.restate_held(ticket, where, self.now)
        self.tickets[ticket.id] = ticket
        self.naive.leases[ticket.id] = where

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), outcome=st.sampled_from([Outcome.OK, Outcome.CONNECT_FAILED, Outcome.UNUSED]))
    def done(self, data: st.DataObject, outcome: Outcome) -> None:
        ticket = self.tickets.pop(data.draw(st.sampled_from(sorted(self.tickets))))
        self.gate.done(ticket, outcome, self.now)
        self.gate.done(ticket, outcome, self.now)  # an end that is repeated changes nothing
        self.leave(ticket, outcome)
        self.decide()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), kind=st.sampled_from([LeaseEnd.EXPIRED, LeaseEnd.REVOKED, LeaseEnd.RECLAIMED]))
    def end(self, data: st.DataObject, kind: LeaseEnd) -> None:
        """It ends, not by its session: silence, an order, a statement that lacks it."""
        ticket = self.tickets.pop(data.draw(st.sampled_from(sorted(self.tickets))))
        self.gate.end(ticket, kind, TicketEnd.SESSION_LOST, self.now)
        self.leave(ticket, Outcome.OK)
        self.decide()

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        ticket = self.tickets[data.draw(st.sampled_from(sorted(self.tickets)))]
        where = self.naive.leases.get(ticket.id, "i1")
        self.gate.move(ticket, where, Outcome.CONNECT_FAILED, ticket.moves + 1, self.now)
        if ticket.id in self.naive.leases:
            self.leave(ticket, Outcome.CONNECT_FAILED)
            self.take_in(ticket)
        self.decide()

    def leave(self, ticket: Ticket, outcome: Outcome) -> None:
        where = self.naive.leases.pop(ticket.id, None)
        if where is None:
            self.naive.waiting = [other for other in self.naive.waiting if other is not ticket]
        elif outcome is Outcome.CONNECT_FAILED:
            self.naive.held_until[where] = self.now + 5.0

    @rule(
        states=st.lists(st.tuples(st.sampled_from(STATES), st.integers(1, 4)), max_size=3),
        ceiling=st.sampled_from([None, None, 1, 2, 4]),
        max_queue=st.sampled_from([None, None, 1, 3, 9]),
        newer=st.booleans(),
        refuses=st.sampled_from([False, False, False, True]),
        ready=st.sampled_from([None, 0.0, 2.0, 200.0]),
        under_way=st.booleans(),
    )
    def supply(
        self,
        states: list[tuple[InstanceState, int]],
        ceiling: int | None,
        max_queue: int | None,
        newer: bool,
        refuses: bool,
        ready: float | None,
        under_way: bool,
    ) -> None:
        """A report: instances come, change and go, limits are changed, the catalogue is a newer one."""
        naive = self.naive
        there = [instance(f"i{i}", slots, state) for i, (state, slots) in enumerate(states, 1)]
        item = model(*there, reason=Reason.MODEL_FAILED if refuses else None)
        naive.catalog = (1, naive.catalog[1] + newer)
        naive.max_queue, naive.refuses = max_queue or 6, refuses
        naive.ready, naive.ready_since = ready, self.now if under_way else None
        limited = replace(item, max_concurrent=ceiling, max_queue=max_queue)
        limited = replace(limited, ready_in=ready, under_way=under_way)
        losses = self.gate.supply(limited, naive.catalog, True, self.now)
        lost = {ticket_id for ticket_id, on in naive.leases.items() if on not in {one.id for one in there}}
        assert {loss.ticket.id for loss in losses} == lost
        for ticket_id in lost:
            del naive.leases[ticket_id]
            del self.tickets[ticket_id]
        naive.slots = {one.id: min(one.slots, ceiling or 3) for one in there}
        naive.states = {one.id: one.state for one in there}
        held = naive.held_until.items()
        naive.held_until = {name: to for name, to in held if naive.states.get(name, READY) != READY}
        self.decide()

    @rule(session=st.sampled_from("abc"))
    def silence(self, session: str) -> None:
        if session in self.silent:
            self.silent.discard(session)
            self.gate.release_session(session)
        else:
            self.silent.add(session)
        self.decide()

    @rule(seconds=st.floats(0.1, 20))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        naive = self.naive
        for refusal in self.gate.expire(self.now):
            ticket = refusal.ticket
            if refusal.reason is Reason.DEADLINE_EXCEEDED:
                assert ticket.deadline <= self.now
            else:
                assert refusal.reason is Reason.QUEUE_TIMEOUT
                assert naive.due[ticket.id] <= self.now + 1e-6
            self.gone(ticket)
        late = [one for one in naive.waiting if min(naive.due[one.id] + 1e-6, one.deadline) <= self.now]
        assert not late, "a ticket outlived its time"
        self.decide()

    @rule(seconds=st.floats(0.1, 60))
    def stand_still(self, seconds: float) -> None:
        """The loop was away: what the gate measures itself begins so much later, a caller's deadline not."""
        self.now += seconds
        self.gate.shift(seconds)
        naive = self.naive
        naive.due = {ticket_id: due + seconds for ticket_id, due in naive.due.items()}
        naive.held_until = {name: until + seconds for name, until in naive.held_until.items()}
        self.decide()

    @invariant()
    def agree(self) -> None:
        assert set(self.gate.waiting) == {ticket.id for ticket in self.naive.waiting}
        book = {t: slot.id for slot in self.gate.slots.values() for t in slot.leases}
        assert book == self.naive.leases
        tally = self.gate.tally
        assert tally.active == self.gate.active == len(book)
        assert tally.waiting == len(self.gate.waiting)
        interest = max(0.0, self.naive.interest_until - self.now)
        assert self.gate.outlook.interest(self.now) == pytest.approx(interest)


TestGateMachine = GateMachine.TestCase
TestGateMachine.settings = settings(
    max_examples=examples(250), stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def gate(slots: int = 1, **limits: float) -> Gate:
    """A gate with one instance."""
    made = Gate("m", Limits(**{"max_queue": 1_000_000, **limits}), Tally(), set(), 0.0)  # type: ignore[arg-type]
    made.supply(model(instance(slots=slots)), CATALOG, True, 0.0)
    return made


def offer(target: Gate, n: int, now: float = 0.0, **words: object) -> Ticket:
    """A ticket that waits."""
    ticket = Ticket(("s", n), "m", now, **words)  # type: ignore[arg-type]
    assert target.offer(ticket, now) is None
    return ticket


def granted(target: Gate, now: float = 0.0) -> list[int]:
    """The numbers of those that are granted now."""
    decisions = target.decide(now)
    return [ticket.id[1] for ticket, _, _, _ in decisions.grants] if decisions else []


def test_a_caller_deadline_ends_a_ticket_before_the_queue_timeout() -> None:
    """The earlier of the caller's deadline and the queue timeout ends a waiting ticket."""
    target = gate(0 + 1, queue_timeout=10.0)
    offer(target, 1)
    assert granted(target) == [1]
    offer(target, 2, deadline=3.0)
    offer(target, 3)
    assert [(r.ticket.id[1], r.reason) for r in target.expire(3.0)] == [(2, Reason.DEADLINE_EXCEEDED)]
    assert target.expire(9.9) == []
    assert [(r.ticket.id[1], r.reason) for r in target.expire(10.0)] == [(3, Reason.QUEUE_TIMEOUT)]


def test_the_queue_timeout_stands_still_while_the_model_loads() -> None:
    """A ticket that waits for a load has its whole queue timeout left when the load is over."""
    target = Gate("m", Limits(queue_timeout=10.0), Tally(), set(), 0.0)
    starting = model(instance(state=InstanceState.STARTING), start_deadline=60.0)
    target.supply(starting, CATALOG, True, 0.0)
    offer(target, 1)
    assert target.expire(50.0) == []
    target.supply(model(instance(state=InstanceState.DRAINING)), CATALOG, True, 50.0)
    assert target.expire(59.9) == []
    assert [r.reason for r in target.expire(60.0)] == [Reason.QUEUE_TIMEOUT]


def test_the_start_deadline_bounds_the_wait_when_lifecycle_says_nothing() -> None:
    """One second after the start deadline the waiting are refused, even without a word of lifecycle."""
    target = Gate("m", Limits(queue_timeout=300.0), Tally(), set(), 0.0)
    target.supply(model(start_deadline=60.0), CATALOG, True, 0.0)
    offer(target, 1)
    assert target.expire(60.9) == []
    assert [r.reason for r in target.expire(61.0)] == [Reason.QUEUE_TIMEOUT]
    offer(target, 2, now=61.0)
    assert target.expire(62.0) == []


def test_a_refusing_supply_refuses_waiting_and_new_tickets_with_its_words() -> None:
    """A model that can't be had refuses everybody at once, but not those who know a newer catalogue."""
    target = gate(1)
    offer(target, 1)
    assert granted(target) == [1]
    offer(target, 2)
    newer = offer(target, 3, catalog=(1, 9))
    target.supply(model(instance(), reason=Reason.MODEL_FAILED), CATALOG, True, 1.0)
    decisions = target.decide(1.0)
    assert decisions is not None
    assert [(r.ticket.id[1], r.message) for r in decisions.refusals] == [(2, "words")]
    assert 3.0 <= decisions.refusals[0].retry_after <= 3.6  # spread, so that not all come back at once
    refusal = target.offer(Ticket(("s", 4), "m", 1.0), 1.0)
    assert refusal is not None
    assert refusal.reason is Reason.MODEL_FAILED
    assert newer.phase is Phase.WAITING


def test_affinity_prefers_the_same_instance_while_it_has_room() -> None:
    """Equal affinities meet on one instance, unless it is full."""
    target = Gate("m", Limits(), Tally(), set(), 0.0)
    target.supply(model(instance("i1", 2), instance("i2", 5)), CATALOG, True, 0.0)
    first = offer(target, 1, affinity="x")
    granted(target)
    target.supply(model(instance("i1", 9), instance("i2", 2)), CATALOG, True, 0.0)
    second, third = offer(target, 2, affinity="x"), offer(target, 3, affinity="x")
    granted(target)
    assert (first.instance_id, second.instance_id, third.instance_id) == ("i2", "i2", "i1")


def test_a_moved_ticket_goes_elsewhere_and_before_the_others() -> None:
    """A move puts the ticket at the head, not onto the instance that failed while another one may come."""
    target = Gate("m", Limits(), Tally(), set(), 0.0)
    target.supply(model(instance("i1", 1), instance("i2", 1)), CATALOG, True, 0.0)
    first, second = offer(target, 1), offer(target, 2)
    granted(target)
    offer(target, 3)
    target.move(first, first.instance_id, Outcome.CONNECT_FAILED, 1, 1.0)
    assert granted(target, 1.0) == []
    target.done(second, Outcome.OK, 2.0)
    assert granted(target, 2.0) == [1]
    assert first.instance_id == "i2"


def test_a_failed_instance_is_used_again_when_there_is_no_other() -> None:
    """Alone, an excluded instance gets its ticket back, once supply confirms it or 5 s have passed."""
    target = gate(1)
    ticket = offer(target, 1)
    granted(target)
    target.move(ticket, "i1", Outcome.CONNECT_FAILED, 1, 0.0)
    assert granted(target, 4.9) == []
    assert granted(target, 5.0) == [1]
    target.move(ticket, "i1", Outcome.CONNECT_FAILED, 2, 6.0)
    target.supply(model(instance()), CATALOG, True, 7.0)
    assert granted(target, 7.0) == [1]


def test_who_failed_on_an_instance_is_kept_away_from_it_for_the_time_he_asks_for() -> None:
    """Also when there is no other one and supply has confirmed it; it serves others meanwhile."""
    target = gate(1)
    ticket = offer(target, 1)
    granted(target)
    other = offer(target, 2)
    target.move(ticket, "i1", Outcome.CONNECT_FAILED, 1, 0.0, 1.5)
    target.supply(model(instance()), CATALOG, True, 0.5)
    assert granted(target, 0.5) == [2]
    target.done(other, Outcome.OK, 0.6)
    assert granted(target, 1.4) == []
    target.shift(1.0)
    assert granted(target, 2.4) == []
    assert granted(target, 2.5) == [1]


def test_an_illegal_step_raises_and_changes_nothing() -> None:
    """A ticket that has ended can't come back."""
    ticket = Ticket(("s", 1), "m", 0.0)
    ticket.become(Phase.ENDED)
    with pytest.raises(IllegalTransitionError):
        ticket.become(Phase.LEASED)
    assert ticket.phase is Phase.ENDED


def test_the_ends_of_leases_are_told_apart() -> None:
    """Each way to end a lease is counted under its own name."""
    target = gate(9)
    kinds = [LeaseEnd.EXPIRED, LeaseEnd.REVOKED, LeaseEnd.RECLAIMED]
    tickets = [offer(target, n) for n in range(4)]
    granted(target)
    for ticket, kind in zip(tickets, kinds, strict=False):
        target.end(ticket, kind, TicketEnd.CANCELLED, 0.0)
    target.done(tickets[3], Outcome.OK, 1.0)
    expected = dict.fromkeys([*kinds, LeaseEnd.RELEASED], 1) | {LeaseEnd.INSTANCE_LOST: 0}
    assert target.tally.lease_ends == expected
    assert target.active == 0


def test_a_grant_costs_the_same_however_many_wait() -> None:
    """Grants out of 50,000 tickets, half of them cancelled, take at most a few times those out of 100."""

    def cost(waiting: int) -> float:
        target = gate(1)
        tickets = [offer(target, n, deadline=math.inf if n % 3 else 1e9) for n in range(waiting)]
        for ticket in tickets[1::2]:
            target.done(ticket, Outcome.CLIENT_GONE, 0.0)
        gc.collect()
        gc.disable()  # a look at 50,000 tickets and all that other tests left is no cost of a grant
        begun = time.perf_counter()
        held = tickets[0]
        for _ in range(40):
            decisions = target.decide(0.0)
            assert decisions
            held = decisions.grants[0][0]
            target.done(held, Outcome.OK, 0.0)
        took = time.perf_counter() - begun
        gc.enable()
        return took

    assert min(cost(50_000) for _ in range(2)) < 20 * min(cost(100) for _ in range(5)) + 0.01


def test_equal_arrivals_are_served_in_the_order_in_which_they_were_taken_in() -> None:
    """A ticket that waits for a newer catalogue isn't passed by one that arrived at the same moment."""
    gate = Gate("m", Limits(3, 6, 30.0), Tally(), set(), 100.0)
    first, second = (Ticket(("a", n), "m", 100.0, catalog=CATALOG if n == 1 else (0, 0)) for n in (1, 2))
    gate.offer(first, 100.0)
    gate.restate_waiting(second, 100.0)
    gate.supply(model(instance("i1", slots=1)), CATALOG, True, 100.0)
    decisions = gate.decide(100.0)
    assert decisions is not None
    assert [grant[0] for grant in decisions.grants] == [first]
