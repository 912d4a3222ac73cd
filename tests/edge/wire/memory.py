"""A client's connection without a socket: what comes in, and in which pieces and turns, is the test's."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tidegate_edge.downstream.connection import Connection
from tidegate_edge.downstream.exchange import Exchange, Gone
from tidegate_edge.downstream.server import Limits, Server
from tidegate_edge.envelope import Failure


class Transport(asyncio.Transport):
    """Takes everything at once, unless told to be `full`."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.full = False
        """The client takes nothing: what is written stays in our hands."""
        self.held = 0
        self.ended = self.closing = self.aborted = False
        self.reading = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 1234) if name == "peername" else default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.held

    def write(self, data: Any) -> None:
        assert not self.ended, "nothing is written behind the end"
        self.written += data
        self.held += len(data) if self.full else 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


@dataclass
class Heard:
    """A request as the application got it."""

    method: str
    path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass
class Application:
    """Reads each request to its end and answers with its number."""

    heard: list[Heard] = field(default_factory=list)
    refusals: list[Failure] = field(default_factory=list)
    """Of heads (told by the server) and of bodies."""
    running: int = 0
    overlapped: bool = False
    """A request was begun before the one before it was answered."""

    async def __call__(self, exchange: Exchange) -> None:
        self.overlapped |= self.running > 0
        self.running += 1
        try:
            await self._answer(exchange)
        finally:
            self.running -= 1

    async def _answer(self, exchange: Exchange) -> None:
        body = b""
        try:
            while piece := await exchange.read():
                body += piece
        except Gone:
            return
        except Failure as failure:
            self.refusals.append(failure)
            exchange.whole(failure.status, failure.headers(), failure.body())
            return
        self.heard.append(Heard(exchange.method, exchange.path, exchange.query, list(exchange.headers), body))
        exchange.whole(200, [(b"x-number", b"%d" % len(self.heard))], b"")


class Line:
    """A connection to a server of its own."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.app = Application()
        self.server = Server(self.app, limits or Limits(), self.app.refusals.append)
        self.transport = Transport()
        self.connection = Connection(self.server)
        self.connection.connection_made(self.transport)

    def feed(self, data: bytes) -> None:
        """Bytes come in, as far as they are still read."""
        if self.transport.reading and not self.transport.closing:
            self.connection.data_received(data)

    @property
    def refused(self) -> bool:
        return bool(self.app.refusals)

    def gone(self) -> None:
        """The connection has ended."""
        self.transport.closing = True
        self.connection.connection_lost(None)


async def turns(count: int = 20) -> None:
    """Lets everything run that can."""
    for _ in range(count):
        await asyncio.sleep(0)


async def heard(data: bytes, cuts: Sequence[int], pauses: int = 20) -> Application:
    """What an application hears of these bytes, cut at these places, with so many turns after each."""
    line = Line()
    places = [0, *cuts, len(data)]
    for begin, end in itertools.pairwise(places):
        line.feed(data[begin:end])
        await turns(pauses)
    await turns(20 * data.count(b"\r\n\r\n") + 20)
    app = line.app
    line.gone()
    await turns()
    return app
