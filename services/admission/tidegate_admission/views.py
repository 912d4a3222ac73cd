"""What people may see of admission: snapshots, and the conservation check. Nothing here changes anything."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate_admission.books import UNKNOWN_MODELS
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.fairness import DEFAULT_TENANT
from tidegate_admission.gate import Gate
from tidegate_admission.rates import Rates, RateState
from tidegate_admission.session import Session
from tidegate_admission.tally import Tally
from tidegate_admission.ticket import QueueView, Ticket


@dataclass(frozen=True, slots=True)
class SessionView:
    """One session."""

    id: str
    holder: str
    connected: bool
    silent: float
    """Seconds since it was last heard."""
    waiting: int
    active: int


@dataclass(frozen=True, slots=True)
class SlotView:
    """One instance."""

    id: str
    active: int
    slots: int
    effective: int
    held_back: str


@dataclass(frozen=True, slots=True)
class GateView:
    """One model."""

    model: str
    queue: QueueView
    oldest_wait: float
    instances: tuple[SlotView, ...]
    tally: Tally


def queues(dispatcher: Dispatcher, now: float) -> list[GateView]:
    """Every model that has an instance, a ticket or a lease."""
    return [_gate_view(gate, now) for _, gate in sorted(dispatcher.gates.items())]


def sessions(dispatcher: Dispatcher, now: float) -> list[SessionView]:
    """Every session."""
    return [
        SessionView(
            session.id,
            session.holder,
            session.outbox is not None,
            max(0.0, now - session.heard),
            len(session.tickets),
            len(session.leases),
        )
        for session in dispatcher.sessions.values()
    ]


def leases(dispatcher: Dispatcher, model: str = "", session_id: str = "") -> list[tuple[Session, Ticket]]:
    """All leases, of one model or one session when these are given; oldest first."""
    found = [
        (session, ticket)
        for session in dispatcher.sessions.values()
        if session_id in ("", session.id)
        for ticket in session.leases.values()
        if model in ("", ticket.model)
    ]
    return sorted(found, key=lambda pair: pair[1].granted)


def conservation_error(dispatcher: Dispatcher) -> int:
    """0, or how far the records, the gates' sets and the sessions' sets are apart: a bug.

    Per model: granted + restated − Σ lease ends == leases, taken in − Σ ticket ends == tickets. Over all: the
    gates hold as many leases and tickets as the sessions, and all that is reserved of rates is one of these.
    """
    error = 0
    for model, tally in dispatcher.tallies.items():
        gate = dispatcher.gates.get(model) if model != UNKNOWN_MODELS else None
        error += abs(tally.active - (gate.active if gate else 0))
        error += abs(tally.waiting - (len(gate.waiting) if gate else 0))
    if dispatcher.books.rates is not None:
        error += _reservations_error(dispatcher, dispatcher.books.rates)
    gates, all_sessions = dispatcher.gates.values(), dispatcher.sessions.values()
    error += abs(sum(gate.active for gate in gates) - sum(len(one.leases) for one in all_sessions))
    error += abs(sum(len(gate.waiting) for gate in gates) - sum(len(one.tickets) for one in all_sessions))
    return error


def tenants(dispatcher: Dispatcher, now: float) -> list[tuple[str, RateState]]:
    """What is left of the rates that are configured, by tenant."""
    rates = dispatcher.books.rates
    meters = rates.configured if rates is not None else {}
    return sorted((name or DEFAULT_TENANT, meter.state(now)) for name, meter in meters.items())


def _reservations_error(dispatcher: Dispatcher, rates: Rates) -> int:
    """Tickets and leases that think to have a reservation and have none, or the other way round."""
    known = [
        ticket
        for session in dispatcher.sessions.values()
        for book in (session.tickets, session.leases)
        for ticket in book.values()
        if ticket.meter is not None
    ]
    wrong = sum(ticket.meter is None or ticket.id not in ticket.meter.held for ticket in known)
    return wrong + abs(len(known) - sum(len(meter.held) for meter in rates.meters()))


def _gate_view(gate: Gate, now: float) -> GateView:
    slots = tuple(
        SlotView(
            slot.id,
            len(slot.leases),
            slot.slots,
            slot.effective(now, gate.guarded),
            slot.held_back(now, gate.guarded),
        )
        for slot in gate.slots.values()
    )
    oldest = now - min(gate.turns.oldest(), now)
    return GateView(gate.model, gate.view(), oldest, slots, gate.tally)
