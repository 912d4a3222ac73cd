"""The span `admission.wait`: made when the wait is over, because holding one costs more than a ticket."""

from __future__ import annotations

import time

from tidegate_admission.ticket import Ticket
from tidegate_chassis import telemetry


def report(ticket: Ticket, waited: float, refusal: str) -> None:
    """Sends the span of a wait of `waited` seconds; `refusal` is the reason's name, or empty: granted."""
    if telemetry.dropped(ticket.trace_parent):
        return
    end = time.time_ns()
    span = telemetry.start_span(
        "admission.wait",
        ticket.trace_parent,
        start_ns=end - int(waited * 1e9),
        attributes={
            "tidegate.model": ticket.model,
            "tidegate.waited_seconds": waited,
            "tidegate.queue_position": ticket.position,
            "tidegate.outcome": refusal.lower() or "granted",
            "tidegate.instance": ticket.instance_id,
        },
    )
    if refusal:
        telemetry.fail_span(span, refusal)
    span.end(end)
