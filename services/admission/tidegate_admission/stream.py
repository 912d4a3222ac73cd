"""One session's stream: a reader that calls the dispatcher, a bounded outbox, a writer that drains it.

The dispatcher never waits for a stream. What is put into the outbox in one turn of the loop goes out as one
message; a session that doesn't take its messages is closed before the outbox fills the memory.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

import grpc
import structlog

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_admission import wire
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.progress import FlowProgress
from tidegate_admission.session import Hello, Session, SupersededError
from tidegate_admission.ticket import Reason, Refusal, Ticket
from tidegate_chassis.errors import Refused

MAX_ANSWERS = 2_000
"""Answers in one response: some 200 KiB, far below the limit of a message."""
MAX_OUTBOX = 20_000
"""Answers that may wait for a session to take them; beyond it the stream is closed."""
CLOSE_GRACE = 1.0
"""Seconds for a stream to end by itself after it was closed, before its call is cancelled."""

log = structlog.get_logger("tidegate.admission")

_WORDS = {
    Reason.SUPERSEDED: "a newer stream of this session, or a newer admission, has taken over",
    Reason.DRAINING: "admission is stopping",
    Reason.INVALID: "the session did not take its answers",
}


class Stream:
    """The stream of one session, and its outbox (`session.Outbox`)."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        incarnation: int,
        clock: Callable[[], float],
        fatal: Callable[[Exception], None],
        max_outbox: int = MAX_OUTBOX,
    ) -> None:
        self.seq = 1
        self.session: Session | None = None
        self._dispatcher, self._incarnation, self._clock, self._fatal = dispatcher, incarnation, clock, fatal
        self._max_outbox = max_outbox
        self._rates = dispatcher.books.rates
        self._response = pb.SessionResponse(seq=1)
        self._answers = self._response.answers
        self._full: deque[pb.SessionResponse] = deque()
        self._wake = asyncio.Event()
        self._end: Refused | None = None
        self._ended = False
        self._writer: asyncio.Task[None] | None = None

    # --- the outbox ------------------------------------------------------------------------------------

    def welcome(self) -> None:
        """See `session.Outbox`."""
        ttl = int(self._dispatcher.lease_ttl * 1000)
        self._add().welcome.CopyFrom(pb.Welcome(incarnation=self._incarnation, lease_ttl_ms=ttl))

    def grant(
        self, ticket: Ticket, address: str, waiting: int, active: int, max_concurrent: int, max_queue: int
    ) -> None:
        """See `session.Outbox`."""
        grant = self._add().grant
        grant.n = ticket.id[1]
        if ticket.moves:
            grant.moves = ticket.moves
        grant.instance_id = ticket.instance_id
        grant.address = address
        grant.waited_ms = max(0, int((ticket.granted - ticket.arrived) * 1000))
        grant.loading_ms = int(ticket.loading * 1000)
        queue = grant.queue
        queue.waiting = waiting
        queue.active = active
        queue.max_concurrent = max_concurrent
        queue.max_queue = max_queue
        if self._rates is not None and (state := self._rates.state(ticket.tenant, self._clock())):
            wire.put_rates(grant.rates, state)

    def refuse(self, refusal: Refusal) -> None:
        """See `session.Outbox`."""
        answer = self._add().refusal
        answer.n = refusal.ticket.id[1]
        answer.reason = int(refusal.reason)  # type: ignore[assignment]  # the numbers are the contract's
        answer.retry_after_ms = int(refusal.retry_after * 1000)
        answer.message = refusal.message
        queue = refusal.queue
        answer.queue.CopyFrom(
            pb.QueueState(
                waiting=queue.waiting,
                active=queue.active,
                max_concurrent=queue.max_concurrent,
                max_queue=queue.max_queue,
            )
        )
        if self._rates is not None and (state := self._rates.state(refusal.ticket.tenant, self._clock())):
            wire.put_rates(answer.rates, state)

    def lost(self, n: int, reason: Reason) -> None:
        """See `session.Outbox`."""
        answer = self._add().lost
        answer.n = n
        answer.reason = int(reason)  # type: ignore[assignment]  # the numbers are the contract's

    def ack(self, number: int) -> None:
        """See `session.Outbox`."""
        self._add().heartbeat_ack.number = number

    def query(self, number: int) -> None:
        """See `session.Outbox`."""
        self._add().held_query.number = number

    def progress(self, flow: FlowProgress) -> None:
        """See `session.Outbox`."""
        answer = self._add().progress
        answer.model, answer.tenant, answer.loading = flow.model, flow.tenant, flow.loading
        answer.bands.extend(flow.bands)  # type: ignore[arg-type]  # the numbers are the contract's
        answer.position, answer.step, answer.drain_rate = flow.position, flow.step, flow.drain_rate
        if flow.ready_in is not None:
            answer.ready_in_ms = int(flow.ready_in * 1000)

    def close(self, reason: Reason) -> None:
        """Ends the stream: ABORTED with the reason. One that is stuck in a write is cancelled soon after."""
        if self._end is not None:
            return
        self._end = Refused(grpc.StatusCode.ABORTED, f"REASON_{reason.name}", _WORDS[reason])
        self._wake.set()
        asyncio.get_running_loop().call_later(CLOSE_GRACE, self._cut)

    # --- the call ----------------------------------------------------------------------------------------

    async def run(self, requests: AsyncIterator[pb.SessionRequest]) -> AsyncIterator[pb.SessionResponse]:
        """Serves the call: gives its responses until the client leaves or the stream is closed."""
        self._writer = asyncio.current_task()
        reader = asyncio.create_task(self._read(requests))
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while (response := self._take()) is not None and self._end is None:
                    yield response
                if self._end is not None:
                    raise self._end
                if reader.cancelled():  # in grpc.aio a cancelled handler tells its client nothing
                    raise Refused(grpc.StatusCode.ABORTED, "REASON_UNAVAILABLE", "the stream's reader ended")
                if reader.done():
                    reader.result()
                    return
        finally:
            self._ended = True
            reader.cancel()
            if self.session is not None:
                self._dispatcher.stream_ended(self.session, self)

    async def _read(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        """Hands on what comes. An error of the transport ends this stream alone."""
        parts = wire.HelloParts()
        try:
            async for request in requests:
                if self._end is not None or self._handle(request, parts):
                    return
        except Refused as refused:
            self._end = self._end or refused
        finally:
            self._wake.set()

    def _handle(self, request: pb.SessionRequest, parts: wire.HelloParts) -> bool:
        """Takes in one message; true when it was the last one. What goes wrong here is the core's: fatal."""
        now = self._clock()
        try:
            if self.session is not None:
                return self._take_in(self.session, request, now)
            if request.WhichOneof("content") != "hello":
                raise wire.invalid("a session begins with Hello")
            self._open(parts.add(request.hello, now), now)
        except Refused:
            raise
        except Exception as error:
            self._fatal(error)
            raise
        return False

    def _open(self, hello: Hello | None, now: float) -> None:
        """Takes in a complete Hello, and keeps nothing of it: its tickets would live as long as this."""
        if hello is None:
            return
        try:
            self.session = self._dispatcher.hello(self, hello, now)
        except SupersededError:
            words = _WORDS[Reason.SUPERSEDED]
            raise Refused(grpc.StatusCode.ABORTED, "REASON_SUPERSEDED", words) from None
        log.info(
            "session.open",
            session_id=hello.session_id,
            holder=hello.holder,
            held=len(hello.held),
            waiting=len(hello.waiting),
        )

    def _take_in(self, session: Session, request: pb.SessionRequest, now: float) -> bool:
        """Hands one message to the dispatcher; true when it was the last one."""
        kind = request.WhichOneof("content")
        if kind == "operations":
            wire.operations(self._dispatcher, session, request.operations, now)
        elif kind == "heartbeat":
            beat = request.heartbeat
            self._dispatcher.heartbeat(
                session, beat.number, beat.held_count, beat.held_digest, beat.responses_seen, now
            )
        elif kind == "held_statement":
            said = request.held_statement
            self._dispatcher.statement(session, said.number, said.responses_seen, wire.held(said.held), now)
        elif kind == "goodbye":
            log.info("session.goodbye", session_id=session.id)
            self._dispatcher.goodbye(session, now)
            return True
        else:
            raise wire.invalid("a message of this session can't come here")
        return False

    def _add(self) -> pb.Answer:
        answers = self._answers
        if len(answers) >= MAX_ANSWERS:
            self._rotate()
            answers = self._answers
            if len(self._full) * MAX_ANSWERS >= self._max_outbox and self._end is None:
                log.warning("session.slow", session_id=self.session.id if self.session else "")
                self.close(Reason.INVALID)
        self._wake.set()
        return answers.add()

    def _rotate(self) -> None:
        if self._end is None:
            self._full.append(self._response)
        self.seq += 1
        self._response = pb.SessionResponse(seq=self.seq)
        self._answers = self._response.answers

    def _take(self) -> pb.SessionResponse | None:
        if not self._full and self._answers:
            self._rotate()
        return self._full.popleft() if self._full else None

    def _cut(self) -> None:
        if not self._ended and self._writer is not None:
            self._writer.cancel()
