"""A model server that costs next to nothing: fixed answers from a bare asyncio protocol.

Answers GET /health, and any POST: a completion of 300 bytes after `--token-time` × `max_tokens` seconds, or
with `"stream": true` as many SSE chunks as `max_tokens` says, `--rate` a second. Each answer tells in
`x-ready-at` when this server became ready, and each chunk when it was written (seconds of the machine's
monotonic clock, the same in all its processes); `x-peak` is how many completions it ever had at once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import time
from typing import cast

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_TOKENS = re.compile(rb'"max_tokens": *(\d+)')
_COMPLETION = (
    b'{"id":"cmpl-1","object":"chat.completion","created":1,"model":"bench","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"0123456789012345678901234567890123456789012345678901234567890123456789"},'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens":10,"completion_tokens":10,"total_tokens":20}}'
)


class Upstream(asyncio.Protocol):
    """One connection."""

    rate = 50.0
    token_time = 0.0
    ready_at = 0.0
    running = 0
    """Completions that are being worked on, over all connections."""
    peak = 0
    """The most that ever were."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()
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
            self._task = asyncio.create_task(self._stream(_tokens(body)))
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
            b"content-length: %d\r\n\r\n%s" % (self.ready_at, self.peak, len(_COMPLETION), _COMPLETION)
        )

    async def _stream(self, tokens: int) -> None:
        start = time.monotonic()
        for i in range(tokens):
            event = b'data: {"t":%.6f,"choices":[{"delta":{"content":"tok "}}]}\n\n' % time.monotonic()
            self._transport.write(b"%x\r\n%s\r\n" % (len(event), event))
            await asyncio.sleep(max(0.0, start + (i + 1) / self.rate - time.monotonic()))
        self._transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


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
    Upstream.rate, Upstream.token_time = arguments.rate, arguments.token_time
    time.sleep(arguments.load_time)
    with contextlib.suppress(ImportError, KeyboardInterrupt):
        import uvloop

        uvloop.run(serve(arguments.port))
