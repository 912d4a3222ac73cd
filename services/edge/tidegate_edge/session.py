"""The edge's side of its admission session: tickets that wait, leases that are relayed on, one stream.

The table of tickets holds weak references only. A ticket lives as long as the relay that works on it, so the
held set that heartbeats state is the set of live relays, not a number that somebody must remember to change:
a relay that vanished without a word is missing from the next statement, and admission takes its slot back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import structlog

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc
from tidegate_chassis import rpc
from tidegate_chassis.process import GapMeter, monotonic
from tidegate_edge.places import place
from tidegate_edge.ticket import Band, Outcome, Phase, Ticket
from tidegate_edge.usage import Tokens

log = structlog.get_logger("tidegate.edge.session")

_PART = 1000
"""Operations or stated ids in one message; keeps messages far below gRPC's 4 MiB."""
_MASK = (1 << 64) - 1
_GATHERING = 3
"""Turns of the loop in which more verbs may join a message: some 10 µs when nothing else is to be done. A
message costs as much as the rest of a request does, on both sides."""
_TICK = 0.25
"""Seconds between two looks at heartbeats, gaps and the control grace."""


class Session:
    """One edge process's session with admission: keeps the stream, batches verbs, states what is held."""

    def __init__(self, address: str, control_grace: float, clock: Callable[[], float] = monotonic) -> None:
        """`control_grace`: seconds that relays go on without an acknowledged heartbeat."""
        self.session_id = secrets.token_hex(8)
        self._address = address
        self._grace = control_grace
        self._clock = clock
        self._tickets: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()
        self._next = 1
        self._stream_seq = 0
        self._operations: list[pb.Operation] = []
        self._wake = asyncio.Event()
        self._connected = asyncio.Event()
        self._steady = asyncio.Event()
        self._steady.set()
        self._closing = False
        self._closed = asyncio.Event()
        self._ttl = 10.0
        self._seen = 0
        self._beats: dict[int, float] = {}
        self._beat_number = 0
        self._beat_due = 0.0
        self._query: int | None = None
        self._acknowledged = self._opened = clock()
        self._call: grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse] | None = None

    def __repr__(self) -> str:
        return f"<Session {self.session_id} held={len(self.held)} waiting={len(self.waiting)}>"

    @property
    def connected(self) -> bool:
        """Admission has welcomed the present stream."""
        return self._connected.is_set()

    @property
    def held(self) -> frozenset[int]:
        """Ids of the leases that live relays hold."""
        return frozenset(ticket.n for ticket in self._in(Phase.HELD))

    @property
    def waiting(self) -> frozenset[int]:
        """Ids of the tickets that wait."""
        return frozenset(ticket.n for ticket in self._in(Phase.WAITING))

    @property
    def steady(self) -> bool:
        """False after this process was away for so long that its leases may have gone to others."""
        return self._steady.is_set()

    async def steadied(self) -> None:
        """Waits until a heartbeat has been acknowledged after such a gap."""
        await self._steady.wait()

    async def available(self, patience: float) -> bool:
        """Whether the session is open, waiting up to `patience` seconds for it."""
        if self.connected:
            return True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._connected.wait(), patience)
        return self.connected

    def acquire(
        self,
        model: str,
        *,
        tenant: str = "",
        band: Band = Band.NORMAL,
        deadline: float = 0.0,
        catalog_generation: tuple[int, int] = (0, 0),
        token_estimate: int = 0,
        affinity: str = "",
        trace_parent: str = "",
        wants_progress: bool = False,
    ) -> Ticket:
        """Queues a ticket of a tenant (empty = `default`); `deadline` is the caller's own, in seconds
        from now, 0 = none."""
        operation = pb.Operation()  # filled in place: a message given to another one's constructor is copied
        offer = operation.acquire
        offer.n = self._next
        offer.model = model
        offer.tenant = tenant
        offer.band = band.value
        offer.deadline_ms = max(1, int(deadline * 1000)) if deadline else 0
        offer.catalog_generation.incarnation, offer.catalog_generation.n = catalog_generation
        offer.token_estimate = token_estimate
        offer.affinity = affinity
        offer.trace_parent = trace_parent
        offer.wants_progress = wants_progress
        self._next += 1
        ticket = Ticket(self, offer, self._clock())
        self._tickets[ticket.n] = ticket
        self._say(operation)
        return ticket

    def finish(self, ticket: Ticket, outcome: Outcome, tokens: Tokens) -> None:
        """Tells admission how a ticket ended (called by `Ticket.done`)."""
        self._tickets.pop(ticket.n, None)
        operation = pb.Operation()
        done = operation.done
        done.n, done.outcome = ticket.n, outcome.value
        if tokens.prompt or tokens.completion:
            done.prompt_tokens, done.completion_tokens = tokens.prompt, tokens.completion
            done.tokens_estimated = tokens.estimated
        elif tokens.none:
            done.without_tokens = True
        self._say(operation)

    def send_move(self, ticket: Ticket, not_instance: str, outcome: Outcome, delay: float) -> None:
        """Tells admission that a lease is given back to wait again (called by `Ticket.move`)."""
        self._say(
            pb.Operation(
                move=pb.Move(
                    n=ticket.n,
                    not_instance_id=not_instance,
                    outcome=outcome.value,
                    moves=ticket.moves,
                    delay_ms=int(delay * 1000),
                )
            )
        )

    async def run(self) -> None:
        """Keeps the session open until it is closed or cancelled. An error of its own ends it."""
        parts = [asyncio.create_task(self._keep_streams()), asyncio.create_task(self._watch())]
        try:
            ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in ended:
                part.result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            self._closed.set()

    async def close(self, patience: float = 1.0) -> None:
        """Says Goodbye: what is left of tickets and leases ends at once. Takes at most `patience` seconds."""
        self._closing = True
        self._wake.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), patience)

    # The stream.

    async def _keep_streams(self) -> None:
        while not self._closing:
            await self._keep_stream()

    async def _keep_stream(self) -> None:
        """Opens streams until one was welcomed and has ended. What goes wrong in one costs it alone: the next
        Hello says all that counts. Each has a connection of its own: gRPC takes one that went silent for a
        good one until its keepalive has run out."""
        for delay in rpc.reconnect_delays():
            try:
                async with rpc.connected(self._address) as channel:
                    await self._stream(admission_pb2_grpc.AdmissionServiceStub(channel))
            except grpc.RpcError as error:
                log.warning("the session's stream broke", error=rpc.describe(error), connected=self.connected)
            except asyncio.CancelledError:
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                    raise
                log.warning("the session's stream was given up; opening a new one")
            except asyncio.InvalidStateError:  # grpc.aio: written to after the peer had ended the call
                log.warning("the session's stream had ended", connected=self.connected)
            except Exception:
                self._connected.clear()  # so that the next one isn't opened without a pause
                log.exception("the session's stream failed; opening a new one")
            welcomed = self.connected
            self._connected.clear()
            if self._closing or welcomed:
                return
            await asyncio.sleep(delay)

    async def _stream(self, stub: admission_pb2_grpc.AdmissionServiceAsyncStub) -> None:
        self._stream_seq += 1
        self._seen = self._beat_number = 0
        self._beats.clear()
        self._query = None
        self._opened = self._clock()
        self._call = call = stub.Session()
        writer = asyncio.create_task(self._write(call))
        writer.add_done_callback(lambda ended: _end_with(ended, call))
        try:
            async for response in call:
                self._take(response)
        finally:
            call.cancel()  # an abandoned call would never be collected
            writer.cancel()
            with contextlib.suppress(asyncio.CancelledError, grpc.RpcError, asyncio.InvalidStateError):
                await writer

    def _hello(self) -> Iterator[pb.SessionRequest]:
        """The complete statement, in parts. Verbs said before it are contained in it."""
        now = self._clock()
        held = [ticket.held_lease(now) for ticket in self._in(Phase.HELD)]
        waiting = [ticket.waiting_ticket(now) for ticket in self._in(Phase.WAITING)]
        self._operations.clear()
        holder = f"{socket.gethostname()}:{os.getpid()}"
        count = max(1, -(-max(len(held), len(waiting)) // _PART))
        for i in range(count):
            part = slice(i * _PART, (i + 1) * _PART)
            yield pb.SessionRequest(
                hello=pb.Hello(
                    session_id=self.session_id,
                    stream_seq=self._stream_seq,
                    holder=holder,
                    last=i == count - 1,
                    held=held[part],
                    waiting=waiting[part],
                )
            )

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]) -> None:
        """Says Hello as soon as there is a connection, then whatever is said. A task of its own: in grpc.aio
        this wait doesn't end with a call that ends before it is connected; reading does."""
        await call.wait_for_connection()
        for part in self._hello():
            await call.write(part)
        while True:
            await self._wake.wait()
            for _ in range(_GATHERING):
                await asyncio.sleep(0)
            self._wake.clear()
            for message in self._outgoing():
                await call.write(message)
            if self._closing and not self._operations:
                await call.write(pb.SessionRequest(goodbye=pb.Goodbye()))
                await call.done_writing()
                return

    def _outgoing(self) -> list[pb.SessionRequest]:
        """What is to be sent now. Verbs and the statement that follows them are taken in one step: a verb
        said between the two would make the statement look wrong."""
        operations, self._operations = self._operations, []
        messages = []
        for i in range(0, len(operations), _PART):
            message = pb.SessionRequest()
            message.operations.operations.extend(operations[i : i + _PART])
            messages.append(message)
        now = self._clock()
        if self.connected and now >= self._beat_due:
            self._beat_due = now + self._ttl / 3
            self._beat_number += 1
            self._beats[self._beat_number] = now
            messages.append(pb.SessionRequest(heartbeat=self._heartbeat()))
        if self._query is not None:
            number, self._query = self._query, None
            statement = pb.HeldStatement(number=number, responses_seen=self._seen)
            statement.held.extend(ticket.held_lease(now) for ticket in self._in(Phase.HELD))
            messages.append(pb.SessionRequest(held_statement=statement))
        return messages

    def _heartbeat(self) -> pb.Heartbeat:
        held = self.held
        digest = sum(splitmix64(n) for n in held) & _MASK
        return pb.Heartbeat(
            number=self._beat_number, held_count=len(held), held_digest=digest, responses_seen=self._seen
        )

    def _take(self, response: pb.SessionResponse) -> None:
        now = self._clock()
        progress: list[pb.Progress] = []
        for answer in response.answers:
            kind = answer.WhichOneof("kind")
            if kind == "grant":
                self._take_grant(answer.grant, now)
            elif kind == "refusal":
                ticket = self._tickets.pop(answer.refusal.n, None)
                if ticket is not None and ticket.phase is Phase.WAITING:
                    ticket.take_refusal(answer.refusal)
            elif kind == "lost":
                self._take_loss(answer.lost, now)
            elif kind == "heartbeat_ack":
                self._acknowledge(answer.heartbeat_ack.number)
            elif kind == "progress":
                progress.append(answer.progress)
            elif kind == "held_query":
                self._query = answer.held_query.number
                self._wake.set()
            elif kind == "welcome":
                self._welcome(answer.welcome, now)
        if progress:
            place(list(self._tickets.values()), progress)
        self._seen = response.seq

    def _take_grant(self, grant: pb.Grant, now: float) -> None:
        ticket = self._tickets.get(grant.n)
        if ticket is None:  # cancelled while the grant was on its way, and forgotten
            self._say(pb.Operation(done=pb.Done(n=grant.n, outcome=pb.OUTCOME_UNUSED)))
        else:
            ticket.take_grant(grant, now)

    def _take_loss(self, lost: pb.Lost, now: float) -> None:
        """A lease has ended.

        1. With its instance, before that has answered, or while the move away from it was on its way:
           admission doesn't know the id any more, so it is offered again.
        2. Otherwise the relay ends.
        """
        ticket = self._tickets.get(lost.n)
        if ticket is None:
            return
        gone = lost.reason == pb.REASON_INSTANCE_LOST
        if gone and (ticket.phase is Phase.WAITING or ticket.retake()):  # 1
            self._say(pb.Operation(acquire=ticket.offer_again(now)))
            return
        del self._tickets[lost.n]  # 2
        ticket.take_loss(pb.Reason.Name(lost.reason).removeprefix("REASON_"))

    def _welcome(self, welcome: pb.Welcome, now: float) -> None:
        self._ttl = welcome.lease_ttl_ms / 1000
        self._acknowledged = now
        self._beat_due = now  # the first statement at once: it settles what the Hello could not
        self._steady.set()
        self._connected.set()
        self._wake.set()
        log.info(
            "the session is open", session=self.session_id, held=len(self.held), waiting=len(self.waiting)
        )

    def _acknowledge(self, number: int) -> None:
        sent = self._beats.pop(number, None)
        for older in [beat for beat in self._beats if beat < number]:
            del self._beats[older]
        if sent is not None:
            self._acknowledged = max(self._acknowledged, sent)
            self._steady.set()

    async def _watch(self) -> None:
        """Heartbeats in time; holds relays after a gap; ends them when control has been away too long."""
        meter = GapMeter(_TICK)
        while True:
            now = self._clock()
            if meter.observe(now) > self._ttl / 2:
                log.warning("this process was away; relays wait for admission's word")
                self._steady.clear()
                self._beat_due = 0.0
            if self.connected and now >= self._beat_due:
                self._wake.set()
            heard = self._acknowledged if self.connected else self._opened
            if self._call is not None and now - heard > self._ttl * 4 / 3:
                # Half-open, or a peer whose loop hangs: pings may be answered all the same.
                self._call.cancel()
            if now - self._acknowledged > self._grace:
                self._steady.set()
                for ticket in self._in(Phase.HELD):
                    self._tickets.pop(ticket.n, None)
                    ticket.take_loss("CONTROL_LOST")
            await asyncio.sleep(_TICK)

    def _in(self, phase: Phase) -> list[Ticket]:
        return [ticket for ticket in self._tickets.values() if ticket.phase is phase]

    def _say(self, operation: pb.Operation) -> None:
        self._operations.append(operation)
        self._wake.set()


def _end_with(writer: asyncio.Task[None], call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
    """Ends a stream whose writer has failed: nobody would notice, and its session would fall silent."""
    if writer.cancelled() or writer.exception() is not None:
        call.cancel()


def splitmix64(n: int) -> int:
    """The mixing function of held digests (Steele, Lea, Flood 2014)."""
    z = (n + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
