"""Acquire, Renew and Release: slots for services that talk to a model server themselves, one call each.

What is granted stands in the dispatcher's book (`holder.py`); here are the calls that wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator

import grpc

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_admission.affinity import MAX_AFFINITY
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.holder import Holder, number
from tidegate_admission.rates import Used
from tidegate_admission.session import Held
from tidegate_admission.ticket import Band, Id, Outcome, Reason, Refusal, Ticket
from tidegate_admission.wire import MAX_SESSION_ID, invalid, tenant
from tidegate_chassis.errors import Refused

CODES: dict[Reason, grpc.StatusCode] = {
    Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.QUEUE_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.DEADLINE_UNREACHABLE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.MODEL_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.MODEL_FAILED: grpc.StatusCode.UNAVAILABLE,
    Reason.NO_CAPACITY: grpc.StatusCode.UNAVAILABLE,
    Reason.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.EXPIRED: grpc.StatusCode.NOT_FOUND,
    Reason.REVOKED: grpc.StatusCode.NOT_FOUND,
    Reason.INSTANCE_LOST: grpc.StatusCode.NOT_FOUND,
    Reason.SUPERSEDED: grpc.StatusCode.ABORTED,
    Reason.RECLAIMED: grpc.StatusCode.NOT_FOUND,
    Reason.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
}
"""The status of each reason for which a unary call is refused."""

_ENDED = {
    Reason.EXPIRED: "the lease is not known: it was not renewed within its time to live",
    Reason.REVOKED: "an operator has revoked the lease",
    Reason.INSTANCE_LOST: "the instance that the lease was on is gone",
    Reason.RECLAIMED: "the lease was released",
}
_STOPPING = {
    Reason.SUPERSEDED: "a newer admission has taken over",
    Reason.DRAINING: "admission is stopping",
}


def refused(reason: Reason, message: str, retry_after: float = 0.0) -> Refused:
    """A refusal as the wire says it."""
    return Refused(CODES[reason], f"REASON_{reason.name}", message, retry_after)


class Wait:
    """The calls that wait for one lease: a request and its repeats."""

    def __init__(self) -> None:
        self.calls: set[object] = set()
        self.answer: str | Refused = ""
        """The instance's address, or why there is none."""
        self.answered = asyncio.Event()


class Unary:
    """The unary verbs."""

    def __init__(
        self, dispatcher: Dispatcher, clock: Callable[[], float], fatal: Callable[[Exception], None]
    ) -> None:
        self._dispatcher, self._clock, self._fatal = dispatcher, clock, fatal
        self._waits: dict[Id, Wait] = {}
        """Until their answer was taken by a call."""
        self._closed: Refused | None = None

    async def acquire(
        self, request: pb.AcquireRequest, remaining: float | None, peer: str, trace_parent: str
    ) -> pb.AcquireResponse:
        """Waits for a slot; `remaining` seconds at most, None = no deadline of its own.

        1. Granted: the lease is this holder's from the moment in which a call takes the answer.
        2. Refused: by the gate, or because the service stops.
        3. Cancelled, with its deadline or its connection, as the last call that waits: the ticket ends, and a
           slot that was granted meanwhile goes back at once.
        """
        with self._core():
            holder = self._holder(request, peer)
            n = number(request.request_id)
            wait = self._join(holder, n, request)
        call = object()
        wait.calls.add(call)
        try:
            with self._core():
                ticket = _ticket(request, n, self._clock(), remaining, trace_parent)
                self._dispatcher.acquire(holder, ticket, self._clock())
                self._dispatcher.settle(self._clock())
            await wait.answered.wait()
        except BaseException:  # 3
            wait.calls.discard(call)
            if not wait.calls and self._waits.get((holder.id, n)) is wait:
                self._give_up(holder, n)
            raise
        if isinstance(wait.answer, Refused):  # 2
            raise wait.answer
        if self._waits.get((holder.id, n)) is wait:
            del self._waits[holder.id, n]
        return self._granted(holder, n, wait.answer)  # 1

    def renew(self, request: pb.RenewRequest) -> pb.RenewResponse:
        """Keeps a lease.

        1. It is in the book: its time to live begins again.
        2. It has ended, and it is remembered why.
        3. It is unknown, and the restart window is open: it is restated.
        """
        now, n = self._clock(), _number(request.holder_id, request.lease_id)
        with self._core():
            holder = self._known(request.holder_id, now)
            if holder is None or not (n in holder.leases or n in holder.tickets or n in holder.ended):  # 3
                if self._dispatcher.books.window.over or not request.model or not request.instance_id:
                    raise refused(Reason.EXPIRED, _ENDED[Reason.EXPIRED])
                holder = holder or self._open(request.holder_id, now)
                self._restate(holder, n, request, now)
            if not holder.renew(n, now):  # 2
                raise _ended(holder, n)
        return pb.RenewResponse(lease_ttl_ms=self._ttl_ms())  # 1

    def release(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        """Ends a lease; an unknown one is only counted."""
        now, n = self._clock(), _number(request.holder_id, request.lease_id)
        with self._core():
            holder = self._known(request.holder_id, now)
            if holder is None or n not in holder.leases:
                self._dispatcher.books.unknown_ids += 1
                return pb.ReleaseResponse(known=False)
            used = Used(request.prompt_tokens, request.completion_tokens)
            self._dispatcher.done(holder, n, request.outcome or Outcome.OK, now, used)
            holder.released(n)
            self._dispatcher.settle(now)
        return pb.ReleaseResponse(known=True)

    def close(self, reason: Reason) -> None:
        """The service ends: no call waits any longer, and none may come."""
        self._closed = self._closed or refused(reason, _STOPPING[reason], 1.0)
        for wait in self._waits.values():
            if not wait.answered.is_set():
                wait.answer = self._closed
                wait.answered.set()

    # --- inside ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _core(self) -> Iterator[None]:
        """What goes wrong in the core is fatal for the service; a refusal is not."""
        try:
            yield
        except Refused:
            raise
        except Exception as error:
            self._fatal(error)
            raise

    def _holder(self, request: pb.AcquireRequest, peer: str) -> Holder:
        if self._closed is not None:
            raise self._closed
        if not 0 < len(request.holder_id) <= MAX_SESSION_ID or not request.request_id or not request.model:
            raise invalid(
                f"an Acquire needs a holder_id of 1 to {MAX_SESSION_ID} characters, a request_id and a model"
            )
        now = self._clock()
        holder = self._known(request.holder_id, now) or self._open(request.holder_id, now)
        holder.holder = f"unary, {peer}"
        return holder

    def _known(self, holder_id: str, now: float) -> Holder | None:
        session = self._dispatcher.sessions.get(holder_id)
        if session is not None and not isinstance(session, Holder):
            raise invalid("this holder_id is the session of an edge; choose one at random")
        if session is not None:
            session.hear(now)
        return session

    def _open(self, holder_id: str, now: float) -> Holder:
        if not 0 < len(holder_id) <= MAX_SESSION_ID:
            raise invalid(f"a holder_id has 1 to {MAX_SESSION_ID} characters")
        holder = Holder(holder_id, self._dispatcher.lease_ttl, self._tell, now)
        self._dispatcher.sessions[holder_id] = holder
        return holder

    def _join(self, holder: Holder, n: int, request: pb.AcquireRequest) -> Wait:
        """The wait of this request, shared with its repeats."""
        known = holder.tickets.get(n) or holder.leases.get(n)
        if known is not None and known.model != request.model:
            raise invalid(f"this request_id was used for the model '{known.model}'; take a new one")
        if known is None and n in holder.ended:
            raise _ended(holder, n)
        holder.renew(n, self._clock())
        return self._waits.setdefault((holder.id, n), Wait())

    def _tell(self, ticket_id: Id, answer: str | Refusal) -> None:
        """The dispatcher has decided. A refusal is final; a grant counts when a call has taken it."""
        wait = self._waits.get(ticket_id)
        if wait is None or wait.answered.is_set():
            return
        if isinstance(answer, Refusal):
            del self._waits[ticket_id]
            wait.answer = refused(answer.reason, answer.message, answer.retry_after)
        else:
            wait.answer = answer
        wait.answered.set()

    def _give_up(self, holder: Holder, n: int) -> None:
        """Nobody waits any more."""
        del self._waits[holder.id, n]
        with self._core():
            if n in holder.tickets or n in holder.leases:
                self._dispatcher.done(holder, n, Outcome.UNUSED, self._clock())
                holder.unused(n)
                self._dispatcher.settle(self._clock())

    def _granted(self, holder: Holder, n: int, address: str) -> pb.AcquireResponse:
        lease = holder.leases.get(n)
        if lease is None:
            raise _ended(holder, n)  # it was lost before this call could take it
        if not address:
            words = "the lease was restated and its instance's address isn't known yet"
            raise refused(Reason.UNAVAILABLE, words, 1.0)
        return pb.AcquireResponse(
            lease_id=f"{holder.id}/{n}",
            instance_id=lease.instance_id,
            address=address,
            lease_ttl_ms=self._ttl_ms(),
        )

    def _restate(self, holder: Holder, n: int, request: pb.RenewRequest, now: float) -> None:
        held = Held(n, request.model, request.instance_id, tenant(request.tenant))
        self._dispatcher.restate(holder, held, True, now)
        holder.rostered |= n in holder.leases
        self._dispatcher.settle(now)

    def _ttl_ms(self) -> int:
        return int(self._dispatcher.lease_ttl * 1000)


def _ended(holder: Holder, n: int) -> Refused:
    _, reason = holder.ended.get(n, (0.0, Reason.EXPIRED))
    return refused(reason, _ENDED[reason])


def _number(holder_id: str, lease_id: str) -> int:
    holder, _, n = lease_id.rpartition("/")
    if not holder or holder != holder_id or not (n.isascii() and n.isdigit() and len(n) < 20):
        raise invalid("a lease_id is given by Acquire, and begins with the holder_id")
    return int(n)


def _ticket(
    request: pb.AcquireRequest, n: int, now: float, remaining: float | None, trace_parent: str
) -> Ticket:
    return Ticket(
        (request.holder_id, n),
        request.model,
        now,
        tenant(request.tenant),
        request.band or Band.NORMAL,
        math.inf if remaining is None else now + remaining,
        tokens=request.token_estimate,
        affinity=request.affinity[:MAX_AFFINITY],
        trace_parent=trace_parent,
    )
