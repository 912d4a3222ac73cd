"""A ticket: one request's place in the queue, then its lease.

A ticket is driven from two sides: the relay calls `granted`, `done` and `move`; the session hands it
admission's answers. Every step but the wait is synchronous, so nothing can be cancelled half-way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_edge.usage import UNKNOWN, Tokens

DEFAULT_TENANT = "default"
"""Everybody without a tenant; on the wire its name may be empty too."""


class Outcome(Enum):
    """How a ticket or lease ended; the proto's enum."""

    OK = pb.OUTCOME_OK
    CLIENT_GONE = pb.OUTCOME_CLIENT_GONE
    UPSTREAM_ERROR = pb.OUTCOME_UPSTREAM_ERROR
    CONNECT_FAILED = pb.OUTCOME_CONNECT_FAILED
    BACKPRESSURE = pb.OUTCOME_BACKPRESSURE
    TIMEOUT = pb.OUTCOME_TIMEOUT
    UNUSED = pb.OUTCOME_UNUSED


class Band(Enum):
    """How urgent a request is; the proto's enum."""

    HIGH = pb.BAND_HIGH
    NORMAL = pb.BAND_NORMAL
    LOW = pb.BAND_LOW


class Phase(Enum):
    """Where a ticket is. WAITING -> HELD (a grant) -> WAITING (a move, or its instance has gone before it
    answered); every phase -> ENDED (final)."""

    WAITING = "waiting"
    HELD = "held"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class QueueView:
    """A model's queue at the moment of a grant or refusal, for response headers."""

    waiting: int
    active: int
    max_concurrent: int
    max_queue: int


@dataclass(frozen=True, slots=True)
class Allowance:
    """What was left of one of the tenant's rates at that moment."""

    limit: int
    """Per minute."""
    remaining: int
    reset: int
    """Milliseconds until all of it may be had again."""


Rates = dict[str, Allowance]
"""By what they limit: `requests`, `tokens`. Only those that the tenant has."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot on an instance."""

    instance_id: str
    address: str
    """Base URL of the model server."""
    waited: float
    """Seconds in the queue."""
    loading: float
    """Seconds of these in which the model was loading."""
    queue: QueueView
    rates: Rates | None = None
    """None = the tenant has none."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How a waiting ticket is getting on."""

    position: int
    """Place in the queue, from 1."""
    eta: float
    """Seconds until a slot is expected, or, while it loads, until the model is up; 0 = unknown."""
    loading: bool
    """The model is starting (rather than busy)."""


class TicketRefused(Exception):
    """Raised by `Ticket.granted` when the ticket ended without a slot."""

    def __init__(
        self, reason: str, message: str, retry_after: float, queue: QueueView, rates: Rates | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        """Name of the proto's Reason without its prefix, such as QUEUE_FULL."""
        self.message = message
        """For the caller."""
        self.retry_after = retry_after
        """Seconds; 0 = a retry can't help."""
        self.queue = queue
        self.rates = rates


class Verbs(Protocol):
    """What a ticket says to its session."""

    def finish(self, ticket: Ticket, outcome: Outcome, tokens: Tokens) -> None:
        """The ticket or lease has ended."""

    def send_move(self, ticket: Ticket, not_instance: str, outcome: Outcome, delay: float) -> None:
        """The lease is given back to wait again; on that instance for `delay` seconds at least."""


class Ticket:
    """One request's place in the queue, then its lease. Made by `Session.acquire`.

    Every method but `granted` is synchronous: it changes the phase and puts a verb on the session's list.
    """

    __slots__ = (
        "__weakref__", "_deadline", "_excluded", "_grant", "_lost", "_offer", "_offered", "_refusal",
        "_retaken", "_session", "_settled", "granted_at", "moves", "n", "phase", "progress",
    )  # fmt: skip

    def __init__(self, session: Verbs, offer: pb.Acquire, now: float) -> None:
        self.n = offer.n
        self.phase = Phase.WAITING
        self.moves = 0
        self.progress: Progress | None = None
        self.granted_at = 0.0
        self._session = session
        self._offer = offer
        self._offered = now
        self._deadline = now + offer.deadline_ms / 1000 if offer.deadline_ms else 0.0
        self._excluded: list[str] = []
        self._grant: Grant | None = None
        self._refusal: tuple[str, str, float, QueueView, Rates | None] | None = None
        self._lost: Callable[[str], None] | None = None
        self._retaken: Callable[[], None] | None = None
        self._settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<Ticket {self.n} {self._offer.model} {self.phase.value} moves={self.moves}>"

    @property
    def flow(self) -> tuple[str, str, int]:
        """Whose queue it is in: model, tenant and band, as admission names them."""
        tenant = self._offer.tenant
        return self._offer.model, "" if tenant == DEFAULT_TENANT else tenant, self._offer.band

    async def granted(self) -> Grant:
        """Waits for the grant. Raises TicketRefused. Cancelling the wait ends nothing: call `done`."""
        while self._refusal is None and self._grant is None:
            await self._settled  # the grant may have been taken back before this wait went on
        if self._refusal is not None:
            raise TicketRefused(*self._refusal)  # a kept one would hold frames that hold this ticket
        assert self._grant is not None, "there is a grant or a refusal"
        return self._grant

    def done(self, outcome: Outcome, tokens: Tokens = UNKNOWN) -> None:
        """Ends the ticket or lease, whichever it is now. The first call counts, later ones do nothing.

        While it waits it is UNUSED, whatever the caller says: a grant may be on its way, of which nothing
        was used, so that nothing is to be paid for it.
        """
        if self.phase is Phase.ENDED:
            return
        outcome = Outcome.UNUSED if self.phase is Phase.WAITING else outcome
        self.phase = Phase.ENDED
        self._lost = self._retaken = None
        self._session.finish(self, outcome, tokens)

    def holds(self, grant: Grant) -> bool:
        """This very grant is still its own."""
        return self._grant is grant and self.phase is Phase.HELD

    def move(self, not_instance: str, outcome: Outcome, delay: float = 0.0) -> None:
        """Gives the slot back and waits again, elsewhere if there is an elsewhere; there again after `delay`
        seconds at the earliest. Only while held."""
        if self.phase is not Phase.HELD:
            raise ValueError(f"only a held ticket can be moved: {self!r}")
        self.moves += 1
        self._wait_again(not_instance)
        self._session.send_move(self, not_instance, outcome, delay)

    def on_lost(self, lost: Callable[[str], None], retaken: Callable[[], None] | None = None) -> None:
        """`lost(reason)` is called once when the lease ends otherwise; the relay must end then.

        `retaken()` is called instead, and maybe again, when its instance has gone before it answered: the
        ticket waits for another slot.
        """
        self._lost, self._retaken = lost, retaken

    def answered(self) -> None:
        """The instance has answered: from now on the request ends with it."""
        self._retaken = None

    # What the session makes of admission's answers.

    def take_grant(self, grant: pb.Grant, now: float) -> bool:
        """Takes a grant; False when it is stale (an earlier move's) or a repeat."""
        if self.phase is not Phase.WAITING or grant.moves < self.moves:
            return False
        self.phase = Phase.HELD
        self.granted_at = now
        waited, loading = grant.waited_ms / 1000, grant.loading_ms / 1000
        self._grant = Grant(
            grant.instance_id, grant.address, waited, loading, _view(grant.queue), _rates(grant)
        )
        self._settle()
        return True

    def take_refusal(self, refusal: pb.Refusal) -> None:
        """Ends a waiting ticket with a reason."""
        self.phase = Phase.ENDED
        reason = pb.Reason.Name(refusal.reason).removeprefix("REASON_")
        queue = _view(refusal.queue)
        retry_after = refusal.retry_after_ms / 1000
        self._refusal = (reason, refusal.message, retry_after, queue, _rates(refusal))
        self._lost = self._retaken = None
        self._settle()

    def take_loss(self, reason: str) -> None:
        """The lease is gone; tells the relay."""
        self.phase = Phase.ENDED
        lost, self._lost, self._retaken = self._lost, None, None
        if lost is not None:
            lost(reason)

    def retake(self) -> bool:
        """The instance is gone: waits for another slot, if it has not answered yet."""
        if self._retaken is None or self._grant is None:
            return False
        self._wait_again(self._grant.instance_id)
        self._retaken()
        return True

    def held_lease(self, now: float) -> pb.HeldLease:
        """The lease as a Hello or a held statement tells it."""
        assert self._grant is not None, "a held ticket has a grant"
        return pb.HeldLease(
            n=self.n,
            model=self._offer.model,
            instance_id=self._grant.instance_id,
            tenant=self._offer.tenant,
            age_ms=int((now - self.granted_at) * 1000),
            moves=self.moves,
        )

    def offer_again(self, now: float) -> pb.Acquire:
        """The offer for an id that admission has forgotten: as of a new one, with what time is left."""
        self.moves = 0
        return self.waiting_ticket(now).acquire

    def waiting_ticket(self, now: float) -> pb.WaitingTicket:
        """The ticket as a Hello tells it: what is left of its deadline, and its age."""
        offer = pb.Acquire()
        offer.CopyFrom(self._offer)
        if self._deadline:
            offer.deadline_ms = max(1, int((self._deadline - now) * 1000))
        return pb.WaitingTicket(
            acquire=offer,
            age_ms=int((now - self._offered) * 1000),
            moves=self.moves,
            excluded_instance_ids=self._excluded,
        )

    def _wait_again(self, not_instance: str) -> None:
        self.phase = Phase.WAITING
        self._grant = None
        self._excluded.append(not_instance)
        self._settled = asyncio.get_running_loop().create_future()

    def _settle(self) -> None:
        if not self._settled.done():
            self._settled.set_result(None)


def _rates(said: pb.Grant | pb.Refusal) -> Rates | None:
    if not said.HasField("rates"):
        return None
    found: Rates = {}
    if said.rates.HasField("requests"):
        found["requests"] = _allowance(said.rates.requests)
    if said.rates.HasField("tokens"):
        found["tokens"] = _allowance(said.rates.tokens)
    return found


def _allowance(one: pb.Allowance) -> Allowance:
    return Allowance(one.limit, one.remaining, one.reset_ms)


def _view(queue: pb.QueueState) -> QueueView:
    return QueueView(queue.waiting, queue.active, queue.max_concurrent, queue.max_queue)
