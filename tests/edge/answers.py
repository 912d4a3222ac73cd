"""A model server's bytes, fed to a connection in pieces without a socket, and what comes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tidegate_edge.connection import INCOMING, Broken, ConnectFailed, Connection, Reply

CORPUS = Path(__file__).parent / "corpus" / "upstream"
"""Raw answers, by what becomes of them: `whole` or `broken`. Whatever a search finds is kept there."""


class Outcome(NamedTuple):
    """What the relay gets of an answer."""

    end: str
    """whole, broken or no connection."""
    status: int = 0
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    kept: bool = False
    """The connection may be used again."""


class Transport(asyncio.Transport):
    """Stands for a connection's socket."""

    def __init__(self) -> None:
        super().__init__()
        self.reading, self.closing = True, False
        self.fed = asyncio.Event()
        """It may be fed, or needn't any more."""
        self.fed.set()

    def is_closing(self) -> bool:
        return self.closing

    def abort(self) -> None:
        self.closing = True
        self.fed.set()

    def write(self, data: Any) -> None:
        assert not self.closing, "written to after it was closed"

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.reading = False
        self.fed.clear()

    def resume_reading(self) -> None:
        self.reading = True
        self.fed.set()


class Feeding:
    """One connection, asked once, and its server's bytes."""

    def __init__(self) -> None:
        self.freed = 0
        self.gone = 0
        self.transport = Transport()
        self.connection = Connection("", memoryview(bytearray(INCOMING)), self._free, self._leave)
        self.connection.connection_made(self.transport)
        self.body = b""

    def _free(self, _: Connection) -> None:
        assert not self.transport.closing, "a closed connection was taken for a free one"
        self.freed += 1

    def _leave(self, _: Connection) -> None:
        self.gone += 1

    async def outcome(self, pieces: Iterable[bytes], bodiless: bool = False) -> Outcome:
        """Feeds the pieces, then the end of the connection, to somebody who reads as fast as he can."""
        asking = asyncio.ensure_future(self._ask(bodiless))
        await asyncio.sleep(0)
        for piece in pieces:
            await self.transport.fed.wait()
            if self.transport.closing:
                break
            self.connection.get_buffer(-1)[: len(piece)] = piece
            self.connection.buffer_updated(len(piece))
        kept = self.freed == 1 and not self.transport.closing
        if not self.transport.closing:
            self.connection.eof_received()
        self.connection.connection_lost(None)
        for _ in range(5):
            await asyncio.sleep(0)
        assert asking.done(), "it hangs"
        return asking.result()._replace(kept=kept)

    async def _ask(self, bodiless: bool) -> Outcome:
        reply: Reply | None = None
        ends: list[None] = []
        try:
            reply = await self.connection.exchange(b"", b"", bodiless)
            reply.on_end(lambda: ends.append(None))
            while piece := await reply.read():
                self.body += piece
            assert ends == [None], "the end is told once"
            return Outcome("whole", reply.status, tuple(reply.headers), self.body)
        except ConnectFailed:
            assert reply is None, "a head has come, and it may be asked again"
            return Outcome("no connection")
        except Broken:
            assert not ends, "an end was told of what is broken"
            assert self.transport.closing, "a broken connection stays open"
            assert not self.freed, "a broken connection is used again"
            status, headers = (reply.status, reply.headers) if reply else (0, [])
            return Outcome("broken", status, tuple(headers), self.body)


def cut(data: bytes, at: Iterable[int]) -> Iterator[bytes]:
    """The bytes in pieces that end at these places, none longer than is read at a time."""
    begin = 0
    for end in [*sorted({place for place in at if 0 < place < len(data)}), len(data)]:
        for step in range(begin, end, INCOMING):
            yield data[step : min(end, step + INCOMING)]
        begin = end


def corpus() -> dict[str, bytes]:
    """All kept answers, by folder and name."""
    return {f"{path.parent.name}/{path.stem}": path.read_bytes() for path in sorted(CORPUS.glob("*/*.http"))}


@st.composite
def valid(draw: st.DrawFn) -> tuple[bytes, Outcome]:
    """An answer as RFC 9112 allows it, and what it means."""
    body = draw(st.binary(max_size=300))
    own = draw(
        st.lists(st.tuples(st.from_regex(rb"x-[a-z]{1,8}", fullmatch=True), st.just(b"v;w")), max_size=4)
    )
    framing = draw(st.sampled_from(["length", "chunks", "end"]))
    keep = framing != "end" and draw(st.booleans())
    headers = list(own)
    if framing == "length":
        headers.append((b"content-length", b"%d" % len(body)))
    elif framing == "chunks":
        headers.append((b"transfer-encoding", b"chunked"))
    if not keep:
        headers.append((b"connection", b"close"))
    interims = [b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"] * draw(st.integers(0, 3))
    head = b"HTTP/1.1 200 OK\r\n" + b"".join(b"%s: %s\r\n" % one for one in headers) + b"\r\n"
    wire = _chunked(draw, body) if framing == "chunks" else body
    return b"".join(interims) + head + wire, Outcome("whole", 200, tuple(headers), body, keep)


def _chunked(draw: st.DrawFn, body: bytes) -> bytes:
    parts = list(cut(body, draw(st.lists(st.integers(0, 300), max_size=6)))) if body else []
    extension = draw(st.sampled_from([b"", b";a", b';a="b c"']))
    trailer = draw(st.sampled_from([b"", b"x-sum: 1\r\n"]))
    return (
        b"".join(b"%x%s\r\n%s\r\n" % (len(one), extension, one) for one in parts) + b"0\r\n%s\r\n" % trailer
    )
