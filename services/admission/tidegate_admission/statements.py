"""What sessions state, and what their silence says: Hellos, heartbeats, held sets, leases that are restated.

Synchronous, and without a clock; `session.py` compares a statement with the books, here it is carried out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from tidegate_admission import session as sessions
from tidegate_admission.books import Books
from tidegate_admission.holder import Holder
from tidegate_admission.session import Differences, Held, Hello, Outbox, Session
from tidegate_admission.ticket import Id, LeaseEnd, QueueView, Reason, Refusal, Ticket, TicketEnd

ENDED_KEPT = 900.0
"""Seconds for which a lease that was revoked or expired is remembered: longer than an edge that is cut off
holds it by default (`edge.control_grace`, which admission doesn't know)."""


class Statements:
    """Works on the books for the dispatcher, which settles afterwards."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._ended: OrderedDict[Id, tuple[float, Reason]] = OrderedDict()
        """Leases that their edges may still believe to hold: since when they have ended, and why."""

    def hello(self, outbox: Outbox, hello: Hello, now: float) -> Session:
        """A stream has said its complete Hello. Raises SupersededError when a newer stream is open."""
        books = self._books
        session = books.sessions.get(hello.session_id)
        if session is None:
            session = books.sessions[hello.session_id] = Session(hello.session_id, now)
        if hello.stream_seq < session.stream_seq:
            raise sessions.SupersededError(hello.session_id)
        if session.outbox is not None:
            session.outbox.close(Reason.SUPERSEDED)
        session.stream_seq, session.holder, session.outbox = hello.stream_seq, hello.holder, outbox
        session.queried = 0
        for ticket in session.leases.values():
            ticket.sent = 0  # sequence numbers of the stream before mean nothing on this one
        outbox.welcome()
        self._heard(session, now)
        self._apply(session, sessions.compare_hello(session, hello), True, now)
        books.window.hello(session.id)
        self.look_at_window(now)
        return session

    def heartbeat(
        self, session: Session, number: int, count: int, digest: int, seen: int, now: float
    ) -> None:
        """Takes in that the session lives, and compares what it holds with the book."""
        assert session.outbox is not None
        self._heard(session, now)
        session.outbox.ack(number)
        if sessions.digest(session.judged(seen)) != (count, digest):
            session.queried = number
            session.outbox.query(number)

    def statement(self, session: Session, number: int, seen: int, held: Iterable[Held], now: float) -> None:
        """Takes in the full held set; one that wasn't asked for, or is older than what was, is ignored."""
        if number != session.queried:
            return
        session.queried = 0
        self._heard(session, now)
        self._apply(session, sessions.compare_statement(session, seen, held), False, now)

    def restate(self, session: Session, item: Held, fact: bool, now: float) -> None:
        """A lease that the book lacks.

        1. It was revoked.
        2. Its instance is gone, by a settled supply.
        3. In a Hello it is a fact, but for one that expired here: its slot may be somebody else's by now.
           That one, and any in a later statement, is taken again only where a slot is free.
        """
        books = self._books
        assert session.outbox is not None
        ticket = Ticket((session.id, item.n), item.model, now - item.age, item.tenant, moves=item.moves)
        _, ended = self._ended.get(ticket.id, (0.0, None))
        if ended is Reason.REVOKED:  # 1
            session.outbox.lost(item.n, Reason.REVOKED)
            return
        if books.supply.gone(item.model, item.instance_id):  # 2
            session.outbox.lost(item.n, Reason.INSTANCE_LOST)
            return
        gate = books.gate(item.model, now)
        books.dirty[item.model] = True
        slot = gate.slots.get(item.instance_id)
        full = slot is None or len(slot.leases) >= slot.effective(now, gate.guarded)
        if full and (ended is not None or not fact):  # 3
            session.outbox.lost(item.n, Reason.EXPIRED)
            return
        self._ended.pop(ticket.id, None)
        gate.restate_held(ticket, item.instance_id, now)
        session.leases[item.n] = ticket

    def revoke(self, lease: Id, now: float) -> bool:
        """Ends a lease by an operator's order; false when there is none."""
        books = self._books
        session = books.sessions.get(lease[0])
        ticket = session.leases.get(lease[1]) if session else None
        if session is None or ticket is None:
            return False
        self._ended[lease] = (now, Reason.REVOKED)
        books.end(session, ticket, LeaseEnd.REVOKED, TicketEnd.CANCELLED, now)
        if session.outbox is not None:
            session.outbox.lost(ticket.id[1], Reason.REVOKED)
        return True

    def judge(self, session: Session, now: float) -> None:
        """Looks at how long a session has been silent.

        1. For 1.5 heartbeats: no grants, and it keeps its places.
        2. For `lease_ttl`: its tickets and leases end, and it is told, if it has a stream.
        3. A unary holder isn't silent while its calls wait; each of its leases ends by itself.
        """
        books = self._books
        silent = now - session.heard
        if silent > books.lease_ttl / 2 and not isinstance(session, Holder):  # 1
            books.silent.add(session.id)
        if session.tickets or session.leases:
            session.used = now
        elif session.rostered and now - session.used > books.lease_ttl:
            session.rostered = False
            books.news = True
        if isinstance(session, Holder):  # 3
            self._judge_holder(session, now)
            return
        if silent < books.lease_ttl:
            return
        if session.tickets or session.leases:  # 2
            books.expired_sessions += 1
            self._expire(session, now)
        if session.outbox is None:
            books.forget(session)

    def forget_ended(self, now: float) -> None:
        """Lets go of ended leases that nobody can state any more."""
        while self._ended and now - next(iter(self._ended.values()))[0] > ENDED_KEPT:
            self._ended.popitem(last=False)

    def look_at_window(self, now: float) -> None:
        """Whether the restart window is over: then older instances no longer count as full."""
        books = self._books
        if not books.window.over:
            books.window.pass_time(now)
        if books.window.over and any(gate.guarded for gate in books.gates.values()):
            for gate in books.gates.values():
                gate.guarded = False
                books.dirty[gate.model] = True
            books.urgent = True

    def _apply(self, session: Session, found: Differences, fact: bool, now: float) -> None:
        """Carries out what a statement changes."""
        books = self._books
        for ticket in found.cancelled:
            books.end(session, ticket, LeaseEnd.RECLAIMED, TicketEnd.CANCELLED, now)
        for ticket in found.reclaimed:
            books.end(session, ticket, LeaseEnd.RECLAIMED, TicketEnd.CANCELLED, now)
        for stated in found.moved:
            self._moved(session, stated, now)
        for ticket in found.again:
            books.tell_grant(session, ticket)
        for item in found.held:
            self.restate(session, item, fact, now)
        for ticket in sorted(found.waiting, key=lambda waiter: waiter.arrived):
            books.gate(ticket.model, now).restate_waiting(ticket, now)
            session.tickets[ticket.id[1]] = ticket
            books.dirty[ticket.model] = True
        session.rostered |= bool(session.tickets or session.leases)

    def _moved(self, session: Session, stated: Ticket, now: float) -> None:
        n = stated.id[1]
        for instance_id in sorted(stated.excluded) or [""]:
            self._books.move(session, n, instance_id, 0, stated.moves, now)

    def _heard(self, session: Session, now: float) -> None:
        books = self._books
        session.heard = now
        if session.id in books.silent:
            books.silent.discard(session.id)
            for gate in books.gates.values():
                gate.release_session(session.id)
                books.dirty[gate.model] = True

    def _judge_holder(self, holder: Holder, now: float) -> None:
        books = self._books
        for ticket in holder.overdue(now, books.lease_ttl):
            books.end(holder, ticket, LeaseEnd.EXPIRED, TicketEnd.SESSION_LOST, now)
            holder.lost(ticket.id[1], Reason.EXPIRED)
        if holder.idle():
            books.forget(holder)

    def _expire(self, session: Session, now: float) -> None:
        books = self._books
        leases, tickets = list(session.leases), list(session.tickets.values())
        self._ended.update(((session.id, n), (now, Reason.EXPIRED)) for n in leases)
        books.end_session(session, LeaseEnd.EXPIRED, TicketEnd.SESSION_LOST, now)
        if session.outbox is None:
            return
        for n in leases:
            session.outbox.lost(n, Reason.EXPIRED)
        words = "the edge that this request waits in was silent for too long; try again"
        for ticket in tickets:
            view = QueueView(0, 0, books.limits.max_concurrent, books.limits.max_queue)
            session.outbox.refuse(Refusal(ticket, Reason.EXPIRED, words, 1.0, view, TicketEnd.SESSION_LOST))
