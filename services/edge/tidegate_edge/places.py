"""Where waiting tickets stand: admission tells of flows, each ticket's own place is made here. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_edge.ticket import Phase, Progress, Ticket


def place(tickets: Iterable[Ticket], told: Iterable[pb.Progress]) -> None:
    """Gives the waiting ones of a session, in the order of their numbers, their places.

    Within its flow a ticket comes behind those that were offered before it, and behind moved ones.
    """
    flows = {(flow.model, flow.tenant, int(band)): flow for flow in told for band in flow.bands}
    orders = dict.fromkeys((id(flow) for flow in flows.values()), 0)
    waiting = [ticket for ticket in tickets if ticket.phase is Phase.WAITING]
    for ticket in sorted(waiting, key=lambda one: not one.moves):
        flow = flows.get(ticket.flow)
        if flow is not None:
            ticket.progress = _progress(flow, orders[id(flow)])
            orders[id(flow)] += 1


def _progress(flow: pb.Progress, order: int) -> Progress:
    position = flow.position + round(order * max(1.0, flow.step))
    if flow.loading:
        return Progress(position, flow.ready_in_ms / 1000, True)
    return Progress(position, position / flow.drain_rate if flow.drain_rate else 0.0, False)
