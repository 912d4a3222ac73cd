"""One connection to a model server: a request goes out, its response is parsed as it comes.

asyncio's protocol, httptools' parser, and no task: what comes in is handled as it comes, and whoever waits is
woken. A parser serves one response, so that nothing of one can reach the next. What two readers could
understand differently is no answer (`Broken`), however its bytes were cut into pieces on their way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

Headers = list[tuple[bytes, bytes]]

INCOMING = 32 * 1024
"""Bytes that are read from a connection at a time; all connections share one buffer of that size."""
_UNREAD = 32 * 1024
"""Bytes of a body after which the connection isn't read until they are taken. With what is read at a time, it
is what lies here of an answer whose client takes nothing."""
_PER_PIECE = 64
"""Bytes that a piece of a body costs beside its own."""
_PIECES = 64
"""Pieces of a body that are kept apart: many small ones are put together."""
_PIECE = 256 * 1024
"""Longer bodies are written in pieces, so that a slow server doesn't get all of it into our buffers."""
_LONGEST_HEAD = 64 * 1024
"""Bytes of a head, interim answers included; and without a body's byte among them (extensions, trailers)."""
_BODILESS = frozenset((204, 304))
_VERSIONS = frozenset(("1.0", "1.1"))
_FIRST = ord("H")


class ConnectFailed(Exception):
    """No byte of an answer came: no connection was made, or it closed before. May be tried elsewhere."""


class Broken(Exception):
    """The answer began and broke off, or was no HTTP. Never tried again: the server has begun to work."""


class Unread(Protocol):
    """A body that isn't in memory: its length, and its bytes as often as they are asked for."""

    def __len__(self) -> int:
        """Bytes."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """From the begin. What it raises ends the exchange."""


class Reply:
    """A response whose head has come. Its `on_...` methods but `on_end` are for the parser."""

    __slots__ = (
        "_bodiless", "_connection", "_failure", "_interim", "_on_end", "_pieces", "_waiter", "answered",
        "barren", "complete", "ended", "headed", "headers", "keep", "open_ended", "reused", "status",
        "unread",
    )  # fmt: skip

    def __init__(self, connection: Connection, reused: bool, bodiless: bool) -> None:
        self.status = 0
        self.headers: Headers = []
        """Names in lower case."""
        self.reused = reused
        """It came on a connection that had been used before."""
        self.open_ended = False
        """Nothing but the end of the connection tells where the body ends."""
        self.answered = False
        """A byte of it has come."""
        self.headed = False
        """Its head has come."""
        self.complete = False
        """The parser has seen its end."""
        self.ended = False
        """The connection is done with it."""
        self.keep = False
        """The server keeps the connection afterwards."""
        self.unread = 0
        """What the part of the body costs that has come and was not read, in bytes."""
        self.barren = 0
        """Bytes since the last one of the head or the body."""
        self._connection = connection
        self._bodiless = bodiless
        self._interim = False
        self._pieces: list[bytes] = []
        self._failure: Exception | None = None
        self._on_end: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def head(self) -> None:
        """Waits for the head. Raises ConnectFailed or Broken."""
        while not self.headed:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    async def read(self) -> bytes:
        """The next bytes, as they came; empty at the end. Raises Broken."""
        while not self._pieces and not self.ended:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.rest()

    def on_end(self, callback: Callable[[], None]) -> None:
        """`callback` is called once when the last byte has come from the server, read or not; at once if it
        has already. Not called when the response breaks off."""
        if self.ended:
            callback()
        else:
            self._on_end = callback

    def rest(self) -> bytes:
        """All that has come and was not read."""
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces = []
        self.unread = 0
        self._connection.taken(self)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Closes the connection, unless the response has ended and it went back to the pool. Synchronous."""
        self._connection.give_up(self)

    # What the connection says.

    def end(self) -> None:
        """The last byte has come."""
        self.ended = True
        callback, self._on_end = self._on_end, None
        if callback is not None:
            callback()
        self.wake()

    def fail(self, failure: Exception) -> None:
        """It breaks off here."""
        self._failure = failure
        self.wake()

    def wake(self) -> None:
        """Something has changed."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What the parser says. An exception is the parser's error.

    def on_message_begin(self) -> None:
        if self.complete:
            raise ValueError("bytes behind the end")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.headed:  # trailers are not passed on
            self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        status, self.keep = self._connection.state()
        if status == 101:
            raise ValueError("nobody asked for an upgrade")
        if not 100 <= status < 600:
            raise ValueError("no status of HTTP")
        self._interim = status < 200
        if self._interim:
            self.headers.clear()
            return
        self.status = status
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and codings != [b"chunked"]:
            raise ValueError("a transfer coding that nobody asked for")
        length = next((value for name, value in self.headers if name == b"content-length"), b"")
        self._bodiless = self._bodiless or status in _BODILESS
        if self._bodiless and (codings or int(length or 0)):
            self.keep = False  # the body that it can't have may follow
        self.open_ended = not (codings or length or self._bodiless)
        self.complete = self._bodiless  # the parser can't know of answers to HEAD that they have no body
        self.headed = True

    def on_body(self, data: bytes) -> None:
        if self._bodiless:
            raise ValueError("a body where none may be")
        self._pieces.append(data)
        self.unread += len(data) + _PER_PIECE
        self.barren = 0

    def on_message_complete(self) -> None:
        if not self._interim:
            self.complete = True

    def fed(self) -> None:
        """The parser has taken what came."""
        if len(self._pieces) > _PIECES:
            self._pieces = [b"".join(self._pieces)]
            self.unread = len(self._pieces[0]) + _PER_PIECE


class Connection(asyncio.BufferedProtocol):
    """One connection; at most one request is under way on it."""

    def __init__(
        self,
        origin: str,
        incoming: memoryview,
        free: Callable[[Connection], None],
        gone: Callable[[Connection], None],
    ) -> None:
        """`incoming`: where bytes are read into; they are used before the loop reads again, so that all
        connections of a loop can share it. `free(self)`: ready for the next request. `gone(self)`: closed,
        whoever closed it."""
        self.origin = origin
        """Scheme, host and port, as a URL."""
        self._incoming = incoming
        self._free = free
        self._gone = gone
        self._transport: asyncio.Transport | None = None
        self._reply: Reply | None = None
        self._parser: HttpResponseParser | None = None
        self._head_bytes = 0
        self._unsent = memoryview(b"")
        self._sender: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._reading = self._writing = True
        self._used = False
        self.idle_since = 0.0
        self.slots = 1
        """Requests that its server takes at a time."""

    @property
    def open(self) -> bool:
        """Nobody has closed it yet, as far as is known."""
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, head: bytes, body: bytes | Unread, bodiless: bool) -> Reply:
        """Sends a request and waits for the head of its response. Raises ConnectFailed or Broken.

        `bodiless`: the response has no body, whatever its head says.
        """
        if not self.open:
            raise ConnectFailed("closed")
        self._reply = reply = Reply(self, self._used, bodiless)
        self._parser = HttpResponseParser(reply)
        self._used, self._head_bytes = True, 0
        if not isinstance(body, bytes):
            self._write(head)
            self._sender = asyncio.ensure_future(self._send(reply, body))
        elif len(body) <= _PIECE:
            self._write(head + body)
        else:
            self._write(head)
            self._unsent = memoryview(body)
            self._push()
        try:
            await reply.head()
        except BaseException:  # a half-done exchange can't be followed by another; a whole one may be already
            self.give_up(reply)
            raise
        return reply

    def abort(self) -> None:
        """Closes it at once. Synchronous; may be called again."""
        self._reply = self._parser = None
        self._unsent = memoryview(b"")
        if self._sender is not None:
            self._sender.cancel()
        if self._transport is not None:
            self._transport.abort()

    def forget(self) -> None:
        """Its server has gone: a request without the head of an answer fails now. Synchronous."""
        reply = self._reply
        if reply is not None and not reply.headed:
            self._fail(reply, Broken("gone") if reply.answered else ConnectFailed("gone"))

    # What a reply says.

    def state(self) -> tuple[int, bool]:
        """Status of the head just parsed, and whether the connection stays open after its message."""
        assert self._parser is not None, "its own parser asks"
        if self._parser.get_http_version() not in _VERSIONS:
            raise ValueError("no HTTP/1")
        return self._parser.get_status_code(), self._parser.should_keep_alive()

    def taken(self, reply: Reply) -> None:
        """What had come was read."""
        if not self._reading and reply is self._reply:
            self._read(True)

    def give_up(self, reply: Reply) -> None:
        """Nobody wants the rest."""
        if reply is self._reply:
            self.abort()
            reply.fail(Broken("given up"))

    # What the transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._incoming

    def buffer_updated(self, nbytes: int) -> None:
        reply, parser, data = self._reply, self._parser, self._incoming[:nbytes]
        if reply is None or not reply.answered:
            data = _begun(data)
            if not data:
                return
        if reply is None or parser is None:
            self.abort()  # bytes that nobody asked for
            return
        try:
            self._feed(reply, parser, data)
        except (HttpParserError, HttpParserUpgrade, ValueError) as error:
            if not reply.complete:
                self._fail(reply, Broken(str(error.__context__ or error)))
                return
            reply.keep = False
        reply.fed()
        if reply.complete:
            self._finish(reply)
            return
        if reply.unread > _UNREAD and self._reading:
            self._read(False)
        reply.wake()

    def _feed(self, reply: Reply, parser: HttpResponseParser, data: memoryview) -> None:
        """Has the parser read what came. Raises the parser's errors and ValueError.

        1. The parser takes other protocols, too: the first byte tells.
        2. The head must end within its bound, counted exactly, whatever comes behind it in the same piece.
        """
        reply.barren += len(data)
        if not reply.headed:
            if not reply.answered:
                reply.answered = True
                if data[0] != _FIRST:  # 1
                    raise ValueError("no HTTP")
            room = _LONGEST_HEAD - self._head_bytes
            self._head_bytes += len(data)
            if len(data) >= room:  # 2
                parser.feed_data(data[:room])
                if not reply.headed:
                    raise ValueError("the head is too long")
                data = data[room:]
            reply.barren = 0
        parser.feed_data(data)
        if reply.barren > _LONGEST_HEAD:
            raise ValueError("too much that is no body")

    def eof_received(self) -> None:
        if self._reply is not None and self._reply.open_ended:
            self._reply.keep = False
            self._finish(self._reply)

    def connection_lost(self, exc: Exception | None) -> None:
        reply = self._reply
        if reply is not None:
            why = type(exc).__name__ if exc else "closed"
            self._fail(reply, Broken(why) if reply.answered else ConnectFailed(why))
        self._gone(self)

    def pause_writing(self) -> None:
        self._writing = False

    def resume_writing(self) -> None:
        self._writing = True
        self._push()
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def _write(self, data: bytes | memoryview) -> None:
        assert self._transport is not None, "it was opened"
        self._transport.write(data)

    def _push(self) -> None:
        while self._unsent and self._writing:
            piece, self._unsent = self._unsent[:_PIECE], self._unsent[_PIECE:]
            self._write(piece)

    async def _send(self, reply: Reply, body: Unread) -> None:
        """Sends a body that isn't in memory, as its server takes it."""
        try:
            async for piece in body:
                while not self._writing:
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room
                self._write(piece)
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever waits for the reply is told
            self._fail(reply, error)

    def _read(self, on: bool) -> None:
        assert self._transport is not None, "it was opened"
        self._reading = on
        if on:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def _finish(self, reply: Reply) -> None:
        """The response is whole. Its connection is free, unless something of the request is still unsent: the
        server has answered before it had read all."""
        assert self._transport is not None, "it was opened"
        self._reply = self._parser = None
        if not self._reading:
            self._read(True)
        sending = self._sender is not None and not self._sender.done()
        unsent = sending or bool(self._unsent) or self._transport.get_write_buffer_size() > 0
        if reply.keep and self.open and not unsent:
            self._free(self)
        else:
            self.abort()
        reply.end()

    def _fail(self, reply: Reply, failure: Exception) -> None:
        self.abort()
        reply.fail(failure)


def _begun(data: memoryview) -> memoryview:
    """What came, without line breaks before it: between answers they say nothing, as the parser has it."""
    return data if data[0] == _FIRST else data[len(data) - len(bytes(data).lstrip(b"\r\n")) :]
