"""One client's connection: requests come in one after the other, each is answered before the next is begun.

No task and no timer of its own: what comes in is handled in `data_received`; when its time has passed, the
server says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from enum import Enum
from typing import TYPE_CHECKING, cast

from tidegate_edge.downstream.deadlines import Deadlines
from tidegate_edge.downstream.exchange import Exchange
from tidegate_edge.downstream.grammar import malformed, parse_head
from tidegate_edge.downstream.wire import http_date, status_line
from tidegate_edge.envelope import Failure
from tidegate_edge.head import SANE_ID, new_request_id

if TYPE_CHECKING:
    from tidegate_edge.downstream.server import Server

_HIGH = 64 * 1024
"""Bytes in our hands that a client has not taken, after which its answer waits."""
_RESET = struct.pack("ii", 1, 0)
_END = b"\r\n\r\n"
_FIRST = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z\r]")
"""The first byte of a method, or of an empty line before it."""
_REQUEST_ID = re.compile(rb"\r\n(?i:x-request-id):[ \t]*(" + SANE_ID + rb")[ \t]*\r\n")


class Stage(Enum):
    """What the connection is waiting for. With TLS HANDSHAKE -> IDLE; IDLE -> HEAD -> ANSWER -> IDLE; each of
    them -> LAST (final)."""

    HANDSHAKE = "the client's part of the TLS handshake"
    IDLE = "the first byte of a request"
    HEAD = "the rest of a request's head"
    ANSWER = "the application"
    LAST = "the client, to take what is left and close"


class Connection(asyncio.Protocol):
    """A client's connection. `stage` has one writer, `_to`."""

    __slots__ = (
        "_exchange", "_hearing", "_pending", "_skipped", "_transport", "_waiter", "client", "clock", "owed",
        "secure", "server", "stage", "stuck",
    )  # fmt: skip

    def __init__(self, server: Server) -> None:
        self.server = server
        self.stage = Stage.IDLE
        self.clock: Deadlines[Connection] | None = None
        """Where the time of its stage runs."""
        self.owed = 0
        """Bytes of ours that waited for the client when it was last looked at."""
        self.client = ("", 0)
        """Address and port of the other end."""
        self.secure = False
        """It is over TLS."""
        self.stuck = False
        """The client doesn't take what it is sent."""
        self._transport: asyncio.Transport | None = None
        self._exchange: Exchange | None = None
        self._pending = b""
        """What has come and belongs to no request yet."""
        self._skipped = False
        """An empty line before the next request was left out."""
        self._hearing = True
        self._waiter: asyncio.Future[None] | None = None

    # What the server says.

    @property
    def closing(self) -> bool:
        """No further request is taken after the present one."""
        return self.server.draining

    @property
    def unsent(self) -> int:
        """Bytes of ours that wait for the client, or for the end of this turn of the loop."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def expired(self) -> None:
        """The time of its stage has passed."""
        if self.unsent or self._exchange is not None or self.stage is Stage.HANDSHAKE:
            self.cut(reset=True)
        elif self.stage is Stage.HEAD:
            self.refuse(Failure("request_timeout", "The request's head came too slowly."))
        else:
            self.close()

    def overdue(self) -> None:
        """Its client has had the time for what waits. One that took none of it is cut."""
        left = self.unsent
        if left and left >= self.owed:
            self.cut(reset=True)
        elif left:
            self.server.owes(self)
        else:
            self._to(self.stage)

    def lingered(self) -> None:
        """Its client has had the time to take the last answer and to close."""
        if self.unsent:
            self.server.owes(self)
        else:
            self.cut(reset=False)

    def close(self) -> None:
        """Closes it when the client has taken what is left."""
        self._to(Stage.LAST)
        if self._transport is not None:
            self._transport.close()

    def cut(self, reset: bool) -> None:
        """Closes it at once. `reset`: what the client has not taken is dropped, and it sees that."""
        self._to(Stage.LAST)
        transport = self._transport
        if transport is None:
            return
        if reset or self.unsent:
            with contextlib.suppress(OSError):
                peer = transport.get_extra_info("socket")
                if peer is not None:
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            transport.abort()
        else:
            transport.close()

    # What its exchange says.

    def write(self, data: bytes) -> None:
        """Sends bytes; nobody is told when the client has gone, but by `on_gone`."""
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def unstuck(self) -> None:
        """Waits until the client takes bytes again, or has left."""
        while self.stuck and self._transport is not None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def hear(self, on: bool) -> None:
        """Whether more is read from the client."""
        transport = self._transport
        if on is self._hearing or transport is None or transport.is_closing():
            return
        self._hearing = on
        if on:
            transport.resume_reading()
        else:
            transport.pause_reading()

    def answered(self, last: bytes, closes: bool) -> None:
        """The application has given its answer, and these are its last bytes."""
        self.write(last)
        exchange = self._exchange
        if exchange is None or self.stage is Stage.LAST:
            return
        self.hear(True)
        if closes:
            self._part(exchange)
        elif exchange.heard:
            self._next()
        else:
            self._to(Stage.HEAD)  # the rest of a small body has a request's time to come

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = made = cast(asyncio.Transport, transport)
        made.set_write_buffer_limits(high=_HIGH)
        name = made.get_extra_info("peername")
        if isinstance(name, tuple):
            self.client = (str(name[0]), int(name[1]))
        self.secure = made.get_extra_info("ssl_object") is not None
        if self.server.welcome(self):
            self._to(Stage.HANDSHAKE if self.secure else Stage.IDLE)
        elif self.server.flooded:
            self.cut(reset=True)
        else:
            self.refuse(Failure("server_is_overloaded", "Too many connections; try again soon."))
            if self.secure:  # without a handshake it hears nothing
                self.close()

    def encrypted(self) -> None:
        """The TLS handshake is over."""
        self._to(Stage.IDLE)

    def data_received(self, data: bytes) -> None:
        exchange = self._exchange
        if self.stage is Stage.LAST:
            return
        if exchange is None:
            self._pending = self._pending + data if self._pending else data
            self._begin()
        elif exchange.heard:  # the next request, before this one is answered
            self._pending += data
            if len(self._pending) > self.server.longest_head:
                self.hear(False)
        else:
            self._hear_body(exchange, data)

    def eof_received(self) -> None:
        """The client has left; one that has only closed its half isn't told apart."""
        if self._exchange is not None and self.stage is Stage.ANSWER:
            exchange = self._exchange
            self.cut(reset=False)
            exchange.leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.stage = Stage.LAST
        self.server.gone(self)
        exchange, self._exchange = self._exchange, None
        self._pending = b""
        if exchange is not None:
            exchange.leave()
        self._wake()

    def pause_writing(self) -> None:
        self.stuck = True

    def resume_writing(self) -> None:
        self.stuck = False
        self._wake()
        if self.stage is Stage.IDLE:
            self._to(Stage.IDLE)
            self.hear(True)
            self._begin()

    # The stages.

    def _to(self, stage: Stage) -> None:
        self.stage = stage
        self.server.staged(self)

    def _begin(self) -> None:
        """Looks for a request's head in what has come. It may be called when there is none to be taken: one
        is answered, or the client takes no answers."""
        if self._exchange is not None or self.stage is Stage.LAST:
            return
        pending, longest = self._pending, self.server.longest_head
        if self.stuck:
            if len(pending) > longest:
                self.hear(False)
            return
        while pending.startswith(b"\r\n"):
            if self._skipped:
                self.refuse(malformed("empty lines stand before it"))
                return
            self._skipped = True
            pending = self._pending = pending[2:]
        end = pending.find(_END)
        if end < 0 and len(pending) <= longest:
            self._partly(pending)
            return
        try:
            if end > longest or end < 0:
                raise Failure("headers_too_large", f"The request's head is longer than {longest} bytes.")
            head = parse_head(pending[:end])
        except Failure as failure:
            self.refuse(failure)
            return
        self._pending, self._skipped = pending[end + 4 :], False
        self._exchange = exchange = Exchange(self, head)
        self._to(Stage.ANSWER)
        if self._pending and not exchange.heard:
            data, self._pending = self._pending, b""
            self._hear_body(exchange, data)
        self.server.serve(exchange)

    def _partly(self, pending: bytes) -> None:
        """A head has not come whole. What will never be one is refused now."""
        stage = Stage.HEAD if pending else Stage.IDLE
        if self.stage is not stage:
            self._to(stage)
        line = pending.find(b"\n")
        if pending and _FIRST.match(pending) is None:
            self.refuse(malformed("this is no HTTP"))
        elif line >= 0 and pending[line - 1 : line] != b"\r":
            self.refuse(malformed("a line ends without CR"))

    def _hear_body(self, exchange: Exchange, data: bytes) -> None:
        try:
            self._pending = exchange.feed(data)
        except Failure as failure:
            self.hear(False)
            exchange.fail(failure)
            if exchange.ended:
                self.close()
            return
        if exchange.ended and exchange.heard:
            self._next()

    def _next(self) -> None:
        """The request and its answer are through."""
        self._exchange = None
        self._to(Stage.IDLE)
        if self._pending:
            asyncio.get_running_loop().call_soon(self._begin)

    def _part(self, exchange: Exchange) -> None:
        """Closes behind an answer. A close with bytes unread is a reset, in which the answer could get lost:
        so the end is said, and what still comes is read and dropped for a while."""
        transport = self._transport
        if transport is None:
            return
        if exchange.heard and not self._pending:
            self.close()
            return
        self._to(Stage.LAST)
        self._pending = b""
        if transport.can_write_eof():
            transport.write_eof()

    def refuse(self, failure: Failure) -> None:
        """Answers what is no request, and closes."""
        self.server.refused(failure)
        body = failure.body()
        fields = [field for field in failure.headers() if field[0] != b"connection"]
        fields += [(b"content-length", b"%d" % len(body)), (b"x-request-id", self._request_id())]
        fields += [(b"date", http_date()), (b"connection", b"close")]
        lines = [status_line(failure.status), *(b"%s: %s" % field for field in fields)]
        self.write(b"\r\n".join(lines) + _END + body)
        self._pending = b""
        self._to(Stage.LAST)
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()

    def _request_id(self) -> bytes:
        """What the client calls a request that was refused, when that is sane; else a new name."""
        said = _REQUEST_ID.search(self._pending, 0, self.server.longest_head)
        return said[1] if said else new_request_id()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
