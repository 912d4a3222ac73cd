"""The books: gates, sessions, the view of supply, and the steps that verbs, statements and reports share.

Synchronous, and without a clock. The dispatcher is the only one who calls in here, from one loop.
"""

from __future__ import annotations

from collections.abc import Callable

from tidegate_admission.gate import Gate
from tidegate_admission.limits import Limits
from tidegate_admission.rates import Rates
from tidegate_admission.session import Session
from tidegate_admission.supply import ModelSupply, SupplyBook
from tidegate_admission.tally import Tally
from tidegate_admission.ticket import (
    Generation,
    LeaseEnd,
    Loss,
    Phase,
    Reason,
    Refusal,
    Ticket,
    TicketEnd,
)
from tidegate_admission.window import RestartWindow

UNKNOWN_MODELS = ""
"""The tally of models that are in no catalogue; one for all, so that made-up names can't fill the memory."""
_ANY_CATALOG: Generation = (1 << 64, 0)


class Books:
    """All that admission knows."""

    def __init__(self, limits: Limits, lease_ttl: float, now: float, chance: Callable[[], float]) -> None:
        """`chance`: as in `Gate`."""
        self.limits, self.lease_ttl = limits, lease_ttl
        self.window = RestartWindow(now, lease_ttl)
        self.supply = SupplyBook()
        self.gates: dict[str, Gate] = {}
        self.sessions: dict[str, Session] = {}
        self.rates = Rates(limits.tenants, now) if limits.tenants.rated else None
        """None: no tenant has a rate."""
        self.tallies: dict[str, Tally] = {UNKNOWN_MODELS: Tally()}
        self.silent: set[str] = set()
        """Sessions that get no grants."""
        self.dirty: dict[str, bool] = {}
        """Gates that may have something to decide; true: they have changed, as demand goes."""
        self.urgent = False
        """Lifecycle should be told at once."""
        self.news = False
        """Lifecycle should be told soon."""
        self.no_supply = False
        """Lifecycle was waited for long enough: without it, tickets are refused."""
        self.unknown_ids = 0
        self.expired_sessions = 0
        self.on_wait_end: Callable[[Ticket, float, str], None] | None = None
        """A traced ticket has waited so many seconds and was granted (reason "") or refused."""
        self._chance = chance

    def gate(self, model: str, now: float) -> Gate:
        """The gate of a model; made when it is first asked for."""
        gate = self.gates.get(model)
        if gate is None:
            tally = self.tallies.setdefault(model, Tally())
            gate = self.gates[model] = Gate(
                model, self.limits, tally, self.silent, now, self._chance, self.rates
            )
            gate.guarded = not self.window.over
            self.supply_gate(gate, now)
        return gate

    def supply_gate(self, gate: Gate, now: float) -> None:
        """Tells a gate what supply says of its model now."""
        item, catalog = self.supply.view.get(gate.model), self.supply.catalog
        if self.no_supply:
            words = "the lifecycle service can't be reached"
            item = ModelSupply(gate.model, reason=Reason.UNAVAILABLE, message=words, retry_after=5.0)
            catalog = _ANY_CATALOG
        self.dirty.setdefault(gate.model, False)
        for loss in gate.supply(item, catalog, self.supply.settled, now):
            self.lost(loss)
            self.dirty[gate.model] = True

    def drop(self, gate: Gate) -> None:
        """Lets go of a gate in which nothing is left."""
        del self.gates[gate.model]
        if gate.model not in self.supply.view:
            self.tallies[UNKNOWN_MODELS].take_over(self.tallies.pop(gate.model))

    def decide(self, gate: Gate, now: float) -> bool:
        """Carries out what a gate decides; false when that is nothing."""
        decisions = gate.decide(now)
        if decisions is None:
            return False
        max_concurrent, max_queue = gate.max_concurrent, gate.max_queue
        for ticket, address, waiting, active in decisions.grants:
            session_id, n = ticket.id
            session = self.sessions[session_id]
            del session.tickets[n]
            session.leases[n] = ticket
            outbox = session.outbox
            assert outbox is not None  # a session without a stream is silent, and gets no grants
            ticket.sent = outbox.seq
            outbox.grant(ticket, address, waiting, active, max_concurrent, max_queue)
            if ticket.trace_parent and self.on_wait_end is not None:
                self.on_wait_end(ticket, now - ticket.arrived, "")
        for refusal in decisions.refusals:
            self.refused(refusal, now)
        return True

    def tell_grant(self, session: Session, ticket: Ticket) -> None:
        """Tells a session again what a lease is on."""
        gate = self.gates[ticket.model]
        view = gate.view()
        if session.outbox is not None:
            ticket.sent = session.outbox.seq
            address = gate.slots[ticket.instance_id].address
            session.outbox.grant(
                ticket, address, view.waiting, view.active, view.max_concurrent, view.max_queue
            )

    def refused(self, refusal: Refusal, now: float) -> None:
        """Tells that a ticket has ended without a lease."""
        ticket = refusal.ticket
        if ticket.meter is not None:
            ticket.meter.refund(ticket)
        session = self.sessions[ticket.id[0]]
        session.tickets.pop(ticket.id[1], None)
        if session.outbox is not None:
            session.outbox.refuse(refusal)
        if ticket.trace_parent and self.on_wait_end is not None:
            self.on_wait_end(ticket, now - ticket.arrived, refusal.reason.name)

    def lost(self, loss: Loss) -> None:
        """Tells that a lease has ended, not by its session."""
        if loss.ticket.meter is not None:
            loss.ticket.meter.lost(loss.ticket)
        session = self.sessions[loss.ticket.id[0]]
        session.leases.pop(loss.ticket.id[1], None)
        if session.outbox is not None:
            session.outbox.lost(loss.ticket.id[1], loss.reason)

    def move(
        self,
        session: Session,
        n: int,
        not_instance: str,
        outcome: int,
        moves: int,
        now: float,
        delay: float = 0.0,
    ) -> None:
        """Gives a lease back and queues its ticket again, away from an instance."""
        ticket = session.leases.pop(n, None) or session.tickets.get(n)
        if ticket is None:
            self.unknown_ids += 1
            return
        self.gates[ticket.model].move(ticket, not_instance, outcome, moves, now, delay)
        session.tickets[n] = ticket
        self.dirty[ticket.model] = True

    def end(self, session: Session, ticket: Ticket, lease: LeaseEnd, waiting: TicketEnd, now: float) -> None:
        """Ends a ticket or a lease for a reason that its session didn't give."""
        leased, meter = ticket.phase is Phase.LEASED, ticket.meter
        if meter is not None:
            (meter.lost if leased else meter.refund)(ticket)
        (session.leases if leased else session.tickets).pop(ticket.id[1])
        self.gates[ticket.model].end(ticket, lease, waiting, now)
        self.dirty[ticket.model] = True

    def end_session(self, session: Session, lease: LeaseEnd, waiting: TicketEnd, now: float) -> None:
        """Ends all that a session has."""
        for ticket in [*session.leases.values(), *session.tickets.values()]:
            self.end(session, ticket, lease, waiting, now)

    def forget(self, session: Session) -> None:
        """Lets go of a session in which nothing is left."""
        del self.sessions[session.id]
        self.silent.discard(session.id)
        self.urgent |= session.rostered
