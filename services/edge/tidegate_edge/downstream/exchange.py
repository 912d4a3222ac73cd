"""One request of a client and its answer, as the application sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from tidegate_edge.downstream.body import Chunks, Sized
from tidegate_edge.downstream.grammar import CHUNKED, Headers, RequestHead
from tidegate_edge.downstream.wire import http_date, status_line
from tidegate_edge.envelope import Failure

if TYPE_CHECKING:
    from tidegate_edge.downstream.connection import Connection

_BODILESS = frozenset((204, 304))
_UNREAD = 64 * 1024
"""Bytes of a request's body after which the connection isn't read until they are taken."""
_SMALL = 64 * 1024
"""What is left of a body after its answer is read and dropped when it is at most so much; else the
connection is closed."""


class Gone(Exception):
    """The client has left."""


class Exchange:
    """One request. Its answer is `start`, any number of `more`, `end`; or `whole`; or `cut`."""

    __slots__ = (
        "_body", "_chunked", "_closes", "_connection", "_expects", "_failure", "_head", "_left", "_on_gone",
        "_pieces", "_reader", "_unread", "ended", "gone", "started",
    )  # fmt: skip

    def __init__(self, connection: Connection, head: RequestHead) -> None:
        self.started = False
        """The answer's head is out."""
        self.ended = False
        """The answer is out, or was cut."""
        self.gone = False
        """The client has left before that."""
        self._connection = connection
        self._head = head
        self._body = Chunks() if head.length == CHUNKED else Sized(head.length)
        self._expects = head.expects and not self._body.complete
        self._pieces: list[bytes] = []
        self._unread = 0
        self._failure: Failure | None = None
        self._reader: asyncio.Future[None] | None = None
        self._on_gone: Callable[[], None] | None = None
        self._closes = not head.keep
        self._chunked = False
        self._left = -1
        """Bytes of the answer that its length still promises; -1 = it has none."""

    # The request.

    @property
    def method(self) -> str:
        """As sent."""
        return self._head.method

    @property
    def path(self) -> bytes:
        """As sent, without the query."""
        return self._head.path

    @property
    def query(self) -> bytes:
        """As sent; empty when there is none."""
        return self._head.query

    @property
    def headers(self) -> Headers:
        """Names in lower case, in the order sent."""
        return self._head.headers

    @property
    def length(self) -> int:
        """Bytes of the body; -1 = not told."""
        return self._head.length

    @property
    def client(self) -> tuple[str, int]:
        """The other end: address and port."""
        return self._connection.client

    @property
    def secure(self) -> bool:
        """It came over TLS."""
        return self._connection.secure

    async def read(self) -> bytes:
        """The next bytes of the body, as they came; empty at its end.

        Raises Gone, and Failure (400) for a body that is malformed."""
        if self._expects:
            self._expects = False
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not self._pieces and not self._body.complete:
            if self._failure is not None:
                raise self._failure
            if self.gone:
                await asyncio.sleep(0)  # who was told of it may have cancelled this task: that comes first
                raise Gone
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        pieces, self._pieces = self._pieces, []
        self._unread = 0
        self._connection.hear(True)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def on_gone(self, callback: Callable[[], None]) -> None:
        """`callback` is called once if the client leaves before its answer has ended."""
        if self.gone:
            callback()
        else:
            self._on_gone = callback

    # The answer.

    def start(self, status: int, headers: Headers) -> None:
        """Sends the head. How the body is framed follows from the headers: by `content-length` where there
        is one, else in chunks, or until the connection closes (HTTP/1.0)."""
        self._connection.write(self._begin(status, headers))

    async def more(self, data: bytes) -> None:
        """Sends a part of the body; waits while the client takes none."""
        connection = self._connection
        if data:
            connection.write(self._framed(data))
        if connection.stuck:
            await connection.unstuck()

    def end(self, data: bytes = b"") -> None:
        """Sends the last part."""
        last = self._framed(data) if data else b""
        self._finish(last + b"0\r\n\r\n" if self._chunked else last)

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """A complete answer at once; `content-length` is set here."""
        if status not in _BODILESS:
            headers = [one for one in headers if one[0] != b"content-length"]
            headers.append((b"content-length", b"%d" % len(body)))
        head = self._begin(status, headers)
        self._finish(head + self._framed(body) if body else head)

    def cut(self) -> None:
        """Closes the connection without an end. May be called again."""
        if not self.ended:
            self.ended = True
            self._on_gone = None
            # Without a length or chunks only a reset differs from an end.
            looks_complete = self.started and not self._chunked and self._left < 0
            self._connection.cut(reset=looks_complete)

    def _begin(self, status: int, headers: Headers) -> bytes:
        if self.started:
            raise RuntimeError("the head is out")
        self.started = True
        lines = [status_line(status)]
        dated = False
        for field in headers:
            name, value = field
            if name == b"content-length":
                self._left = int(value)
            elif name == b"date":
                dated = True
            elif name == b"connection":
                self._closes |= value == b"close"
                continue
            lines.append(b"%s: %s" % field)
        if not dated:
            lines.append(b"date: " + http_date())
        if self._head.method == "HEAD" or status in _BODILESS:
            self._left = 0
        elif self._left < 0:
            self._chunked = not self._head.old
            if self._chunked:
                lines.append(b"transfer-encoding: chunked")
            else:
                self._closes = True
        self._closes |= self._connection.closing or not (self._body.complete or self._skippable())
        if self._closes:
            lines.append(b"connection: close")
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        if head.count(b"\n") != len(lines) + 1:
            raise ValueError("a line break in an answer's head")
        return head

    def _skippable(self) -> bool:
        """What is left of the request is small, and it is on its way."""
        left = self._body.left
        return left is not None and left <= _SMALL and not self._expects

    def _framed(self, data: bytes) -> bytes:
        if self._chunked:
            return b"%x\r\n%b\r\n" % (len(data), data)
        if self._left >= 0:
            if self._head.method == "HEAD":
                return b""
            if len(data) > self._left:
                raise ValueError("more than the answer's length")
            self._left -= len(data)
        return data

    def _finish(self, last: bytes) -> None:
        if self._left > 0:
            self.cut()  # a length that was promised and not kept
            return
        self.ended = True
        self._on_gone = None
        self._connection.answered(last, self._closes)

    # What the connection says.

    def feed(self, data: bytes) -> bytes:
        """Bytes of the body have come; gives what is behind it. Raises Failure (400)."""
        piece, rest = self._body.feed(data)
        if piece and not self.ended:
            self._pieces.append(piece)
            self._unread += len(piece)
            if self._unread > _UNREAD:
                self._connection.hear(False)
        self._wake()
        return rest

    @property
    def heard(self) -> bool:
        """The whole request has come."""
        return self._body.complete

    def fail(self, failure: Failure) -> None:
        """The body is malformed; whoever reads it is told."""
        self._failure = failure
        self._closes = True
        self._wake()

    def leave(self) -> None:
        """The client is gone."""
        if self.ended or self.gone:
            return
        self.gone = True
        callback, self._on_gone = self._on_gone, None
        if callback is not None:
            callback()
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
