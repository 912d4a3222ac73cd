"""The one writer: verbs of sessions, what they state, supply and time come in here, one after another.

Synchronous, and without a clock: the streams, the link to lifecycle and the timer call its handlers with the
time, on one loop. What they work on are the books. Each handler ends with `settle`, which lets the gates
decide and puts the answers into the sessions' outboxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tidegate_admission import progress
from tidegate_admission.books import Books
from tidegate_admission.demand import Demand, ModelDemand, of_gate
from tidegate_admission.gate import Gate
from tidegate_admission.limits import Limits
from tidegate_admission.rates import Used
from tidegate_admission.session import Held, Hello, Outbox, Session
from tidegate_admission.statements import Statements
from tidegate_admission.supply import ModelSupply, Supply
from tidegate_admission.ticket import NO_GENERATION, Id, LeaseEnd, Phase, Ticket, TicketEnd

NO_SUPPLY_AFTER = 10.0
"""Seconds after start in which lifecycle is waited for; later, without it, tickets are refused."""
UNKNOWN = Used()
"""It isn't known how many tokens were used."""


class Dispatcher:
    """See the module. The shell sets `on_demand`."""

    def __init__(
        self, limits: Limits, lease_ttl: float, now: float, chance: Callable[[], float] = lambda: 0.5
    ) -> None:
        """`chance`: as in `Gate`."""
        self.started, self.lease_ttl = now, lease_ttl
        self.books = Books(limits, lease_ttl, now, chance)
        self.gates, self.sessions, self.tallies = self.books.gates, self.books.sessions, self.books.tallies
        self.linked = False
        """Lifecycle is connected."""
        self.on_demand: Callable[[bool], None] = _nothing
        """Lifecycle should be told something; true: at once."""
        self._statements = Statements(self.books)
        self._untold: set[str] = set()
        """Models whose demand has changed since the last report."""
        self._sampled = now

    # --- verbs -----------------------------------------------------------------------------------------

    def acquire(self, session: Session, ticket: Ticket, now: float) -> None:
        """Queues a ticket. One that waits already keeps its place and the later of both deadlines; a lease is
        answered with the same grant."""
        books, n = self.books, ticket.id[1]
        if n in session.tickets:
            known = session.tickets[n]
            known.deadline = max(known.deadline, ticket.deadline)
            return
        if n in session.leases:
            books.tell_grant(session, session.leases[n])
            return
        if not session.rostered:
            session.rostered = True
            books.urgent = True
        gate = books.gate(ticket.model, now)
        if gate.full():
            books.decide(gate, now)
        refusal = gate.offer(ticket, now)
        books.dirty[gate.model] = True
        if refusal is None or refusal.ticket is not ticket:
            session.tickets[n] = ticket
        if refusal is not None:
            books.refused(refusal, now)

    def done(self, session: Session, n: int, outcome: int, now: float, used: Used = UNKNOWN) -> None:
        """Ends a ticket or a lease, whichever `n` is; one that is unknown is counted, and nothing else.
        `used`: tokens, for the tenant's rate."""
        ticket = session.leases.pop(n, None) or session.tickets.pop(n, None)
        if ticket is None:
            self.books.unknown_ids += 1
            return
        if ticket.meter is not None:
            if ticket.phase is Phase.LEASED:
                ticket.meter.settle(ticket, outcome, used, now)
            else:
                ticket.meter.refund(ticket)
        self.gates[ticket.model].done(ticket, outcome, now)
        self.books.dirty[ticket.model] = True

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
        """Gives a lease back and queues its ticket again, away from an instance; for `delay` seconds it isn't
        granted that one, even if there is no other."""
        self.books.move(session, n, not_instance, outcome, moves, now, delay)

    # --- sessions --------------------------------------------------------------------------------------

    def hello(self, outbox: Outbox, hello: Hello, now: float) -> Session:
        """A stream has said its complete Hello. Raises SupersededError when a newer stream is open."""
        session = self._statements.hello(outbox, hello, now)
        self.settle(now)
        return session

    def heartbeat(
        self, session: Session, number: int, count: int, digest: int, seen: int, now: float
    ) -> None:
        """Takes in that the session lives, and compares what it holds with the books."""
        self._statements.heartbeat(session, number, count, digest, seen, now)
        self.settle(now)

    def statement(self, session: Session, number: int, seen: int, held: Iterable[Held], now: float) -> None:
        """Takes in the full held set; one that wasn't asked for, or is older than what was, is ignored."""
        self._statements.statement(session, number, seen, held, now)
        self.settle(now)

    def restate(self, session: Session, item: Held, fact: bool, now: float) -> None:
        """A lease that the books lack; `fact`: it counts above the slots, if need be."""
        self._statements.restate(session, item, fact, now)

    def goodbye(self, session: Session, now: float) -> None:
        """The session leaves: its tickets and leases end at once."""
        self.books.end_session(session, LeaseEnd.RELEASED, TicketEnd.CANCELLED, now)
        session.outbox = None
        self.books.forget(session)
        self.settle(now)

    def stream_ended(self, session: Session, outbox: Outbox) -> None:
        """A stream has ended without goodbye: the session keeps everything, and gets no grants meanwhile."""
        if session.outbox is outbox:
            session.outbox = None
            self.books.silent.add(session.id)

    def revoke(self, lease: Id, now: float) -> bool:
        """Ends a lease by an operator's order; false when there is none."""
        found = self._statements.revoke(lease, now)
        self.settle(now)
        return found

    # --- supply and demand -----------------------------------------------------------------------------

    def supply(self, report: Supply, now: float) -> None:
        """Takes in a report of lifecycle."""
        books, book = self.books, self.books.supply
        before = {model: _states(item) for model, item in book.view.items()}
        catalog = book.catalog
        affected = book.take(report)
        if books.no_supply or catalog != book.catalog:
            affected |= set(books.gates)
        books.no_supply = False
        if books.rates is not None:
            books.rates.heard(report.first_admission)
        for model in affected:
            item = book.view.get(model)
            if item is not None and item.instances:
                books.gate(model, now)
            if model in books.gates:
                books.supply_gate(books.gates[model], now)
        books.urgent |= any(_states(book.view.get(model)) != before.get(model, ()) for model in affected)
        instances = [instance for item in book.view.values() for instance in item.instances]
        books.window.supply(report, [instance.old for instance in instances])
        self._statements.look_at_window(now)
        books.news = True
        self.settle(now)

    def unlinked(self, now: float) -> None:
        """The link to lifecycle has ended: the view stays, but what servers reported of their load is old."""
        self.linked = False
        for gate in self.gates.values():
            for slot in gate.slots.values():
                slot.pressure.hear(None, now, slot.slots)

    def demand(self, whole: bool, now: float) -> Demand:
        """What to tell lifecycle: everything, or the models that have changed since the last report."""
        books = self.books
        untold = set(books.gates) if whole else self._untold
        self._untold = set()
        models = []
        for model in sorted(untold):
            gate = books.gates.get(model)
            if gate is not None:
                gate.told_waiting |= bool(gate.waiting)
            models.append(of_gate(gate, now) if gate is not None else ModelDemand(model))
        roster = tuple(sorted(session.id for session in books.sessions.values() if session.rostered))
        generation = books.supply.generation
        return Demand(now - self.started, whole, books.window.over, generation, tuple(models), roster)

    # --- time --------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Ends what is over: tickets past their deadlines, sessions that were silent, the restart window.

        The shell calls it only after input that had arrived was read.
        """
        books = self.books
        for session in list(books.sessions.values()):
            self._statements.judge(session, now)
        self._statements.look_at_window(now)
        if books.supply.generation == NO_GENERATION and not books.no_supply:
            books.no_supply = now >= self.started + NO_SUPPLY_AFTER
            for gate in books.gates.values() if books.no_supply else ():
                books.supply_gate(gate, now)
        for gate in books.gates.values():
            if gate.waiting:
                books.dirty.setdefault(gate.model, False)
                for refusal in gate.expire(now):
                    books.refused(refusal, now)
                    books.dirty[gate.model] = True
        if now - self._sampled >= 1.0:
            self._sampled = now
            self._each_second(now)
        self.settle(now)

    def shift(self, gap: float, now: float) -> None:
        """The process stood still for `gap` seconds until about `now`: whatever it measures by silence begins
        so much later, but not later than now (some of it was heard before the gap was noticed).

        A caller's own deadline isn't shifted: the caller's clock went on.
        """
        self.books.window.shift(gap)
        for session in self.sessions.values():
            session.shift(gap, now)
        for gate in self.gates.values():
            gate.shift(gap)

    def settle(self, now: float) -> None:
        """Lets every gate decide in which something has changed, and tells what it decided."""
        books = self.books
        for model, changed in books.dirty.items():
            gate = books.gates[model]
            if changed | books.decide(gate, now):
                books.news = True
                self._untold.add(model)
            if gate.urgent or (gate.waiting and not gate.told_waiting):
                gate.urgent, gate.told_waiting = False, gate.told_waiting or bool(gate.waiting)
                books.urgent = True
            if gate.idle(now):
                books.drop(gate)
        books.dirty.clear()
        if books.news or books.urgent:
            urgent, books.urgent, books.news = books.urgent, False, False
            self.on_demand(urgent)

    # --- inside --------------------------------------------------------------------------------------------

    def _each_second(self, now: float) -> None:
        self._statements.forget_ended(now)
        for gate in self.gates.values():
            gate.sample(now)
            if gate.waiting:
                self._tell_progress(gate, now)
            elif gate.idle(now):
                self.books.dirty.setdefault(gate.model, False)

    def _tell_progress(self, gate: Gate, now: float) -> None:
        for session_id, flow in progress.of_gate(gate, now):
            outbox = self.sessions[session_id].outbox
            if outbox is not None:
                outbox.progress(flow)


def _nothing(urgent: bool) -> None:
    """Nobody is interested."""


def _states(item: ModelSupply | None) -> tuple[tuple[str, int], ...]:
    return tuple((instance.id, instance.state) for instance in item.instances) if item else ()
