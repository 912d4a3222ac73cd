"""Fair shares at the gate, in virtual time: bands with aging, tenants by weight, displacement, estimates."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.admission.support import Desk, instance, model
from tidegate_admission import estimate
from tidegate_admission.fairness import MAX_IDLE, TenantRule, Tenants
from tidegate_admission.gate import Gate
from tidegate_admission.limits import Limits
from tidegate_admission.link import to_wire
from tidegate_admission.progress import FlowProgress
from tidegate_admission.tally import GUESS, Tally
from tidegate_admission.ticket import Band, Outcome, Phase, Reason, Ticket

CATALOG = (1, 5)
ANY_BAND = Tenants(TenantRule(top=Band.HIGH))


@dataclass
class Clock:
    """A gate with a clock of its own: leases end by themselves after the service time of their tenant."""

    slots: int = 1
    limits: Limits = field(default_factory=lambda: Limits(1000, 200, 1e6, 60.0, ANY_BAND))
    service: dict[str, float] = field(default_factory=dict)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.gate = Gate("m", self.limits, Tally(), set(), self.now)
        self.gate.supply(model(instance(slots=self.slots)), CATALOG, True, self.now)
        self.ends: list[tuple[float, int, Ticket]] = []
        self.coming: list[tuple[float, int, Ticket]] = []
        self.granted: list[Ticket] = []
        self.refused: list[Ticket] = []
        self.n = 0

    def offer(self, tenant: str, band: int = Band.NORMAL, at: float | None = None) -> Ticket:
        """A ticket comes, now or at a later moment."""
        self.n += 1
        when = self.now if at is None else at
        ticket = Ticket(("s", self.n), "m", when, tenant, band)
        heapq.heappush(self.coming, (when, self.n, ticket))
        if at is None:
            self.run(self.now)
        return ticket

    def run(self, until: float) -> None:
        """Time passes: what comes and ends by then does, and the gate decides after each."""
        second = int(self.now) + 1.0
        while (when := min(self._times(second))) <= until:
            self.now = when
            while self.ends and self.ends[0][0] <= when:
                self.gate.done(heapq.heappop(self.ends)[2], Outcome.OK, when)
            while self.coming and self.coming[0][0] <= when:
                refusal = self.gate.offer(heapq.heappop(self.coming)[2], when)
                self.refused += [refusal.ticket] if refusal else []
                self._decide()
            if when == second:
                self.gate.sample(when)
                second += 1.0
            self._decide()
        self.now = max(self.now, until)

    def _times(self, second: float) -> Iterator[float]:
        yield second
        yield from (heap[0][0] for heap in (self.ends, self.coming) if heap)

    def _decide(self) -> None:
        decisions = self.gate.decide(self.now)
        for ticket, *_ in decisions.grants if decisions else ():
            self.granted.append(ticket)
            end = self.now + self.service.get(ticket.tenant, 1.0)
            heapq.heappush(self.ends, (end, ticket.id[1], ticket))

    def tenants(self, since: int = 0) -> list[str]:
        """Who was granted, in order."""
        return [ticket.tenant for ticket in self.granted[since:]]


def rules(**weights: int) -> Limits:
    """Limits with weighted tenants."""
    named = {name: TenantRule(weight, Band.HIGH) for name, weight in weights.items()}
    return Limits(1000, 100_000, 1e6, 60.0, Tenants(TenantRule(top=Band.HIGH), named))


def test_slots_are_shared_by_weight() -> None:
    """With weights 1 and 3, backlogged tenants get slot-seconds 1 : 3, whatever their requests' lengths."""
    clock = Clock(4, rules(small=1, big=3), {"small": 2.0, "big": 0.5})
    for _ in range(4000):
        clock.offer("small", at=0.0)
        clock.offer("big", at=0.0)
    clock.run(400.0)
    seconds = {name: clock.service[name] * count for name, count in Counter(clock.tenants()).items()}
    assert seconds["big"] / seconds["small"] == pytest.approx(3.0, rel=0.05)


def test_a_flood_neither_refuses_nor_delays_the_others() -> None:
    """1000 at once of one tenant: none of nine others, who together ask half the slots, is refused, and
    they wait for no more than a few service times."""
    clock = Clock(8, service=dict.fromkeys([f"t{i}" for i in range(9)] + ["flood"], 0.1))
    chance = random.Random(7)
    calm = [
        clock.offer(f"t{i}", at=at + chance.random() * 0.2)
        for i in range(9)
        for at in [step * 9 / 40 for step in range(80)]
    ]
    for _ in range(1000):
        clock.offer("flood", at=3.0)
    clock.run(40.0)
    assert {ticket.tenant for ticket in clock.refused} == {"flood"}
    waits = sorted(ticket.granted - ticket.arrived for ticket in calm)
    assert len(waits) == len(calm)
    assert waits[int(len(waits) * 0.99)] <= 0.1
    assert waits[-1] <= 0.3
    assert 200 <= clock.tenants().count("flood") <= 220
    assert not clock.gate.waiting
    assert clock.gate.tally.waiting == 0


def test_a_higher_band_goes_first_and_a_low_one_is_never_starved() -> None:
    """Under an endless load of high tickets, a low one is served soon after it has risen two bands."""
    clock = Clock(1)
    for second in range(400):
        clock.offer("busy", Band.HIGH, at=second * 0.9)
    low = clock.offer("poor", Band.LOW, at=10.5)
    same = clock.offer("busy", Band.LOW, at=10.5)
    normal = clock.offer("plain", at=20.5)
    clock.run(300.0)
    assert 120.0 <= low.granted - low.arrived <= 124.0
    assert 120.0 <= same.granted - same.arrived <= 184.0
    assert 60.0 <= normal.granted - normal.arrived <= 64.0


def test_a_flood_older_than_the_aging_passes_nobody() -> None:
    """Aging raises a band, not the flow that waits: those who keep to their share aren't passed over."""
    clock = Clock(1)
    for _ in range(150):
        clock.offer("flood", at=0.0)
    calm = [clock.offer("calm", at=100.5 + 3 * i) for i in range(10)]
    clock.run(140.0)
    assert max(ticket.granted - ticket.arrived for ticket in calm) <= 1.5


def test_aging_raises_no_further_than_its_time() -> None:
    """A low ticket that has waited for one `aging` is served like a normal one, not like a high one."""
    clock = Clock(1, service={"block": 70.0})
    clock.offer("block")
    low, normal = clock.offer("a", Band.LOW), clock.offer("b", Band.NORMAL, at=65.0)
    high = clock.offer("c", Band.HIGH, at=69.0)
    clock.run(80.0)
    assert [one.granted for one in (high, low, normal)] == [70.0, 71.0, 72.0]


def test_an_idle_tenant_comes_back_at_the_minimum() -> None:
    """Idleness earns no credit: after a long rest a tenant shares evenly, it doesn't catch up."""
    clock = Clock(1)
    for _ in range(100):
        clock.offer("busy", at=0.0)
    clock.run(50.5)
    before = len(clock.granted)
    for _ in range(20):
        clock.offer("back", at=50.5)
    clock.run(61.0)
    assert abs(2 * clock.tenants(before).count("back") - len(clock.tenants(before))) <= 1
    clock.run(500.0)
    again = len(clock.granted)
    for _ in range(10):
        clock.offer("new", at=500.0)
        clock.offer("back", at=500.0)
    clock.run(510.0)
    assert abs(Counter(clock.tenants(again))["new"] - 5) <= 1


def test_a_charge_is_corrected_at_the_release_and_while_it_runs() -> None:
    """A lease costs its tenant what it was held for: less than the mean is given back, more is charged."""
    clock = Clock(2, service={"long": 30.0, "short": 0.25})
    clock.offer("short"), clock.offer("long")
    accounts = clock.gate.turns.accounts
    virtual = [accounts.find(name).virtual for name in ("short", "long")]  # type: ignore[union-attr]
    assert virtual == [GUESS, GUESS]
    clock.run(0.5)
    assert accounts.find("short").virtual == pytest.approx(0.25)  # type: ignore[union-attr]
    for _ in range(200):
        clock.offer("long", at=0.5)
        clock.offer("short", at=0.5)
    clock.run(10.5)
    assert accounts.find("long").virtual >= 10.0  # type: ignore[union-attr]
    assert Counter(clock.tenants())["long"] <= 2, "what still runs was charged too late"


def test_a_lease_that_is_lost_costs_what_it_was_held_for() -> None:
    """A move or an instance that goes gives the rest of the charge back; a restated lease costs from now."""
    clock = Clock(2)
    ticket = clock.offer("a")
    clock.gate.move(ticket, "", Outcome.CONNECT_FAILED, 1, 0.1)
    account = clock.gate.turns.accounts.find("a")
    assert account is not None
    assert account.virtual == pytest.approx(0.1)
    clock.gate.restate_held(Ticket(("s", 99), "m", -50.0, "a"), "i1", 0.1)
    clock.gate.supply(model(), CATALOG, True, 0.6)
    assert account.virtual == pytest.approx(0.6)


def test_means_survive_idleness_and_made_up_names_are_forgotten() -> None:
    """A gate that comes back charges what it has learned; few names without tickets are kept."""
    clock = Clock(1, service={"slow": 9.0})
    clock.offer("slow")
    clock.run(20.0)
    fresh = Gate("m", clock.limits, clock.gate.tally, set(), clock.now)
    assert fresh.tally.length("slow") == 9.0
    assert fresh.tally.length("never seen") == fresh.tally.service_mean == 9.0
    for i in range(3 * MAX_IDLE):
        clock.offer(f"made-up-{i}", at=clock.now + i)
    clock.run(clock.now + 3 * MAX_IDLE + 10)
    assert len(clock.gate.tally.means) <= MAX_IDLE
    assert clock.gate.turns.accounts.find("made-up-0") is None
    assert not clock.gate.turns.accounts.active


def full(max_queue: int = 4, **weights: int) -> Clock:
    """A gate whose one slot is taken for long."""
    named = {name: TenantRule(weight, Band.HIGH) for name, weight in weights.items()}
    limits = Limits(10, max_queue, 1e6, 60.0, Tenants(TenantRule(top=Band.HIGH), named))
    clock = Clock(1, limits, {"holder": 1e6})
    clock.offer("holder")
    return clock


def queue(clock: Clock, *what: tuple[str, int]) -> list[Ticket]:
    """Tickets that come one after another."""
    return [clock.offer(tenant, band) for tenant, band in what]


A, B = ("a", Band.NORMAL), ("b", Band.NORMAL)


def test_below_its_share_an_arrival_displaces_the_newest_of_the_flood() -> None:
    """The flood loses its newest tickets until the queue is shared; then the next one is refused itself."""
    clock = full()
    flood = queue(clock, A, A, A, A)
    late = queue(clock, B, B, B)
    assert clock.refused == [flood[3], flood[2], late[2]]
    (extra,) = queue(clock, A)
    assert clock.refused[-1] is extra
    assert set(clock.gate.waiting) == {one.id for one in [*flood[:2], *late[:2]]}


def test_the_share_of_the_queue_goes_by_weight() -> None:
    """A tenant of weight 3 may have three of four places."""
    clock = full(b=3)
    queue(clock, A, A, A, A)
    queue(clock, B, B, B, B)
    assert Counter(ticket.tenant for ticket in clock.gate.waiting.values()) == {"a": 1, "b": 3}


def test_a_higher_band_displaces_lower_ones_of_who_has_more_than_its_share() -> None:
    """It hits the lowest band first; a tenant that keeps to its share loses nothing."""
    clock = full()
    low, _, normal, _ = queue(clock, ("a", Band.LOW), A, A, ("b", Band.LOW))
    queue(clock, ("a", Band.HIGH))
    assert clock.refused == [low]
    queue(clock, ("a", Band.HIGH))
    assert clock.refused == [low, normal]
    (refused,) = queue(clock, A)
    assert clock.refused[-1] is refused
    queue(clock, ("b", Band.NORMAL))
    assert ("b", Band.LOW) in [(one.tenant, one.band) for one in clock.gate.waiting.values()]
    assert len(clock.gate.waiting) == 4


def test_a_moved_ticket_is_not_displaced() -> None:
    """Whose turn had come already keeps its place; the newest of the others goes."""
    clock = full(2)
    first, second = queue(clock, A, A)
    clock.gate.move(second, "elsewhere", Outcome.CONNECT_FAILED, 1, clock.now)
    queue(clock, B)
    assert clock.refused == [first]
    assert second.phase is Phase.WAITING


def test_a_displaced_ticket_is_told_to_its_own_session() -> None:
    """Displaced, a ticket is refused with QUEUE_FULL to whom it belongs, and the arrival takes its place."""
    desk = Desk(max_queue=2)
    desk.supply(model(instance(slots=1)))
    one, outbox = desk.open("one")
    two, other = desk.open("two")
    desk.acquire(one, 1, 2, 3, tenant="a")
    outbox.take()
    desk.acquire(two, 1, tenant="b")
    assert outbox.take("refuse") == [("refuse", 3, Reason.QUEUE_FULL)]
    assert other.take("refuse") == []
    assert (sorted(one.tickets), sorted(two.tickets)) == ([2], [1])
    desk.check()


def test_a_band_above_the_tenants_top_is_lowered() -> None:
    """By default nobody is above normal; the demand tells how many wait in each band."""
    desk = Desk()
    desk.supply(model())
    session, _ = desk.open()
    desk.acquire(session, 1, band=Band.HIGH)
    desk.acquire(session, 2, band=Band.LOW)
    desk.acquire(session, 3, band=77)
    demand = desk.dispatcher.demand(True, desk.now)
    assert list(to_wire(demand, 1).models[0].waiting_by_band) == [0, 1, 2]


def test_progress_follows_the_order_of_turns() -> None:
    """Behind a flood, a newcomer hears that it is near the head, not at the end of the queue."""
    desk = Desk()
    desk.supply(model(instance(slots=1)))
    flood, _ = desk.open("flood")
    other, outbox = desk.open("other")
    desk.acquire(flood, *range(1, 50), tenant="a")
    desk.acquire(other, 1, tenant="b", wants_progress=True)
    outbox.take()
    desk.wait(1.0)
    ((_, told),) = outbox.take("progress")
    assert isinstance(told, FlowProgress)
    assert (told.tenant, told.position, told.loading) == ("b", 2, False)


@pytest.mark.parametrize(
    ("eta", "chance", "seconds"),
    [
        (50.0, 0.0, 50.0),
        (50.0, 0.5, 55.0),
        (50.0, 1.0, 60.0),
        (0.0, 0.0, 5.0),
        (0.2, 1.0, 1.0),
        (999.0, 0.0, 120.0),
    ],
)
def test_retry_after_is_the_drain_time_or_a_little_later(eta: float, chance: float, seconds: float) -> None:
    """From 1 to 120 s, up to a fifth more at random, so that not all come back at once."""
    assert estimate.retry_after(eta, chance) == pytest.approx(seconds)


def test_a_grant_costs_the_same_however_many_tenants_wait() -> None:
    """With 10,000 tenants the flows are kept in order by heaps: dead items don't pile up."""
    clock = Clock(1, rules())
    for i in range(10_000):
        clock.offer(f"t{i}", at=0.0)
    clock.run(500.0)
    assert len(clock.granted) == 501
    order = clock.gate.turns._order
    assert all(len(heap) < 70_000 for heap in list(order._bands.values()))
    assert all(len(heap) < 70_000 for heap in order._ages.values())
