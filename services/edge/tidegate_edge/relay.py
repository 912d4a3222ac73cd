"""One request's life: body, ticket, grant, model server, answer.

Ways to end, all of them through `_release`, which is synchronous and closes the model server's connection
before it gives the slot back:
  1. the model server's response has ended (not: a slow client has read it)
  2. an error of the edge's own (`Failure`), or admission refused
  3. from outside: the client left, a time limit passed, the lease was lost, the process drains. These cancel
     the task once, with the cause noted first; a cancellation without a cause is the process ending.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import structlog

from tidegate_edge.answer import Answer
from tidegate_edge.catalog import Model
from tidegate_edge.downstream.exchange import Exchange
from tidegate_edge.due import Due
from tidegate_edge.ends import complete
from tidegate_edge.envelope import Failure, internal_error, loss, refusal, upstream_error
from tidegate_edge.head import Head, Headers, field, queue_fields, rate_fields, to_client
from tidegate_edge.intake import Body, Intake
from tidegate_edge.record import Record
from tidegate_edge.responses import Watch
from tidegate_edge.routes import RESPONSES, By, Route
from tidegate_edge.shared import Edge
from tidegate_edge.ticket import Grant, Outcome, Ticket, TicketRefused
from tidegate_edge.upstream import Broken, ConnectFailed, Reply
from tidegate_edge.usage import Tail, estimate
from tidegate_edge.waiting import Waiting, describe
from tidegate_edge.watchdog import Watchdog

log = structlog.get_logger("tidegate.edge")

_SESSION_PATIENCE = 5.0
"""Seconds that a new request waits for admission."""
_SLOWEST = 8 * 1024
"""Bytes per second of a request's body, on the average after the first `write_timeout`."""
_LAST_WORD = 5.0
"""Seconds that a client has to take an error at the end of its stream."""
_NO_CONTENT = 204
"""May have no length (RFC 9110, 8.6)."""
_LARGEST_ERROR = 65536
"""Bytes of a model server's error that are put into a stream."""

GONE, STUCK, SILENT, SLOW_BODY, DRAINING = "gone", "stuck", "silent", "slow body", "draining"
SLOW_DISK = "slow disk"


class Relay:
    """One request. `run` is its task."""

    def __init__(
        self,
        edge: Edge,
        exchange: Exchange,
        head: Head,
        own: Headers,
        route: Route,
        response: bytes = b"",
    ) -> None:
        """`own`: fields that every answer has; more are added. `response`: the id in the path; empty = it has
        none."""
        self._edge = edge
        self._exchange = exchange
        self._head = head
        self._route = route
        self._response = response
        self._path = path = route.label
        self._answer = Answer(exchange, path)
        self._record = Record(edge.metrics, exchange.method, path, head)
        settings = edge.settings
        grain = min(settings.write_timeout, settings.stream_idle_timeout, settings.response_timeout)
        self._dog = Watchdog(grain, self.interrupt)
        self._due = Due(head.deadline, self._dog.now)
        self._task: asyncio.Task[Any] | None = None
        self._cause: str | Failure | None = None
        self._closing = False
        self._own = own
        self._intake: Intake | None = None
        self._ticket: Ticket | None = None
        self._grant: Grant | None = None
        self._outcome = Outcome.CLIENT_GONE
        self._waiting: Waiting | None = None
        self._reply: Reply | None = None
        self._tail = Tail()
        self._feed = self._tail.feed
        self._watch: Watch | None = None
        self._rest = b""
        self._plain = False
        """The answer is a stream of events that can be read here, and added to."""
        self._ended = False
        """The model server's response is complete."""
        self._torn = False
        """It ended where it should not have."""

    def interrupt(self, cause: str | Failure) -> None:
        """Ends the request from outside. The first cause counts; at the end none does any more."""
        if self._cause is None and not self._closing and self._task is not None:
            self._cause = cause
            self._task.cancel()

    async def run(self) -> None:
        """Serves the request."""
        self._task = asyncio.current_task()
        self._edge.relays.add(self)
        self._exchange.on_gone(lambda: self.interrupt(GONE))
        try:
            await self._serve()
        except Failure as failure:
            await self._fail(failure)
        except asyncio.CancelledError:
            if self._cause is None or self._task is None:
                self._record.outcome = "cancelled"
                raise
            self._task.uncancel()
            await self._interrupted(self._cause)
        except Exception:  # a bug of ours ends one request, with its slot given back, not the process
            log.exception("a request failed", request_id=self._head.request_id.decode())
            await self._fail(internal_error())
        finally:
            self._closing = True
            self._edge.relays.discard(self)  # first: whatever fails now, nothing keeps the ticket alive
            self._release()
            self._waiting = None  # it holds this relay
            self._record.close(self._answer.status, self._tail)

    async def _serve(self) -> None:
        body = await self._read_body()
        if not self._edge.catalog.known:
            raise Failure("server_is_overloaded", "The catalogue of models is not known yet.", retry_after=2)
        name = body.said.model if body.said else self._addressed()
        model = self._edge.catalog.find(name)
        if model is None:
            message = f"The model `{name[:128]}` does not exist."
            raise Failure("model_not_found", message, param="model")
        self._record.model = model.name
        if not self._head.caller.may_use(model.name, model.aliases):
            message = f"This key does not allow the model `{model.name}`."
            raise Failure("permission_denied", message, param="model")
        if not await self._edge.session.available(min(_SESSION_PATIENCE, self._due.left() or math.inf)):
            self._due.left()
            raise Failure("server_is_overloaded", "Admission can't be reached.", retry_after=5)
        self._offer(model, body)
        opening = self._obtain(model, body)
        del body  # it is given up when the head of an answer has come; this frame lives as long as the answer
        reply = await opening
        if self._waiting is not None:
            await self._waiting.stop()
        await self._pass_on(reply)

    # The request.

    async def _read_body(self) -> Body:
        """The whole body. Raises Failure (400, 408, 413, 503)."""
        limit, patience = self._edge.settings.max_body, self._edge.settings.write_timeout
        if self._exchange.length > limit:
            raise _too_large(limit)
        reads = self._route.by is By.BODY
        self._intake = intake = Intake(self._edge.spools, self._head.content_type, reads)
        size = 0
        begun = self._dog.now()
        while True:
            spent = self._dog.now() - begun
            self._dog.expect(min(patience, patience + size / _SLOWEST - spent), SLOW_BODY)
            piece = await self._exchange.read()
            self._dog.expect(patience, SLOW_DISK)
            if not piece:
                body = await intake.whole()
                self._dog.rest()
                return body
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            await intake.take(piece)

    def _addressed(self) -> str:
        """The model of a request whose body names none. Raises Failure (404)."""
        name = self._head.model or self._edge.responses.find(self._owner, self._response)
        if name:
            return name
        words = "It isn't known which model gave this response; name it in the header x-tidegate-model."
        raise Failure("response_not_found", words, param="response_id")

    @property
    def _owner(self) -> str:
        """To whom answers belong: nobody else finds them by their ids."""
        return self._head.tenant

    # The slot.

    def _offer(self, model: Model, body: Body) -> None:
        edge, settings = self._edge, self._edge.settings
        stream, limit = b"stream=true" in self._exchange.query.split(b"&"), 0
        if body.said:
            stream, limit = body.said.hints(model.request_defaults)
        comments = stream and settings.keepalive_after > 0
        self._record.asked = len(body.content) // 4 if body.said and not body.said.boundary else 0
        self._ticket = edge.session.acquire(
            model.name,
            tenant=self._head.tenant,
            band=self._head.band,
            deadline=self._due.left(),
            catalog_generation=edge.catalog.generation,
            token_estimate=min(estimate(self._path, self._record.asked, limit), 2**32 - 1),
            affinity=self._head.affinity,
            trace_parent=self._record.trace_parent,
            wants_progress=comments,
        )
        self._ticket.on_lost(lambda reason: self.interrupt(loss(reason)), self._retaken)
        if comments:
            self._waiting = Waiting(self._answer, settings.keepalive_after, self._comment, self._own)

    def _comment(self) -> str:
        waiting = self._ticket is not None and self._record.instance == ""
        return describe(self._record.model, self._ticket.progress) if waiting and self._ticket else "working"

    async def _granted(self) -> Grant:
        assert self._ticket is not None, "a ticket was offered"
        self._dog.rest()  # admission ends this wait by the ticket's deadline
        offered = self._dog.now()
        try:
            grant = await self._due.granted(self._ticket.granted())
        except TicketRefused as refused:
            self._own += queue_fields(refused.queue)
            self._own += rate_fields(refused.rates)
            raise refusal(refused.reason, refused.message, refused.retry_after, refused.rates) from None
        finally:
            self._record.queued += self._dog.now() - offered
        self._record.instance = grant.instance_id
        self._record.loading += grant.loading
        return grant

    async def _obtain(self, model: Model, body: Body) -> Reply:
        """The head of a model server's response.

        1. Wait for a grant: of another instance, or of the same one after the delay. No slot is held while
           it runs.
        2. No byte of an answer, and attempts are left: give the slot back, and again from 1. With its
           instance the slot has gone already, and the ticket waits for another one.
        3. Otherwise 502.
        """
        retries, ticket = self._edge.settings.retries, self._ticket
        assert ticket is not None, "a ticket was offered"
        delay = retries.delay
        for left in range(retries.attempts - 1, -1, -1):
            self._grant = grant = await self._granted()  # 1
            try:
                return await self._open(grant, model, body)
            except ConnectFailed:
                if left:  # 2
                    self._record.retried()
                    if ticket.holds(grant):
                        ticket.move(grant.instance_id, Outcome.CONNECT_FAILED, delay)
                    delay *= retries.factor
            except Broken:  # 3
                self._outcome = Outcome.UPSTREAM_ERROR
                if not ticket.holds(grant):
                    raise loss("INSTANCE_LOST") from None
                raise Failure("upstream_error", "The model server's answer was no valid HTTP.") from None
        self._outcome = Outcome.CONNECT_FAILED
        raise Failure("upstream_error", "No connection to the model server could be made.")

    def _retaken(self) -> None:
        """The instance has gone before it answered: what is under way to it fails now, not by its timeout."""
        if self._grant is not None:
            self._edge.upstream.forget(self._grant.address)

    async def _open(self, grant: Grant, model: Model, body: Body) -> Reply:
        exchange, begun = self._exchange, self._waiting is not None
        model = self._edge.catalog.find(model.name) or model  # it may have been changed during the wait
        query = exchange.query
        url = (
            grant.address.rstrip("/")
            + exchange.path.decode()
            + ("?" + query.decode("latin-1") if query else "")
        )
        parent = self._record.attempt(grant)
        headers = self._head.to_server(parent, plain=begun)
        content = body.outgoing(model.upstream_model, model.request_defaults)
        self._dog.expect(self._edge.settings.response_timeout, SILENT)
        try:
            slots = grant.queue.max_concurrent
            reply = await self._edge.upstream.open(exchange.method, url, headers, content, slots)
        except (ConnectFailed, Broken) as error:
            self._record.attempt_failed(str(error))
            raise
        self._reply = reply
        if self._ticket is not None:
            self._ticket.answered()
        self._record.answered(reply.status, reply.reused)
        if self._intake is not None:
            self._intake.spool.forget()
        self._own += queue_fields(grant.queue)
        self._own += rate_fields(grant.rates)
        self._own.append((b"x-tidegate-queue-ms", b"%d" % (self._record.queued * 1000)))
        self._own.append((b"x-tidegate-instance", grant.instance_id.encode()))
        return reply

    # The answer.

    async def _pass_on(self, reply: Reply) -> None:
        self._outcome = (
            Outcome.BACKPRESSURE
            if reply.status in (429, 503)
            else Outcome.UPSTREAM_ERROR
            if reply.status >= 500
            else Outcome.OK
        )
        events = field(reply.headers, b"content-type").startswith(b"text/event-stream")
        self._record.events = events
        self._plain = events and reply.status == 200 and not _framed_or_coded(reply.headers)
        if self._route.path == RESPONSES and reply.status == 200:
            self._feed = self._watched
            self._watch = Watch(self._learn)
        reply.on_end(self._upstream_ended)
        answer = self._answer
        try:
            if answer.begun:
                if reply.status != 200 or not events:
                    await self._error_into_stream(reply)
                    return
            else:
                headers = to_client(reply.headers, self._own)
                if reply.status == _NO_CONTENT:
                    headers = [one for one in headers if one[0] != b"content-length"]
                if self._ended and not self._torn:
                    answer.whole(reply.status, headers, self._rest)
                    return
                if events and not field(headers, b"x-accel-buffering"):
                    headers.append((b"x-accel-buffering", b"no"))
                answer.start(reply.status, headers, events=self._plain)
            await self._stream(reply)
        except Broken:
            self._outcome = Outcome.UPSTREAM_ERROR
            raise Failure("upstream_error", "The model server broke off its answer.") from None

    async def _stream(self, reply: Reply) -> None:
        """The hot loop: per chunk two awaits and no task, no timer, no copy."""
        settings, dog, session = self._edge.settings, self._dog, self._edge.session
        now, read, more, feed = dog.now, reply.read, self._answer.more, self._feed
        idle, write = settings.stream_idle_timeout, settings.write_timeout
        while True:
            dog.limit, dog.cause, dog.since = idle, SILENT, now()
            chunk = await read()
            if not chunk:
                break
            feed(chunk)
            if not session.steady:
                dog.rest()
                await session.steadied()
            dog.limit, dog.cause, dog.since = write, STUCK, now()
            await more(chunk)
        if self._torn:
            if self._rest:
                await more(self._rest)
            raise Broken("no last event")
        self._answer.end(self._rest)

    def _upstream_ended(self) -> None:
        """The last byte has come from the model server, though the client may not have read it: the slot is
        free. What was not read yet (bounded by the client's buffers) is taken over here."""
        reply = self._reply
        if reply is None or self._ended:
            return
        self._ended = True
        self._rest = reply.rest()
        if self._rest:
            self._feed(self._rest)
        if self._plain and not complete(self._path, self._tail.end(), framed=not reply.open_ended):
            self._torn = True
            self._outcome = Outcome.UPSTREAM_ERROR
        if self._cause is None:
            self._release()

    def _watched(self, chunk: bytes) -> None:
        self._tail.feed(chunk)
        if self._watch is not None:
            self._watch.feed(chunk)

    def _learn(self, identity: bytes) -> None:
        self._edge.responses.learn(self._owner, identity, self._record.model)

    async def _error_into_stream(self, reply: Reply) -> None:
        """The head of a stream is out, but the model server answered with something else."""
        self._dog.expect(self._edge.settings.stream_idle_timeout, SILENT)
        content = b""
        while chunk := await reply.read():
            content += chunk
            if len(content) > _LARGEST_ERROR:
                break
        content += self._rest
        self._release()
        self._answer.fail_in_stream(upstream_error(reply.status, content))

    # The end.

    def _release(self) -> None:
        """Closes the model server's connection, then gives the slot back. May be called again."""
        reply, ticket = self._reply, self._ticket
        if reply is not None and not self._ended:
            reply.close()
        if ticket is not None:
            ticket.done(self._outcome, self._record.tokens(self._tail))
        if self._intake is not None:
            self._intake.spool.close()
        if self._waiting is not None and self._closing:
            self._waiting.abandon()
        if self._closing:
            self._dog.stop()

    async def _interrupted(self, cause: str | Failure) -> None:
        """What an end from outside means, for admission and for the client."""
        self._outcome = Outcome.TIMEOUT if cause == SILENT else Outcome.CLIENT_GONE
        if cause == GONE:
            self._record.outcome = "client_gone"
        elif cause == STUCK:
            self._record.outcome = "client_stuck"
            self._closing = True
            self._release()
            self._answer.cut()
        elif isinstance(cause, Failure):
            await self._fail(cause)
        elif cause == SILENT:
            await self._fail(Failure("upstream_timeout", "The model server was silent for too long."))
        elif cause == SLOW_BODY:
            await self._fail(Failure("request_timeout", "The request's body came too slowly."))
        elif cause == SLOW_DISK:
            words = "The disk on which a large request body is kept doesn't answer."
            await self._fail(Failure("server_is_overloaded", words))
        else:
            await self._fail(Failure("draining", "The service is stopping; try again."))

    async def _fail(self, failure: Failure) -> None:
        self._closing = True
        self._release()
        self._record.fail(failure.code)
        if self._waiting is not None and not self._answer.begun:
            self._waiting.abandon()
        elif self._waiting is not None:
            try:
                async with asyncio.timeout(_LAST_WORD):
                    await self._waiting.stop()
            except TimeoutError:
                self._answer.cut()
                return
        self._answer.fail(failure, self._own)


def _framed_or_coded(headers: Headers) -> bool:
    return bool(field(headers, b"content-length") or field(headers, b"content-encoding"))


def _too_large(limit: int) -> Failure:
    return Failure("body_too_large", f"The body is larger than {limit} bytes.")
