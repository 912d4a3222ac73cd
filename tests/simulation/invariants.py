"""The rules of the protocol, looked at after every step: each method is one of them and is named after it.

Three things are compared: admission's books, lifecycle's fleet, and the truth, which is the requests that
model servers are serving. Whatever is wrong raises AssertionError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.simulation.edge import Edge, Relay
from tests.simulation.machine import ModelServer
from tests.simulation.process import Process
from tests.simulation.services import Admission, Lifecycle
from tidegate_admission import views
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.gate import Gate
from tidegate_admission.ticket import Id
from tidegate_lifecycle.budget import Ledger
from tidegate_lifecycle.instance import Drain, DrainCause, InstanceState

if TYPE_CHECKING:
    from tests.simulation.world import World

LATE = 1.0
"""Seconds by which an end may come too late."""
BEATS = 3
"""Heartbeats after which what an edge holds and what the book says must agree."""


@dataclass
class _Queue:
    """What was seen of a gate at the step before."""

    waiting: int = 0
    taken_in: int = 0
    """Tickets moved and restated, which may go above `max_queue`."""


class Invariants:
    """See the module."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.revoked: set[Id] = set()
        """Leases that an operator has ended."""
        self.looks = 0
        self._book: Dispatcher | None = None
        self._queues: dict[str, _Queue] = {}
        self._grants: dict[str, int] = {}
        self._beside: dict[str, float] = {}
        """Models with a ticket beside a free slot, and since when."""
        self._heard: dict[str, float] = {}
        """When admission, whichever, last heard a session."""
        self._rooms: dict[str, int] = {}
        """By instance: how many requests may be on it."""
        self._unbooked: dict[Relay, float] = {}
        """Relays that are in no book, and when that was first seen."""
        self._idle: dict[Id, float] = {}
        """Leases that their edge doesn't hold, and since when."""
        self._booked: dict[Relay, float] = {}
        """Relays that are in the book, and since when."""
        self._cut_off: set[Relay] = set()
        """Relays whose edge was silent for `lease_ttl` meanwhile: their slots may be others' since."""
        self._states: dict[str, tuple[InstanceState, Drain | None]] = {}
        self._fleet: Lifecycle | None = None

    def look(self, process: Process) -> None:
        """A process has done something."""
        self.looks += 1
        if isinstance(process, Admission):
            self._look_at_admission(process)
        elif isinstance(process, Lifecycle) and process.fleet is not None:
            self._look_at_lifecycle(process)
        for server in self.world.servers():
            self.no_more_requests_than_slots(server)

    def _look_at_admission(self, process: Admission) -> None:
        book, now = process.dispatcher, process.loop.time()
        if book is not self._book:
            self._book, self._grants, self._queues, self._beside = book, {}, {}, {}
        self._hear(book, now)
        self.counts_agree(book)
        self.silence_ends_leases(process, now)
        for gate in book.gates.values():
            self.no_grant_above_the_slots(gate, now)
            self.no_ticket_above_max_queue(gate)
            self.tickets_end_in_time(process, gate, now)
            self.nobody_waits_beside_a_free_slot(gate, now)
        self._match(book)
        self.leases_have_relays(process)

    def _look_at_lifecycle(self, process: Lifecycle) -> None:
        if process is not self._fleet:
            self._fleet, self._states = process, {}
        self.no_stop_without_a_drain(process)
        self.nobody_is_evicted_who_keeps_his_room(process)
        self.budgets_hold(process)
        self.what_runs_is_tracked(process)
        assert process.fleet is not None
        self._states = {one.id: (one.state, one.drain) for one in process.fleet.instances.values()}

    # --- admission's books -------------------------------------------------------------------------------

    def counts_agree(self, book: Dispatcher) -> None:
        """Invariant 2: granted + restated − Σ lease ends == active, per process; the same of tickets."""
        error = views.conservation_error(book)
        assert error == 0, f"the records and the sets are {error} apart"

    def no_grant_above_the_slots(self, gate: Gate, now: float) -> None:
        """Invariant 1: no grant when leases ≥ effective slots."""
        for slot in gate.slots.values():
            before = self._grants.get(slot.id, 0)
            if slot.grants > before:
                room = slot.effective(now, gate.guarded)
                assert len(slot.leases) <= room, f"{slot} was granted on, and has room for {room}"
            self._grants[slot.id] = slot.grants

    def no_ticket_above_max_queue(self, gate: Gate) -> None:
        """Invariant 1: no ticket accepted when tickets ≥ `max_queue`; restated and moved ones aside."""
        waiting, taken_in = len(gate.waiting), gate.tally.restated_waiting + gate.tally.moved
        queue = self._queues.setdefault(gate.model, _Queue())
        bound = max(gate.max_queue, queue.waiting + max(0, taken_in - queue.taken_in))
        assert waiting <= bound, f"{waiting} wait for {gate.model}, of at most {gate.max_queue}"
        queue.waiting, queue.taken_in = waiting, taken_in

    def silence_ends_leases(self, process: Admission, now: float) -> None:
        """A killed or frozen edge's tickets and leases are free within `lease_ttl` + 1 s."""
        bound = process.dispatcher.lease_ttl + LATE
        if self.world.now - process.thawed < LATE:
            return  # it has just come back and reads what was said meanwhile
        for session in process.dispatcher.sessions.values():
            if now - session.heard <= bound:
                continue
            # What it said before its first heartbeat after a freeze counts, too.
            held = [
                *session.leases.values(),
                *(one for one in session.tickets.values() if one.queued < now - LATE),
            ]
            assert not held, (
                f"session {session.id} was silent for {now - session.heard:.2f} s, and has {held}"
            )

    def tickets_end_in_time(self, process: Admission, gate: Gate, now: float) -> None:
        """Invariant 5: every ticket ends by its deadline + 1 s, of admission's own time."""
        if not gate.waiting or self.world.now - process.thawed < LATE:
            return
        patience = gate._clock.read(now) - LATE
        for ticket in gate.waiting.values():
            assert ticket.deadline >= now - LATE, (
                f"{ticket} outlived its deadline by {now - ticket.deadline:.2f} s"
            )
            assert ticket.patience >= patience, f"{ticket} outlived its queue timeout"

    def nobody_waits_beside_a_free_slot(self, gate: Gate, now: float) -> None:
        """Invariant 5: a free slot is granted to whoever may have it, at once."""
        if not self._grantable(gate, now):
            self._beside.pop(gate.model, None)
            return
        since = self._beside.setdefault(gate.model, now)
        assert now - since <= LATE, (
            f"tickets wait for {gate.model} beside a free slot: {list(gate.slots.values())}"
        )

    def _grantable(self, gate: Gate, now: float) -> bool:
        if not gate.waiting or gate.refusal is not None or gate._room(frozenset(), now) is None:
            return False
        silent = gate.turns._silent
        return any(
            ticket.serial and ticket.id[0] not in silent and gate._room(ticket.excluded, now) is not None
            for ticket in gate.waiting.values()
        )

    # --- the books and the truth -------------------------------------------------------------------------

    def _hear(self, book: Dispatcher, now: float) -> None:
        for session in book.sessions.values():
            heard = self.world.now - max(0.0, now - session.heard)
            if heard - self._heard.get(session.id, heard) >= book.lease_ttl - LATE:
                self._cut(session.id)  # it was silent, and is back
            self._heard[session.id] = max(heard, self._heard.get(session.id, heard))

    def _cut(self, session_id: str) -> None:
        for server in self.world.servers():
            self._cut_off |= {one for one in server.requests if _session(one) == session_id}

    def _match(self, book: Dispatcher) -> None:
        """Notes which relays are in the book, and how many may be on each instance."""
        for server in self.world.servers():
            gate = book.gates.get(server.model)
            slot = gate.slots.get(server.id) if gate is not None else None
            if slot is not None and slot.known:
                room = self._rooms.get(server.id, 0)
                used = max(len(slot.leases), len(server.requests))  # of a higher limit than now, perhaps
                self._rooms[server.id] = max(slot.slots, min(room, used))
            for relay in server.requests:
                lease = (_session(relay), relay.ticket.n) if relay.ticket is not None else ("", 0)
                if slot is not None and lease in slot.leases:
                    self._booked.setdefault(relay, self.world.now)
                    self._unbooked.pop(relay, None)
                else:
                    self._booked.pop(relay, None)
                    self.relays_are_in_the_book(relay, self._unbooked.setdefault(relay, self.world.now))

    def leases_have_relays(self, process: Admission) -> None:
        """A lease that its edge doesn't hold any more is taken back by what the edge's heartbeats state."""
        book = process.dispatcher
        thawing = self.world.now - process.thawed < LATE
        edges = {edge.session.session_id: edge for edge in self.world.living_edges() if edge.session}
        idle: dict[Id, float] = {}
        for session in book.sessions.values():
            edge = edges.get(session.id)
            stale = self.world.now - self._heard[session.id] > self.world.setting.lease_ttl / 2
            if edge is None or edge.session is None or stale or not session.leases:
                continue
            if thawing or session.outbox is None:
                continue  # it can't have stated anything
            held = edge.session.held
            for n in session.leases:
                if n not in held:
                    since = idle[session.id, n] = self._idle.get((session.id, n), self.world.now)
                    late = self._heard[session.id] - since > BEATS * self.world.setting.lease_ttl / 3
                    assert not late, f"lease {n} of {edge.name} is held by nobody since {since:.2f} s"
        self._idle = idle

    def relays_are_in_the_book(self, relay: Relay, since: float) -> None:
        """A relay without a lease ends, or gets it back: an edge that is heard doesn't go on with it."""
        heard, beat = self._heard.get(_session(relay), 0.0), self.world.setting.lease_ttl / 3
        if self.world.now - heard > 1.5 * beat:
            self._unbooked[relay] = self.world.now
            return
        beats = (heard - since) / beat
        assert beats <= BEATS, (
            f"request {relay.number} of {relay.edge.name} runs on {relay.server} without a lease"
        )

    def no_more_requests_than_slots(self, server: ModelServer) -> None:
        """The one bound: an instance is over its slots by at most the leases of edges that are cut off, and
        a slot is never handed out twice to edges that are heard, whoever restarts."""
        room = self._rooms.get(server.id)
        if room is None or len(server.requests) <= room:
            return
        counted = [relay for relay in server.requests if not self._excused(relay)]
        assert len(counted) <= room, (
            f"{server.id} has {len(counted)} requests (beside {len(server.requests) - len(counted)} of edges"
            f" cut off) in {room} slots: {sorted((one.edge.name, one.number) for one in counted)}"
        )

    def _excused(self, relay: Relay) -> bool:
        """Its lease was ended while its edge couldn't know."""
        session_id = _session(relay)
        silent = self.world.now - self._heard.get(session_id, self.world.now)
        if silent >= self.world.setting.lease_ttl - LATE:
            self._cut_off.add(relay)
        revoked = relay.ticket is not None and (session_id, relay.ticket.n) in self.revoked
        return revoked or relay in self._cut_off

    # --- lifecycle ---------------------------------------------------------------------------------------

    def nobody_is_stopped_in_use(self, server: ModelServer) -> None:
        """Invariant 3: no planned stop while an edge that is heard relays on it, before its drain deadline.

        The machine asks when a server is told to end, before its requests break."""
        lifecycle = self.world.lifecycle
        if lifecycle is None or not server.requests or server.hung:
            return
        _, drain = self._states.get(server.id, (None, None))
        if drain is not None and drain.deadline is not None and drain.deadline <= lifecycle.loop.time():
            return
        for relay in server.requests:
            known = self.world.now - self._booked.get(relay, self.world.now)
            counted = relay.edge.alive and not relay.edge.frozen and known >= LATE
            assert not counted or self._excused(relay), (
                f"{server.id} is stopped while {relay.edge.name} relays request {relay.number} on it"
            )

    def no_stop_without_a_drain(self, process: Lifecycle) -> None:
        """Every planned stop passes through draining: from READY only a crash leads to STOPPING."""
        assert process.fleet is not None
        for one in process.fleet.instances.values():
            before, _ = self._states.get(one.id, (None, None))
            if one.state is not InstanceState.STOPPING or before is not InstanceState.READY:
                continue
            server = self.world.machine.servers.get(one.id)
            crashed = server is None or server.hung or one.reason.startswith("3 health checks")
            assert crashed, f"{one} was stopped without a drain"

    def nobody_is_evicted_who_keeps_his_room(self, process: Lifecycle) -> None:
        """`always_on` and pinned models are no victims."""
        assert process.fleet is not None
        for one in process.fleet.instances.values():
            before, _ = self._states.get(one.id, (None, None))
            if one.drain is None or before is InstanceState.DRAINING:
                continue
            model = self.world.models.get(one.model)
            kept = one.model in process.fleet.pinned or (model is not None and model.always_on)
            assert not kept or one.drain.cause is not DrainCause.EVICTION, f"{one} is evicted"

    def budgets_hold(self, process: Lifecycle) -> None:
        """Invariant 4: what is reserved, and what runs, never exceeds a card's budget."""
        fleet = process.fleet
        assert fleet is not None
        excess = Ledger(fleet.cards(), fleet.instances.values()).violation()
        assert not excess, f"reservations exceed the budgets: {excess}"
        for card in fleet.cards():
            used = sum(
                one.spec.reserved_mib for one in self.world.servers() if card.id in one.spec.device_ids
            )
            assert used <= card.budget_mib, f"{used} MiB run on {card.id}, which has {card.budget_mib}"

    def what_runs_is_tracked(self, process: Lifecycle) -> None:
        """Invariant 6: what runs is tracked, and what is tracked as ready runs, within an interval."""
        fleet = process.fleet
        assert fleet is not None
        if not fleet.settled or self.world.now - process.thawed < LATE:
            return
        for server in self.world.servers():
            assert server.id in fleet.instances, f"{server.id} runs, and lifecycle doesn't know it"
        for one in fleet.instances.values():
            ended = self.world.machine.ended.get(one.id, self.world.now)
            serving = one.state in (InstanceState.READY, InstanceState.DRAINING)
            assert not serving or self.world.now - ended <= LATE, f"{one} ended long ago"

    # --- the end -----------------------------------------------------------------------------------------

    def nothing_is_left(self) -> None:
        """Once faults and arrivals have stopped, everything drains, and every client was answered once."""
        admission = self.world.admission
        assert admission is not None, "admission isn't there"
        for session in admission.dispatcher.sessions.values():
            assert not session.tickets, f"session {session.id} still waits: {session.tickets}"
            assert not session.leases, f"session {session.id} still holds: {session.leases}"
        for name in sorted(self.world.edges):
            edge = self.world.network.processes.get(name)
            assert isinstance(edge, Edge)
            assert edge.session is not None
            assert not edge.relays, f"{name} still relays {sorted(one.number for one in edge.relays)}"
            assert not edge.session.held, f"{name} still holds {edge.session.held}"
            assert not edge.session.waiting, f"{name} still waits with {edge.session.waiting}"
            assert edge.session.connected, f"{name} has no session"
        for server in self.world.servers():
            assert not server.requests, f"{server.id} still serves {len(server.requests)} requests"
        for client in self.world.clients:
            assert client.left or len(client.answers) == 1, f"{client} got no answer"


def _session(relay: Relay) -> str:
    session = relay.edge.session
    return session.session_id if session is not None else ""
