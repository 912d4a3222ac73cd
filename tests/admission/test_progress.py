"""What waiting callers are told of their places: by flow on the wire, by ticket at the edge."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.admission.support import Desk, instance, model
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_admission import progress
from tidegate_admission.fairness import TenantRule, Tenants
from tidegate_admission.gate import Gate
from tidegate_admission.limits import Limits
from tidegate_admission.supply import ModelSupply
from tidegate_admission.tally import Tally
from tidegate_admission.ticket import Band, Outcome, Ticket
from tidegate_edge.places import place
from tidegate_edge.ticket import Phase as EdgePhase
from tidegate_edge.ticket import Ticket as EdgeTicket
from tidegate_edge.waiting import describe

RULES = Tenants(TenantRule(top=Band.HIGH), {"heavy": TenantRule(5, Band.HIGH), "low": TenantRule(1)})


def gate_of(*offers: tuple[str, str, int, int], slots: int = 1, max_queue: int = 100_000) -> Gate:
    """A gate whose one slot is taken, and the queue of (session, tenant, band, how many) offered in turn."""
    gate = Gate("m", Limits(50, max_queue, 1e9, 1e9, RULES), Tally(), set(), 0.0)
    gate.supply(model(instance(slots=slots)), (1, 1), True, 0.0)
    for n in range(slots):
        gate.offer(Ticket(("busy", n), "m", 0.0), 0.0)
    gate.decide(0.0)
    n = 0
    for session, tenant, band, count in offers:
        for _ in range(count):
            n += 1
            ticket = Ticket((session, n), "m", n / 1000, tenant, band, wants_progress=session != "quiet")
            gate.offer(ticket, n / 1000)
    return gate


def turns(gate: Gate) -> list[Ticket]:
    """The real order: every lease is held for exactly what it was charged."""
    found: list[Ticket] = []
    now = 1000.0
    while gate.waiting:
        for lease in [lease for slot in gate.slots.values() for lease in slot.leases.values()]:
            now = lease.granted + lease.charged
            gate.done(lease, Outcome.OK, now)
        decided = gate.decide(now)
        found += [ticket for ticket, *_ in decided.grants] if decided else []
    return found


OFFERS = st.lists(
    st.tuples(
        st.sampled_from(["one", "two", "quiet"]),
        st.sampled_from(["", "b", "heavy", "low"]),
        st.sampled_from(list(Band)),
        st.integers(1, 12),
    ),
    min_size=1,
    max_size=12,
)


@given(OFFERS)
def test_first_and_last_ticket_of_a_flow_stand_where_they_are_told_to(
    offers: list[tuple[str, str, int, int]],
) -> None:
    """For each session and flow that asked: the first one's position, and `step` × the rest, are the turns
    that really come; sessions that didn't ask hear nothing."""
    gate = gate_of(*offers)
    told = list(progress.of_gate(gate, 1000.0))
    flows: dict[tuple[str, str, int], list[int]] = {}
    for number, ticket in enumerate(turns(gate), 1):
        flows.setdefault((ticket.id[0], ticket.tenant, ticket.band), []).append(number)
    assert {(session, flow.tenant, max(flow.bands)) for session, flow in told} == {
        key for key in flows if key[0] != "quiet"
    }
    for session, flow in told:
        places = flows[session, flow.tenant, max(flow.bands)]
        assert flow.position == places[0]
        if len(places) > 1:
            assert flow.position + flow.step * (len(places) - 1) == pytest.approx(places[-1])


def test_bands_above_the_tenants_top_belong_to_its_flow() -> None:
    """The edge knows what its tickets asked for, not what they got: it is told which ones are meant."""
    gate = gate_of(("one", "low", Band.HIGH, 1), ("one", "low", Band.LOW, 1))
    told = {max(flow.bands): flow.bands for _, flow in progress.of_gate(gate, 1.0)}
    assert told == {Band.NORMAL: (Band.HIGH, Band.NORMAL), Band.LOW: (Band.LOW,)}


def test_what_is_told_grows_with_the_flows_and_not_with_the_tickets() -> None:
    """100 or 50,000 tickets: one message for each flow of a session, from a bounded look at the queue."""
    few = gate_of(*[("one", tenant, Band.NORMAL, 50) for tenant in "ab"])
    many = gate_of(*[("one", tenant, Band.NORMAL, 25_000) for tenant in "ab"])
    assert len(list(progress.of_gate(few, 100.0))) == len(list(progress.of_gate(many, 100.0))) == 2
    order, sure = progress.forecast(many, 100.0)
    assert len(order) <= progress.DEPTH
    assert sure >= len(order) - 2
    crowd = gate_of(*[("one", f"t{i}", Band.NORMAL, 3) for i in range(3000)])
    assert len(progress.forecast(crowd, 100.0)[0]) <= 2 * progress.DEPTH
    places = {flow.position for _, flow in progress.of_gate(crowd, 100.0)}
    assert places == set(range(1, progress.DEPTH + 1)), "the nearest are told of, and nobody else"


def test_a_flow_that_was_not_looked_at_to_its_end_does_not_make_others_look_near() -> None:
    """Of a heavy tenant's long queue only the first are looked at: the light one's steps are still right."""
    gate = gate_of(("one", "heavy", Band.NORMAL, 5000), ("one", "b", Band.NORMAL, 900))
    steps = {flow.tenant: flow.step for _, flow in progress.of_gate(gate, 1000.0)}
    assert steps["b"] == pytest.approx(6.0, rel=0.05)
    assert steps["heavy"] == pytest.approx(1.2, rel=0.05)


def test_progress_tells_the_pace_and_what_remains_of_a_load() -> None:
    """Once a second: places per second when it serves, seconds until it is up while it loads."""
    desk = Desk()
    desk.supply(ModelSupply("m", ready_in=20.0, start_deadline=600.0, under_way=True))
    session, outbox = desk.open()
    desk.acquire(session, 1, 2, wants_progress=True)
    desk.wait(1.0)
    desk.wait(0.5)
    ((_, flow),) = outbox.take("progress")
    assert isinstance(flow, progress.FlowProgress)
    assert (flow.ready_in, flow.loading, flow.drain_rate) == (19.0, True, 0.0)
    desk.supply(model(instance(slots=1)), n=2)
    desk.wait(2.0)
    desk.done(session, 1)
    desk.acquire(session, 3, wants_progress=True)
    outbox.take()
    desk.wait(1.0)
    ((_, flow),) = outbox.take("progress")
    assert isinstance(flow, progress.FlowProgress)
    assert (flow.ready_in, flow.loading) == (0.0, False)
    assert flow.drain_rate == pytest.approx(1 / desk.dispatcher.tallies["m"].service_mean)


class Said:
    """What a ticket of the edge tells its session."""

    def finish(self, *words: object) -> None:
        """Nothing."""

    def send_move(self, *words: object) -> None:
        """Nothing."""


def ticket_of(n: int, tenant: str = "", band: int = Band.NORMAL, model_name: str = "m") -> EdgeTicket:
    """A waiting ticket of an edge."""
    offer = pb.Acquire(n=n, model=model_name, tenant=tenant, band=band)  # type: ignore[arg-type]
    return EdgeTicket(Said(), offer, 0.0)


def flow_of(position: int, step: float = 1.0, tenant: str = "", **words: object) -> pb.Progress:
    """What the edge is told of a flow."""
    bands = [pb.BAND_HIGH, pb.BAND_NORMAL]
    told = pb.Progress(model="m", tenant=tenant, bands=bands, position=position, step=step)
    for name, value in words.items():
        setattr(told, name, value)
    return told


async def test_the_edge_makes_each_tickets_place_of_its_flow() -> None:
    """By the order of its own tickets within the flow, moved ones first; others keep what they knew."""
    mine = [ticket_of(n) for n in (1, 2, 3)]
    raised, named = ticket_of(4, band=Band.HIGH), ticket_of(5, tenant="default")
    other, lower = ticket_of(6, tenant="b"), ticket_of(7, band=Band.LOW)
    mine[2].moves = 1
    mine[1].phase = EdgePhase.HELD
    place([*mine, raised, named, other, lower], [flow_of(4, 2.5, drain_rate=2.0), flow_of(9, tenant="b")])
    found = [ticket.progress.position if ticket.progress else 0 for ticket in [*mine, raised, named, other]]
    assert found == [6, 0, 4, 9, 12, 9]
    assert lower.progress is None
    assert mine[0].progress is not None
    assert mine[0].progress.eta == 3.0
    assert other.progress is not None
    assert other.progress.eta == 0.0, "no pace is known"
    assert describe("m", mine[0].progress) == "queued 6, about 3 s"
    assert describe("m", other.progress) == "queued 9"


async def test_while_the_model_loads_the_edge_tells_when_it_is_up() -> None:
    """And says no time when nobody knows it."""
    ticket = ticket_of(1)
    place([ticket], [flow_of(1, loading=True, ready_in_ms=12_400, drain_rate=0.1)])
    assert describe("m", ticket.progress) == "loading m, about 12 s"
    place([ticket], [flow_of(1, loading=True)])
    assert describe("m", ticket.progress) == "loading m"
