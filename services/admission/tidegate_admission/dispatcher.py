"""The one writer: owns the gates, the sessions and the view of supply.

Synchronous, and without a clock: the streams, the link to lifecycle and the timer call its handlers with the
time, one after another on one loop. Each handler ends with `settle`, which lets the gates decide and puts the
answers into the sessions' outboxes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from tidegate_admission import session as sessions
from tidegate_admission.demand import Demand, ModelDemand, of_gate
from tidegate_admission.gate import Gate
from tidegate_admission.holder import Holder
from tidegate_admission.limits import Limits
from tidegate_admission.session import Differences, Held, Hello, Outbox, Session
from tidegate_admission.supply import ModelSupply, Supply, SupplyBook
from tidegate_admission.tally import Tally
from tidegate_admission.ticket import (
    NO_GENERATION,
    Generation,
    Id,
    LeaseEnd,
    Loss,
    Phase,
    QueueView,
    Reason,
    Refusal,
    Ticket,
    TicketEnd,
)
from tidegate_admission.window import RestartWindow

NO_SUPPLY_AFTER = 10.0
"""Seconds after start in which lifecycle is waited for; later, without it, tickets are refused."""
REVOKED_KEPT = 900.0
"""Seconds for which a revoked lease is remembered: longer than an edge can be cut off and still hold it."""
UNKNOWN_MODELS = ""
"""The tally of models that are in no catalogue; one for all, so that made-up names can't fill the memory."""
PROGRESS_DEPTH = 1000
"""Positions that are told; beyond them nobody is told anything."""
_ANY_CATALOG: Generation = (1 << 64, 0)


class Dispatcher:
    """See the module. The shell sets the two `on_...`."""

    def __init__(
        self, limits: Limits, lease_ttl: float, now: float, chance: Callable[[], float] = lambda: 0.5
    ) -> None:
        """`chance`: as in `Gate`."""
        self.limits, self.lease_ttl, self.started = limits, lease_ttl, now
        self.window = RestartWindow(now, lease_ttl)
        self.book = SupplyBook()
        self.linked = False
        """Lifecycle is connected."""
        self.gates: dict[str, Gate] = {}
        self.sessions: dict[str, Session] = {}
        self.tallies: dict[str, Tally] = {UNKNOWN_MODELS: Tally()}
        self.unknown_ids = 0
        self.expired_sessions = 0
        self.on_demand: Callable[[bool], None] = _nothing
        """Lifecycle should be told something; true: at once."""
        self.on_wait_end: Callable[[Ticket, float, str], None] | None = None
        """A traced ticket has waited so many seconds and was granted (reason "") or refused."""
        self._silent: set[str] = set()
        self._revoked: OrderedDict[Id, float] = OrderedDict()
        self._dirty: dict[str, bool] = {}
        """Gates that may have something to decide; true: they have changed, as demand goes."""
        self._untold: set[str] = set()
        self._urgent = False
        self._no_supply = False
        self._sampled = now
        self._chance = chance

    # --- sessions --------------------------------------------------------------------------------------

    def hello(self, outbox: Outbox, hello: Hello, now: float) -> Session:
        """A stream has said its complete Hello. Raises SupersededError when a newer stream is open."""
        session = self.sessions.get(hello.session_id)
        if session is None:
            session = self.sessions[hello.session_id] = Session(hello.session_id, now)
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
        self.window.hello(session.id)
        self._look_at_window(now)
        self.settle(now)
        return session

    def acquire(self, session: Session, ticket: Ticket, now: float) -> None:
        """Queues a ticket. One that waits already stays as it is; a lease is answered with the same grant."""
        n = ticket.id[1]
        if n in session.tickets:
            return
        if n in session.leases:
            self._tell_grant(session, session.leases[n])
            return
        if not session.rostered:
            session.rostered = True
            self._urgent = True
        gate = self._gate(ticket.model, now)
        if gate.full():
            self._decide(gate, now)
        refusal = gate.offer(ticket, now)
        self._dirty[gate.model] = True
        if refusal is None or refusal.ticket is not ticket:
            session.tickets[n] = ticket
        if refusal is not None:
            self._refused(refusal, now)

    def done(self, session: Session, n: int, outcome: int, now: float) -> None:
        """Ends a ticket or a lease, whichever `n` is; one that is unknown is counted, and nothing else."""
        ticket = session.leases.pop(n, None) or session.tickets.pop(n, None)
        if ticket is None:
            self.unknown_ids += 1
            return
        self.gates[ticket.model].done(ticket, outcome, now)
        self._dirty[ticket.model] = True

    def move(self, session: Session, n: int, not_instance: str, outcome: int, moves: int, now: float) -> None:
        """Gives a lease back and queues its ticket again, away from an instance."""
        ticket = session.leases.pop(n, None) or session.tickets.get(n)
        if ticket is None:
            self.unknown_ids += 1
            return
        self.gates[ticket.model].move(ticket, not_instance, outcome, moves, now)
        session.tickets[n] = ticket
        self._dirty[ticket.model] = True

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
        self.settle(now)

    def statement(self, session: Session, number: int, seen: int, held: Iterable[Held], now: float) -> None:
        """Takes in the full held set; one that wasn't asked for, or is older than what was, is ignored."""
        if number != session.queried:
            return
        session.queried = 0
        self._heard(session, now)
        self._apply(session, sessions.compare_statement(session, seen, held), False, now)
        self.settle(now)

    def goodbye(self, session: Session, now: float) -> None:
        """The session leaves: its tickets and leases end at once."""
        self._end_session(session, LeaseEnd.RELEASED, TicketEnd.CANCELLED, now)
        session.outbox = None
        self._forget(session)
        self.settle(now)

    def stream_ended(self, session: Session, outbox: Outbox) -> None:
        """A stream has ended without goodbye: the session keeps everything, and gets no grants meanwhile."""
        if session.outbox is outbox:
            session.outbox = None
            self._silent.add(session.id)

    def revoke(self, lease: Id, now: float) -> bool:
        """Ends a lease by an operator's order; false when there is none."""
        session = self.sessions.get(lease[0])
        ticket = session.leases.get(lease[1]) if session else None
        if session is None or ticket is None:
            return False
        self._revoked[lease] = now
        self._end(session, ticket, LeaseEnd.REVOKED, TicketEnd.CANCELLED, now)
        if session.outbox is not None:
            session.outbox.lost(ticket.id[1], Reason.REVOKED)
        self.settle(now)
        return True

    # --- supply and demand -----------------------------------------------------------------------------

    def supply(self, report: Supply, now: float) -> None:
        """Takes in a report of lifecycle."""
        before = {model: _states(item) for model, item in self.book.view.items()}
        catalog = self.book.catalog
        affected = self.book.take(report)
        if self._no_supply or catalog != self.book.catalog:
            affected |= set(self.gates)
        self._no_supply = False
        for model in affected:
            item = self.book.view.get(model)
            if item is not None and item.instances:
                self._gate(model, now)
            if model in self.gates:
                self._supply_gate(self.gates[model], now)
        self._urgent |= any(_states(self.book.view.get(model)) != before.get(model, ()) for model in affected)
        instances = [instance for item in self.book.view.values() for instance in item.instances]
        self.window.supply(report, [instance.old for instance in instances])
        self._look_at_window(now)
        self.settle(now)
        self.on_demand(False)

    def demand(self, whole: bool, now: float) -> Demand:
        """What to tell lifecycle: everything, or the models that have changed since the last report."""
        untold = set(self.gates) if whole else self._untold
        self._untold = set()
        models = []
        for model in sorted(untold):
            gate = self.gates.get(model)
            if gate is not None:
                gate.told_waiting = bool(gate.waiting)
            models.append(of_gate(gate, now) if gate is not None else ModelDemand(model))
        roster = tuple(sorted(session.id for session in self.sessions.values() if session.rostered))
        return Demand(
            now - self.started, whole, self.window.over, self.book.generation, tuple(models), roster
        )

    # --- time --------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Ends what is over: tickets past their deadlines, sessions that were silent, the restart window.

        The shell calls it only after input that had arrived was read.
        """
        for session in list(self.sessions.values()):
            self._judge_silence(session, now)
        self._look_at_window(now)
        if self.book.generation == NO_GENERATION and not self._no_supply:
            self._no_supply = now >= self.started + NO_SUPPLY_AFTER
            for gate in self.gates.values() if self._no_supply else ():
                self._supply_gate(gate, now)
        for gate in self.gates.values():
            if gate.waiting:
                self._dirty.setdefault(gate.model, False)
                for refusal in gate.expire(now):
                    self._refused(refusal, now)
                    self._dirty[gate.model] = True
        if now - self._sampled >= 1.0:
            self._sampled = now
            self._each_second(now)
        self.settle(now)

    def shift(self, gap: float) -> None:
        """The process stood still for `gap` seconds: whatever it measures by silence begins so much later.

        A caller's own deadline isn't shifted: the caller's clock went on.
        """
        self.window.shift(gap)
        for session in self.sessions.values():
            session.shift(gap)
        for gate in self.gates.values():
            gate.shift(gap)

    def settle(self, now: float) -> None:
        """Lets every gate decide in which something has changed, and tells what it decided."""
        news = self._urgent
        for model, changed in self._dirty.items():
            gate = self.gates[model]
            if changed | self._decide(gate, now):
                news = True
                self._untold.add(model)
            if gate.urgent or (gate.waiting and not gate.told_waiting):
                gate.urgent, gate.told_waiting = False, bool(gate.waiting)
                news = self._urgent = True
            if gate.idle():
                self._drop(gate)
        self._dirty.clear()
        if news:
            urgent, self._urgent = self._urgent, False
            self.on_demand(urgent)

    # --- inside --------------------------------------------------------------------------------------------

    def _gate(self, model: str, now: float) -> Gate:
        gate = self.gates.get(model)
        if gate is None:
            tally = self.tallies.setdefault(model, Tally())
            gate = self.gates[model] = Gate(model, self.limits, tally, self._silent, now, self._chance)
            gate.guarded = not self.window.over
            self._supply_gate(gate, now)
        return gate

    def _supply_gate(self, gate: Gate, now: float) -> None:
        item, catalog = self.book.view.get(gate.model), self.book.catalog
        if self._no_supply:
            words = "the lifecycle service can't be reached"
            item = ModelSupply(gate.model, reason=Reason.UNAVAILABLE, message=words, retry_after=5.0)
            catalog = _ANY_CATALOG
        self._dirty.setdefault(gate.model, False)
        for loss in gate.supply(item, catalog, self.book.settled, now):
            self._lost(loss)
            self._dirty[gate.model] = True

    def _drop(self, gate: Gate) -> None:
        del self.gates[gate.model]
        if gate.model not in self.book.view:
            self.tallies[UNKNOWN_MODELS].take_over(self.tallies.pop(gate.model))

    def _decide(self, gate: Gate, now: float) -> bool:
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
            self._refused(refusal, now)
        return True

    def _tell_grant(self, session: Session, ticket: Ticket) -> None:
        gate = self.gates[ticket.model]
        view: QueueView = gate.view()
        if session.outbox is not None:
            ticket.sent = session.outbox.seq
            address = gate.slots[ticket.instance_id].address
            session.outbox.grant(
                ticket, address, view.waiting, view.active, view.max_concurrent, view.max_queue
            )

    def _refused(self, refusal: Refusal, now: float) -> None:
        ticket = refusal.ticket
        session = self.sessions[ticket.id[0]]
        session.tickets.pop(ticket.id[1], None)
        if session.outbox is not None:
            session.outbox.refuse(refusal)
        if ticket.trace_parent and self.on_wait_end is not None:
            self.on_wait_end(ticket, now - ticket.arrived, refusal.reason.name)

    def _lost(self, loss: Loss) -> None:
        session = self.sessions[loss.ticket.id[0]]
        session.leases.pop(loss.ticket.id[1], None)
        if session.outbox is not None:
            session.outbox.lost(loss.ticket.id[1], loss.reason)

    def _end(self, session: Session, ticket: Ticket, lease: LeaseEnd, waiting: TicketEnd, now: float) -> None:
        (session.leases if ticket.phase is Phase.LEASED else session.tickets).pop(ticket.id[1])
        self.gates[ticket.model].end(ticket, lease, waiting, now)
        self._dirty[ticket.model] = True

    def _end_session(self, session: Session, lease: LeaseEnd, waiting: TicketEnd, now: float) -> None:
        for ticket in [*session.leases.values(), *session.tickets.values()]:
            self._end(session, ticket, lease, waiting, now)

    def _forget(self, session: Session) -> None:
        del self.sessions[session.id]
        self._silent.discard(session.id)
        self._urgent |= session.rostered

    def _apply(self, session: Session, found: Differences, fact: bool, now: float) -> None:
        """Carries out what a statement changes."""
        for ticket in found.cancelled:
            self._end(session, ticket, LeaseEnd.RECLAIMED, TicketEnd.CANCELLED, now)
        for ticket in found.reclaimed:
            self._end(session, ticket, LeaseEnd.RECLAIMED, TicketEnd.CANCELLED, now)
        for stated in found.moved:
            self._moved(session, stated, now)
        for ticket in found.again:
            self._tell_grant(session, ticket)
        for item in found.held:
            self.restate(session, item, fact, now)
        for ticket in sorted(found.waiting, key=lambda waiter: waiter.arrived):
            self._gate(ticket.model, now).restate_waiting(ticket, now)
            session.tickets[ticket.id[1]] = ticket
            self._dirty[ticket.model] = True
        session.rostered |= bool(session.tickets or session.leases)

    def _moved(self, session: Session, stated: Ticket, now: float) -> None:
        n = stated.id[1]
        for instance_id in sorted(stated.excluded) or [""]:
            self.move(session, n, instance_id, 0, stated.moves, now)

    def restate(self, session: Session, item: Held, fact: bool, now: float) -> None:
        """A lease that the book lacks.

        1. It was revoked.
        2. Its instance is gone, by a settled supply.
        3. In a later statement it is taken again only where a slot is free; in a Hello it is a fact.
        """
        assert session.outbox is not None
        ticket = Ticket((session.id, item.n), item.model, now - item.age, item.tenant, moves=item.moves)
        if ticket.id in self._revoked:  # 1
            session.outbox.lost(item.n, Reason.REVOKED)
            return
        if self.book.gone(item.model, item.instance_id):  # 2
            session.outbox.lost(item.n, Reason.INSTANCE_LOST)
            return
        gate = self._gate(item.model, now)
        self._dirty[item.model] = True
        slot = gate.slots.get(item.instance_id)
        if not fact and (slot is None or len(slot.leases) >= slot.effective(now, gate.guarded)):  # 3
            session.outbox.lost(item.n, Reason.EXPIRED)
            return
        gate.restate_held(ticket, item.instance_id, now)
        session.leases[item.n] = ticket

    def _heard(self, session: Session, now: float) -> None:
        session.heard = now
        if session.id in self._silent:
            self._silent.discard(session.id)
            for gate in self.gates.values():
                gate.release_session(session.id)
                self._dirty[gate.model] = True

    def _judge_silence(self, session: Session, now: float) -> None:
        """Looks at how long a session has been silent.

        1. For 1.5 heartbeats: no grants, and it keeps its places.
        2. For `lease_ttl`: its tickets and leases end, and it is told, if it has a stream.
        3. A unary holder isn't silent while its calls wait; each of its leases ends by itself.
        """
        silent = now - session.heard
        if silent > self.lease_ttl / 2 and not isinstance(session, Holder):  # 1
            self._silent.add(session.id)
        if session.tickets or session.leases:
            session.used = now
        elif session.rostered and now - session.used > self.lease_ttl:
            session.rostered = False
            self.on_demand(False)
        if isinstance(session, Holder):  # 3
            self._judge_holder(session, now)
            return
        if silent < self.lease_ttl:
            return
        if session.tickets or session.leases:  # 2
            self.expired_sessions += 1
            self._expire(session, now)
        if session.outbox is None:
            self._forget(session)

    def _judge_holder(self, holder: Holder, now: float) -> None:
        for ticket in holder.overdue(now, self.lease_ttl):
            self._end(holder, ticket, LeaseEnd.EXPIRED, TicketEnd.SESSION_LOST, now)
            holder.lost(ticket.id[1], Reason.EXPIRED)
        if holder.idle():
            self._forget(holder)

    def _expire(self, session: Session, now: float) -> None:
        leases, tickets = list(session.leases), list(session.tickets.values())
        self._end_session(session, LeaseEnd.EXPIRED, TicketEnd.SESSION_LOST, now)
        if session.outbox is None:
            return
        for n in leases:
            session.outbox.lost(n, Reason.EXPIRED)
        words = "the edge that this request waits in was silent for too long; try again"
        for ticket in tickets:
            view = QueueView(0, 0, self.limits.max_concurrent, self.limits.max_queue)
            session.outbox.refuse(Refusal(ticket, Reason.EXPIRED, words, 1.0, view, TicketEnd.SESSION_LOST))

    def _look_at_window(self, now: float) -> None:
        if not self.window.over:
            self.window.pass_time(now)
        if self.window.over and any(gate.guarded for gate in self.gates.values()):
            for gate in self.gates.values():
                gate.guarded = False
                self._dirty[gate.model] = True
            self._urgent = True

    def _each_second(self, now: float) -> None:
        while self._revoked and now - next(iter(self._revoked.values())) > REVOKED_KEPT:
            self._revoked.popitem(last=False)
        for gate in self.gates.values():
            gate.sample(now)
            if gate.waiting:
                self._tell_progress(gate, now)

    def _tell_progress(self, gate: Gate, now: float) -> None:
        front = gate.turns.forecast(PROGRESS_DEPTH, gate.tally.length, now)
        told: dict[str, tuple[int, list[int]]] = {}
        for position, ticket in enumerate(front, 1):
            if ticket.wants_progress:
                told.setdefault(ticket.id[0], (position, []))[1].append(ticket.id[1])
        for session_id, (position, ns) in told.items():
            outbox = self.sessions[session_id].outbox
            if outbox is not None:
                outbox.progress(ns, position, gate.eta(position, now), gate.loading)


def _nothing(urgent: bool) -> None:
    """Nobody is interested."""


def _states(item: ModelSupply | None) -> tuple[tuple[str, int], ...]:
    return tuple((instance.id, instance.state) for instance in item.instances) if item else ()
