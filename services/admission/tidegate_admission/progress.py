"""How each flow of a gate is getting on, for the sessions whose callers asked. Pure.

What is told grows with the flows, not with the tickets: where a session's first ticket of a flow stands, and
how many places its next ones are apart. The session knows the order of its own tickets.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tidegate_admission.gate import Gate
from tidegate_admission.ticket import Band, Ticket

DEPTH = 1000
"""Tickets that are looked at, spread over the flows; and flows that are told of, nearest to their turns."""
_LEAST = 2
"""Tickets of each flow that are looked at, however many flows there are."""

_Turn = tuple[int, float, bool, float, int]
"""(band it is raised to, virtual time, not moved, arrival, order): turns come in this order."""


@dataclass(frozen=True, slots=True)
class FlowProgress:
    """What one session is told of one flow."""

    model: str
    tenant: str
    """Empty = `default`."""
    bands: tuple[int, ...]
    """What its tickets may have asked for: the flow's band, and those above that the tenant may not have."""
    position: int
    """Place of the session's first ticket of this flow among all that wait for the model, from 1."""
    step: float
    """Places from one of the session's tickets of this flow to the next, on average; at least 1."""
    drain_rate: float
    """Places by which all move up per second; 0 = unknown."""
    ready_in: float | None
    """Seconds until the model is up; 0 = it is; None = unknown."""
    loading: bool
    """No server is up, so nobody moves up."""


def of_gate(gate: Gate, now: float) -> Iterator[tuple[str, FlowProgress]]:
    """What each session is told that has asked: (session, one of its flows)."""
    order, sure = forecast(gate, now)
    places: dict[tuple[str, str, int], list[int]] = {}
    asked: set[tuple[str, str, int]] = set()
    for place, ticket in enumerate(order, 1):
        key = (ticket.id[0], ticket.tenant, ticket.band)
        if ticket.wants_progress:
            asked.add(key)
        known = places.setdefault(key, [place])
        if known[-1] < place <= sure:
            known.append(place)
    outlook = gate.outlook
    rate, ready_in, loading = outlook.drain_rate(now), outlook.ready_in(now), outlook.loading
    for key in sorted(asked):
        session_id, tenant, band = key
        first, *_, last = [places[key][0], *places[key]]
        bands = tuple(int(one) for one in Band if gate.tenants.band(tenant, one) == band)
        step = max(1.0, (last - first) / max(1, len(places[key]) - 1))
        yield session_id, FlowProgress(gate.model, tenant, bands, first, step, rate, ready_in, loading)


def forecast(gate: Gate, now: float) -> tuple[list[Ticket], int]:
    """The first tickets of all flows in the order in which they would have their turns if nobody else came,
    and how many places of it are sure: behind these a flow was not looked at to its end.

    By the rule of turns: bands raised by their oldest head, then the tenants' virtual times, which each turn
    raises by the tenant's mean service time ÷ weight.
    """
    accounts = gate.turns.accounts.active.values()
    flows = [flow for account in accounts for flow in account.flows.values() if flow.tickets]
    if len(flows) > DEPTH:
        flows = heapq.nsmallest(DEPTH, flows, key=lambda flow: (flow.band, flow.account.virtual))
    depth = max(_LEAST, DEPTH // max(1, len(flows)))
    fronts = {flow: list(itertools.islice(flow.tickets.values(), depth)) for flow in flows}
    levels = _levels(gate, fronts.values(), now)
    turns: list[tuple[_Turn, Ticket]] = []
    unseen: list[_Turn] = []
    for account in accounts:
        own = [flow for flow in account.flows.values() if flow in fronts]
        heads = sorted(
            ((levels[flow.band], not ticket.moves, ticket.arrived, ticket.order), ticket)
            for flow in own
            for ticket in fronts[flow]
        )
        virtual, length = account.virtual, gate.tally.length(account.name) / account.weight
        last: dict[int, _Turn] = {}
        for (level, *_), ticket in heads:
            turn = (level, virtual, not ticket.moves, ticket.arrived, ticket.order)
            last[ticket.band] = turn
            turns.append((turn, ticket))
            virtual += length
        unseen += [last[flow.band] for flow in own if len(fronts[flow]) < len(flow.tickets)]
    turns.sort()
    first = min(unseen, default=None)
    sure = len(turns) if first is None else bisect.bisect_right(turns, first, key=lambda pair: pair[0])
    return [ticket for _, ticket in turns], sure


def _levels(gate: Gate, fronts: Iterable[list[Ticket]], now: float) -> dict[int, int]:
    """To which band each band is raised by the oldest of its heads."""
    oldest: dict[int, float] = {}
    for first, *_ in fronts:
        oldest[first.band] = min(oldest.get(first.band, now), first.arrived)
    return {band: gate.turns.level(band, arrived, now) for band, arrived in oldest.items()}
