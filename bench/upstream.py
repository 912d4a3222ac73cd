"""A model server that costs next to nothing: fixed answers from a bare asyncio protocol.

Answers GET /health, and any POST: a completion of 300 bytes after `--token-time` × `max_tokens` seconds, or
with `"stream": true` as many SSE chunks as `max_tokens` says, `--rate` a second. Each answer tells in
`x-ready-at` when this server became ready, and each chunk in its text when it was written (seconds of the
machine's monotonic clock, the same in all its processes); `x-peak` is how many completions it ever had at
once. All streams share one timer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import heapq
import re
import time
from typing import cast

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_tokens": *(\d+)')
_TURN = 0.001
"""Seconds between two looks at the streams that are due."""
_GOLDEN = 0.618034
"""Its multiples, but for whole numbers, lie evenly between 0 and 1."""
COMPLETION = (
    b'{"id":"cmpl-1","object":"chat.completion","created":1,"model":"bench","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"0123456789012345678901234567890123456789012345678901234567890123456789"},'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens":10,"completion_tokens":10,"total_tokens":20}}'
)


_EVENT = (
    b'data: {"id":"cmpl-1","object":"chat.completion.chunk","created":1,"model":"bench","choices":['
    b'{"index":0,"delta":{"content":"@%.6f "},"finish_reason":null}]}\n\n'
)


class Emitter:
    """All streams, by when their next chunk is due."""

    def __init__(self, rate: float) -> None:
        """`rate`: chunks a second of one stream."""
        self._period = 1 / rate
        self._due: list[tuple[float, int, Upstream]] = []
        self._count = 0
        self._running = False

    def add(self, one: Upstream) -> None:
        """Begins a stream: its first chunk goes out at once, the second within a period, so that the phases
        of many are even however they came, and the next ones one each period."""
        self._count += 1
        if one.emit():
            phase = self._count * _GOLDEN % 1
            heapq.heappush(self._due, (time.monotonic() + phase * self._period, self._count, one))
        if not self._running:
            self._running = True
            asyncio.get_running_loop().call_later(_TURN, self._turn)

    def _turn(self) -> None:
        now, due = time.monotonic(), self._due
        while due and due[0][0] <= now:
            at, number, one = due[0]
            if one.emit():
                heapq.heapreplace(due, (at + self._period, number, one))
            else:
                heapq.heappop(due)
        self._running = bool(due)
        if self._running:
            asyncio.get_running_loop().call_later(_TURN, self._turn)


class Upstream(asyncio.Protocol):
    """One connection."""

    emitter = Emitter(50.0)
    token_time = 0.0
    ready_at = 0.0
    running = 0
    """Completions that are being worked on, over all connections."""
    peak = 0
    """The most that ever were."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._buffer = b""
        self._left = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._left = 0
        if self._timer is not None:
            self._timer.cancel()
            self._end()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while True:
            head, found, rest = self._buffer.partition(b"\r\n\r\n")
            if not found:
                return
            length = _LENGTH.search(head)
            size = int(length[1]) if length else 0
            if len(rest) < size:
                return
            body, self._buffer = rest[:size], rest[size:]
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        if b'"stream": true' in body or b'"stream":true' in body:
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-ready-at: %.6f\r\n"
                b"transfer-encoding: chunked\r\n\r\n" % self.ready_at
            )
            self._left = _tokens(body)
            self.emitter.add(self)
        elif self.token_time and body:
            Upstream.running += 1
            Upstream.peak = max(self.peak, self.running)
            delay = self.token_time * _tokens(body)
            self._timer = asyncio.get_running_loop().call_later(delay, self._complete_late)
        else:
            self._complete()

    def _complete_late(self) -> None:
        self._end()
        self._complete()

    def _end(self) -> None:
        self._timer = None
        Upstream.running -= 1

    def _complete(self) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-ready-at: %.6f\r\nx-peak: %d\r\n"
            b"content-length: %d\r\n\r\n%s" % (self.ready_at, self.peak, len(COMPLETION), COMPLETION)
        )

    def emit(self) -> bool:
        """Writes the next chunk; whether another one follows."""
        if not self._left:
            return False
        event = _EVENT % time.monotonic()
        self._left -= 1
        end = b"" if self._left else b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
        self._transport.write(b"%x\r\n%s\r\n%s" % (len(event), event, end))
        return self._left > 0


def _tokens(body: bytes) -> int:
    found = _TOKENS.search(body)
    return int(found[1]) if found else 10


async def serve(port: int) -> None:
    """Serves until killed."""
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", port, backlog=1024)
    Upstream.ready_at = time.monotonic()
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, default=50.0, help="chunks a second of one stream")
    parser.add_argument("--token-time", type=float, default=0.0, help="seconds of a completion by token")
    parser.add_argument("--load-time", type=float, default=0.0, help="seconds before it listens")
    arguments = parser.parse_args()
    Upstream.emitter, Upstream.token_time = Emitter(arguments.rate), arguments.token_time
    time.sleep(arguments.load_time)
    with contextlib.suppress(ImportError, KeyboardInterrupt):
        import uvloop

        uvloop.run(serve(arguments.port))
