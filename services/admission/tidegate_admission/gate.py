"""The gate of one model: its queue, the slots of its instances, and the leases on them.

Pure: events and the time come in, decisions go out as values, and nothing is interrupted in the middle. The
counts are sizes of sets: `waiting` and each slot's `leases`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tidegate_admission import estimate
from tidegate_admission.affinity import Affinities
from tidegate_admission.limits import Limits
from tidegate_admission.outlook import Outlook
from tidegate_admission.patience import QueueClock, loads_until
from tidegate_admission.rates import Rates
from tidegate_admission.slots import Slot
from tidegate_admission.supply import MAY_SERVE, InstanceState, ModelSupply, present
from tidegate_admission.tally import Tally
from tidegate_admission.ticket import (
    NO_GENERATION,
    Generation,
    Grant,
    LeaseEnd,
    Loss,
    Outcome,
    Phase,
    QueueView,
    Reason,
    Refusal,
    Ticket,
    TicketEnd,
)
from tidegate_admission.turns import Turns

_GOLDEN = 0.6180339887
"""Multiples of the golden ratio spread evenly over 0 to 1, however many there are."""
CONNECT_FAILED_HOLD = 5.0
"""Seconds without grants on an instance that couldn't be connected to, unless supply confirms it before."""


@dataclass(slots=True)
class Decisions:
    """What a gate has decided, in order of decision."""

    grants: list[Grant] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


class Gate:
    """One model. `silent` is the book's set of sessions that get no grants; the gate only reads it."""

    def __init__(
        self,
        model: str,
        limits: Limits,
        tally: Tally,
        silent: set[str],
        now: float,
        chance: Callable[[], float] = lambda: 0.5,
        rates: Rates | None = None,
    ) -> None:
        """`chance` gives numbers from 0 to 1: how long those that are refused are told to stay away.
        `rates` are the book's; None = no tenant has any."""
        self.model = model
        self.tally = tally
        self.guarded = False
        """The restart window is open: instances older than this process count as full."""
        self.urgent = False
        """The demand of this model should be told at once; reset by the dispatcher."""
        self.told_waiting = False
        """Lifecycle has been told at once that somebody waits; set by the dispatcher, reset by `sample`."""
        self.arrival_rate = 0.0
        """Offers per second over about a minute."""
        self.turns = Turns(silent, limits.tenants, limits.aging)
        self.waiting = self.turns.tickets
        """All tickets."""
        self.slots: dict[str, Slot] = {}
        self.max_concurrent, self.max_queue = limits.max_concurrent, limits.max_queue
        self.refusal: ModelSupply | None = None
        """Why nobody can be served now; None = they can."""
        self.tenants = limits.tenants
        self._limits = limits
        self.outlook = Outlook(self.slots, self.turns.accounts, tally, chance)
        self._affinities = Affinities()
        self._catalog: Generation = NO_GENERATION
        self._clock = QueueClock(now)
        self._offered = tally.offered
        self._chance = chance
        self._rates = rates

    # --- verbs -----------------------------------------------------------------------------------------

    def offer(self, ticket: Ticket, now: float) -> Refusal | None:
        """Takes a new ticket in; gives the refusal of it, or of the ticket that it displaced.

        1. Supply says that the model can't be had, and is as new as the catalogue the ticket was judged by.
        2. The model will be ready after the caller's own deadline.
        3. The queue is full, and nobody makes room for it (`Turns.displaced` says when somebody does).
        4. Its tenant's rates are used up.
        5. It takes the place of another ticket, which is refused instead.
        6. It waits, and the next `decide` may grant it.
        """
        self.tally.offered += 1
        ticket.band = self._limits.tenants.band(ticket.tenant, ticket.band)
        if self.refusal is not None and ticket.catalog <= self._catalog:  # 1
            return self._refused(ticket, now)
        if ticket.catalog <= self._catalog and not self.outlook.reaches(ticket.deadline, now):  # 2
            return self._unreachable(ticket, now)
        displaced = self.turns.displaced(ticket, self.max_queue) if self.full() else None
        if self.full() and displaced is None:  # 3
            return self._queue_full(ticket, now)
        short = self._rates.reserve(ticket, now) if self._rates is not None else None
        if short is not None:  # 4
            retry = estimate.retry_after(short.wait, self._chance())
            return self._refuse(
                ticket, Reason.RATE_LIMITED, short.words(ticket.tenant), retry, TicketEnd.REFUSED
            )
        refusal = self._queue_full(displaced, now) if displaced is not None else None  # 5
        self._take_in(ticket, now)  # 6
        return refusal

    def restate_waiting(self, ticket: Ticket, now: float) -> None:
        """Takes in a ticket that another admission had queued: by its age, above `max_queue` if need be.

        Its queue timeout begins again: how much of its age was loading, nobody knows any more.
        """
        self.tally.restated_waiting += 1
        ticket.band = self._limits.tenants.band(ticket.tenant, ticket.band)
        self._take_in(ticket, now)

    def restate_held(self, ticket: Ticket, instance_id: str, now: float) -> None:
        """Takes in a lease as a fact, above the slots if need be, on an instance not yet known if need be.

        It has been held since `ticket.arrived`; what it had before now is charged to nobody.
        """
        if ticket.phase is Phase.WAITING:
            self._leave(ticket, TicketEnd.CANCELLED)
        slot = self.slots.get(instance_id)
        if slot is None:
            slot = self.slots[instance_id] = Slot(instance_id)
        self.tally.restated += 1
        self._lease(ticket, slot, ticket.arrived)
        ticket.charged = now - ticket.arrived

    def done(self, ticket: Ticket, outcome: int, now: float) -> None:
        """Ends a ticket or a lease, whichever it is; nothing when it has ended already."""
        if ticket.phase is Phase.LEASED:
            self._release(ticket, outcome, now)
            ticket.become(Phase.ENDED)
        elif ticket.phase is Phase.WAITING:
            self._leave(ticket, TicketEnd.CANCELLED)
            ticket.become(Phase.ENDED)

    def end(self, ticket: Ticket, lease: LeaseEnd, waiting: TicketEnd, now: float) -> None:
        """Ends a ticket or a lease for a reason that its session didn't give: one kind for each phase."""
        if ticket.phase is Phase.LEASED:
            self._unlease(ticket, lease, now)
        else:
            self._leave(ticket, waiting)
        ticket.become(Phase.ENDED)

    def move(
        self, ticket: Ticket, not_instance: str, outcome: int, moves: int, now: float, delay: float = 0.0
    ) -> None:
        """Gives a lease back and lets its ticket wait again, at the head; a waiting one is only moved up.

        It isn't granted `not_instance` again while another one may come, nor for `delay` seconds.
        """
        if ticket.phase is Phase.LEASED:
            self._release(ticket, outcome, now)
            slot = self.slots.get(not_instance)
            if slot is not None:
                slot.avoided_until = max(slot.avoided_until, now + delay)
            self.tally.moved += 1
            ticket.moves = max(moves, ticket.moves)
            ticket.excluded |= {not_instance} if not_instance else set()
            self._take_in(ticket, now)
            return
        self.turns.exclude(ticket, not_instance, moves)

    def supply(self, item: ModelSupply | None, catalog: Generation, complete: bool, now: float) -> list[Loss]:
        """Takes in what there is of the model; gives the leases whose instance is gone.

        `complete`: a settled supply, so what it lacks does not exist (None: the model itself).
        """
        self._clock.run(now, loads_until(item, complete, now))
        instances = {instance.id: instance for instance in present(item.instances if item else ())}
        losses: list[Loss] = []
        if complete:
            for slot in [slot for slot in self.slots.values() if slot.id not in instances]:
                losses += [Loss(ticket, Reason.INSTANCE_LOST) for ticket in slot.leases.values()]
                for ticket in list(slot.leases.values()):
                    self._unlease(ticket, LeaseEnd.INSTANCE_LOST, now)
                    ticket.become(Phase.ENDED)
                self.slots.pop(slot.id, None)
        self.max_concurrent = self._limits.max_concurrent
        self.max_queue = self._limits.max_queue
        if item is not None:
            self.max_concurrent = item.max_concurrent or self.max_concurrent
            self.max_queue = item.max_queue or self.max_queue
        for instance in instances.values():
            slot = self.slots.setdefault(instance.id, Slot(instance.id))
            slot.update(instance, self.max_concurrent, now)
        if item is None and complete:
            words = f"the model '{self.model}' does not exist"
            item = ModelSupply(self.model, reason=Reason.MODEL_NOT_FOUND, message=words)
        self.refusal = item if item is not None and item.reason is not None else None
        self.outlook.supply(item, self.max_concurrent, now)
        self._catalog = catalog
        self.turns.catch_up(catalog)
        return losses

    def release_session(self, session_id: str) -> None:
        """A session that was silent gets grants again: its tickets take their old places."""
        self.turns.unpark(session_id)

    def decide(self, now: float) -> Decisions | None:
        """Grants and refuses what can be; None when nothing changes.

        1. Supply says that the model can't be had: all are refused who were judged by no newer catalogue.
        2. The ticket whose turn it is, of those for whom an instance has room, is granted a slot;
           a session that is silent is passed over and keeps its places.
        3. One whose caller's deadline has passed is refused instead.
        """
        if not self.waiting:
            return None
        decisions = Decisions()
        if self.refusal is not None:  # 1
            judged = [ticket for ticket in self.waiting.values() if ticket.catalog <= self._catalog]
            decisions.refusals = [self._refused(ticket, now) for ticket in judged]
        while turn := self.turns.take(lambda excluded: self._room(excluded, now), now):  # 2
            ticket, slot = turn
            if ticket.deadline <= now:  # 3
                decisions.refusals.append(self._past_deadline(ticket))
                continue
            if ticket.affinity:
                slot = self._same_again(ticket, now) or slot
            self._grant(ticket, slot, now)
            decisions.grants.append((ticket, slot.address, len(self.waiting), self.active))
        return decisions if decisions.grants or decisions.refusals else None

    def expire(self, now: float) -> list[Refusal]:
        """Refuses the tickets whose time is over.

        1. The caller's own deadline.
        2. The queue timeout, counted while a slot is waited for.
        3. The model's start deadline, when lifecycle doesn't say in time what became of the start.
        """
        refusals: list[Refusal] = []
        while ticket := self.turns.past_deadline(now):  # 1
            refusals.append(self._past_deadline(ticket))
        while ticket := self.turns.impatient(self._clock.read(now)):  # 2
            words = f"no slot of model '{self.model}' became free within {self._limits.queue_timeout:g} s"
            refusals.append(self._timed_out(ticket, words, now))
        if self._clock.overdue(now):  # 3
            words = f"the model '{self.model}' did not become ready in time"
            refusals += [
                self._timed_out(ticket, words, now)
                for ticket in list(self.waiting.values())
                if ticket.arrived < self._clock.loads_until
            ]
        return refusals

    def shift(self, gap: float) -> None:
        """The loop was away for `gap` seconds: what admission itself measures begins so much later."""
        self._clock.shift(gap)
        for slot in self.slots.values():
            slot.held_until += gap
            slot.avoided_until += gap

    def sample(self, now: float) -> None:
        """Once a second: the arrival rate, as a mean over about a minute; the pace of the queue; and while
        others wait, leases that are held for longer than they were charged are charged on."""
        self.arrival_rate += (self.tally.offered - self._offered - self.arrival_rate) / 60
        self._offered = self.tally.offered
        self.outlook.sample(now, bool(self.waiting))
        self.told_waiting &= bool(self.waiting)
        for slot in self.slots.values() if self.waiting else ():
            for ticket in slot.leases.values():
                over = now - ticket.granted - ticket.charged
                if over > 0.0:
                    ticket.charged += over
                    self.turns.charge(ticket.tenant, over)

    # --- what others may know --------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Leases."""
        return sum([len(slot.leases) for slot in self.slots.values()])

    def view(self) -> QueueView:
        """The queue as callers are told."""
        return QueueView(len(self.waiting), self.active, self.max_concurrent, self.max_queue)

    def effective_slots(self, now: float) -> int:
        """Leases that there may be now, over all instances."""
        return sum([slot.effective(now, self.guarded) for slot in self.slots.values()])

    def full(self) -> bool:
        """An offer would be refused, unless `decide` makes room before."""
        return len(self.waiting) >= self.max_queue

    def idle(self, now: float) -> bool:
        """Nothing of this gate is worth keeping."""
        return not self.waiting and not self.slots and not self.outlook.interest(now)

    # --- inside ----------------------------------------------------------------------------------------

    def _take_in(self, ticket: Ticket, now: float) -> None:
        ticket.become(Phase.WAITING)
        ticket.model = self.model  # equal ones of its own would be a fifth of what a waiting ticket costs
        if ticket.catalog == self._catalog:
            ticket.catalog = self._catalog
        ticket.queued = now
        ticket.patience = self._clock.read(now) + self._limits.queue_timeout
        self.turns.add(ticket, self._catalog)

    def _room(self, excluded: frozenset[str], now: float) -> Slot | None:
        """The instance with the most free slots; None when none has any."""
        if excluded:
            excluded = self._avoidable(excluded, now)
        best, most = None, 0
        for slot in self.slots.values():
            free = slot.effective(now, self.guarded) - len(slot.leases)
            if free > most and slot.id not in excluded:
                best, most = slot, free
        return best

    def _avoidable(self, excluded: frozenset[str], now: float) -> frozenset[str]:
        """What is excluded, while another instance may serve; otherwise a failed one is better than none,
        after the time that whoever failed there has asked for."""
        if any(slot.id not in excluded and slot.state in MAY_SERVE for slot in self.slots.values()):
            return excluded
        slots = [self.slots[name] for name in excluded if name in self.slots]
        return frozenset(slot.id for slot in slots if slot.avoided_until > now)

    def _same_again(self, ticket: Ticket, now: float) -> Slot | None:
        slot = self.slots.get(self._affinities.of(ticket))
        if slot is None or slot.id in self._avoidable(ticket.excluded, now):
            return None
        return slot if slot.effective(now, self.guarded) > len(slot.leases) else None

    def _grant(self, ticket: Ticket, slot: Slot, now: float) -> None:
        tally = self.tally
        tally.ticket_ends[TicketEnd.GRANTED] += 1
        tally.granted += 1
        tally.waited(now - ticket.arrived)
        for_a_slot = self._clock.read(now) - (ticket.patience - self._limits.queue_timeout)
        ticket.loading = max(0.0, now - ticket.queued - for_a_slot)
        slot.grants += 1
        ticket.charged = tally.length(ticket.tenant)
        self.turns.charge(ticket.tenant, ticket.charged)
        if ticket.affinity:
            self._affinities.granted(ticket, slot.id)
        self._lease(ticket, slot, now)

    def _lease(self, ticket: Ticket, slot: Slot, now: float) -> None:
        ticket.become(Phase.LEASED)
        ticket.instance_id, ticket.granted = slot.id, now
        slot.leases[ticket.id] = ticket

    def _release(self, ticket: Ticket, outcome: int, now: float) -> None:
        """The session gave the lease back."""
        slot = self.slots[ticket.instance_id]
        if outcome == Outcome.CONNECT_FAILED:
            slot.held_until = now + CONNECT_FAILED_HOLD
        elif outcome == Outcome.BACKPRESSURE:  # refused, not served: no service time, and never a fault
            self.tally.halvings += slot.pressure.halve(ticket.granted, now, slot.slots)
        elif outcome != Outcome.UNUSED:
            self.tally.served(ticket.tenant, now - ticket.granted)
        self._unlease(ticket, LeaseEnd.RELEASED, now)

    def _unlease(self, ticket: Ticket, kind: LeaseEnd, now: float) -> None:
        self.turns.charge(ticket.tenant, now - ticket.granted - ticket.charged)
        slot = self.slots[ticket.instance_id]
        del slot.leases[ticket.id]
        self.tally.lease_ends[kind] += 1
        ticket.instance_id = ""
        if not slot.leases:
            if slot.state == InstanceState.DRAINING:
                self.urgent = True
            if not slot.known:
                del self.slots[slot.id]

    def _leave(self, ticket: Ticket, kind: TicketEnd) -> None:
        """A ticket stops waiting without a lease."""
        self.turns.remove(ticket)
        self.tally.ticket_ends[kind] += 1

    def _refuse(
        self, ticket: Ticket, reason: Reason, words: str, retry_after: float, end: TicketEnd
    ) -> Refusal:
        if ticket.id in self.waiting:
            self._leave(ticket, end)
        else:
            self.tally.ticket_ends[end] += 1
        ticket.become(Phase.ENDED)
        self.tally.refusals[reason] = self.tally.refusals.get(reason, 0) + 1
        return Refusal(ticket, reason, words, retry_after, self.view(), end)

    def _queue_full(self, ticket: Ticket, now: float) -> Refusal:
        retry = self.outlook.retry_after(now, ticket.tenant)
        count = f"{len(self.waiting)} waiting"
        words = f"the queue of model '{self.model}' is full ({count}); try again in {retry:.0f} s"
        return self._refuse(ticket, Reason.QUEUE_FULL, words, retry, TicketEnd.REFUSED)

    def _refused(self, ticket: Ticket, now: float) -> Refusal:
        why = self.refusal
        assert why is not None
        assert why.reason is not None
        chance = ticket.id[1] * _GOLDEN % 1.0  # those of a session that are refused together are told apart
        retry = estimate.retry_after(why.retry_after, chance) if why.retry_after else 0.0
        return self._refuse(ticket, why.reason, why.message, retry, TicketEnd.REFUSED)

    def _unreachable(self, ticket: Ticket, now: float) -> Refusal:
        """The model will be ready too late for this caller, who is expected back."""
        self.urgent |= self.outlook.expect_back(now)
        ready, left = self.outlook.ready_in(now) or 0.0, max(0.0, ticket.deadline - now)
        retry = self.outlook.retry_ready(now)
        words = f"the model '{self.model}' is expected to be ready in {ready:.1f} s, after the request's own "
        words += f"deadline of {left:.1f} s; try again in {retry:.0f} s"
        return self._refuse(ticket, Reason.DEADLINE_UNREACHABLE, words, retry, TicketEnd.REFUSED)

    def _timed_out(self, ticket: Ticket, words: str, now: float) -> Refusal:
        """It waited for as long as admission lets anybody wait."""
        retry = self.outlook.retry_after(now, ticket.tenant)
        return self._refuse(ticket, Reason.QUEUE_TIMEOUT, words, retry, TicketEnd.EXPIRED)

    def _past_deadline(self, ticket: Ticket) -> Refusal:
        """A waiting ticket, or one whose turn had come when it was too late."""
        words = f"no slot of model '{self.model}' became free within the request's own deadline"
        return self._refuse(ticket, Reason.DEADLINE_EXCEEDED, words, 0.0, TicketEnd.EXPIRED)
