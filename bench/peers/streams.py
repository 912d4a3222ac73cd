"""Streams as clients see them, in a process of its own: `python -m bench.peers.streams`, a plan on its input.

many   `count` streams at once; says `steady` when all have begun, `over` after `seconds`, and what came
       in between
first  one stream after another on one connection, for `seconds`: the time to each one's first chunk
hold   `count` requests that are only waited on; says `open` when all are out, ends with its input
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

from bench.client import STAMP, quantile

_PATIENCE = 20.0
"""Seconds until all streams should have begun; one that is overloaded is measured with what it has."""
_OPENING = 100
"""Connections that are being opened at one time."""
_REST = 0.5
"""Seconds from the first chunk of the last stream to what is measured."""


class _Stream(asyncio.Protocol):
    """One request whose answer is kept, with the time of each piece, while `Many` wants it."""

    def __init__(self, message: bytes, many: Many) -> None:
        self._message = message
        self._many = many
        self._began = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self._many.keeping:
            self._many.kept.append((now, data))
        if not self._began and STAMP.search(data):
            self._began = True
            self._many.begun()

    def connection_lost(self, exc: Exception | None) -> None:
        self._many.lost += not self._many.over


class Many:
    """Streams that go on at once."""

    def __init__(self, count: int) -> None:
        self.kept: list[tuple[float, bytes]] = []
        self.keeping = self.over = False
        self.lost = 0
        """Streams that ended before their time."""
        self._missing = count
        self._all = asyncio.Event()

    def begun(self) -> None:
        """The first chunk of one more has come."""
        self._missing -= 1
        if not self._missing:
            self._all.set()

    async def run(self, plan: dict[str, Any]) -> dict[str, Any]:
        """Opens them, waits until they are steady, and looks at them for a while."""
        message = _message(plan)
        streams = await _open(plan, lambda: _Stream(message, self))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all.wait(), _PATIENCE)
        await asyncio.sleep(_REST)
        _say("steady")
        began, used, self.keeping = time.monotonic(), time.process_time(), True
        await asyncio.sleep(plan["seconds"])
        seconds, used, self.keeping = time.monotonic() - began, time.process_time() - used, False
        _say("over")
        self.over = True
        for stream in streams:
            stream.transport.abort()
        delays = [at - float(stamp) for at, data in self.kept for stamp in STAMP.findall(data)]
        return {
            "chunks": len(delays),
            "pieces": len(self.kept),
            "seconds": seconds,
            "p50": quantile(delays, 0.5),
            "p99": quantile(delays, 0.99),
            "failed": self.lost + self._missing,
            "client": used / seconds,
        }


async def first(plan: dict[str, Any]) -> dict[str, Any]:
    """Times from a request to the first chunk of its answer."""
    message, parts, times = _message(plan), urlsplit(plan["url"]), []
    end = time.monotonic() + plan["seconds"]
    while time.monotonic() < end:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            while time.monotonic() < end:
                began = time.monotonic()
                writer.write(message)
                await reader.readuntil(b'"@')
                times.append(time.monotonic() - began)
                await reader.readuntil(b"\r\n0\r\n\r\n")
        except asyncio.IncompleteReadError:
            pass  # this one closes the connection after a stream
        finally:
            writer.close()
    return {"count": len(times), "p50": quantile(times, 0.5), "p99": quantile(times, 0.99)}


class _Held(asyncio.Protocol):
    """One request that waits."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


async def hold(plan: dict[str, Any]) -> dict[str, Any]:
    """Requests that are out until the input ends."""
    message = _message(plan)
    held = await _open(plan, lambda: _Held(message))
    _say("open")
    await asyncio.to_thread(sys.stdin.read)
    lost = sum(one.lost for one in held)
    for one in held:
        one.transport.abort()
    return {"failed": lost}


async def _open(plan: dict[str, Any], make: Callable[[], Any]) -> list[Any]:
    parts, loop = urlsplit(plan["url"]), asyncio.get_running_loop()
    turn = asyncio.Semaphore(_OPENING)

    async def one() -> Any:
        async with turn:
            return (await loop.create_connection(make, parts.hostname, parts.port))[1]

    return await asyncio.gather(*(one() for _ in range(plan["count"])))


def _message(plan: dict[str, Any]) -> bytes:
    body = json.dumps(plan["body"]).encode()
    fields = {"host": urlsplit(plan["url"]).netloc, "content-type": "application/json"} | plan["headers"]
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\n%scontent-length: %d\r\n\r\n%s" % (head, len(body), body)


def _say(word: str) -> None:
    print(word, flush=True)


def main() -> None:
    """Runs the plan in the first line of the input."""
    plan = json.loads(sys.stdin.readline())
    gc.disable()  # a pause would count as the gateway's delay
    kinds = {"many": lambda: Many(plan["count"]).run(plan), "first": lambda: first(plan),
             "hold": lambda: hold(plan)}  # fmt: skip

    async def run() -> dict[str, Any]:
        return await kinds[plan["kind"]]()

    _say(json.dumps(uvloop.run(run())))


if __name__ == "__main__":
    main()
