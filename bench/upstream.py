"""A model server that costs next to nothing: fixed answers from a bare asyncio protocol.

Answers GET /health, and any POST: a completion of 300 bytes, or with `"stream": true` as many SSE chunks
as `max_tokens` says, `--rate` a second. Each answer tells in `x-ready-at` when this server became ready,
and each chunk when it was written (seconds of the machine's monotonic clock, the same in all its
processes).
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
    ready_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._buffer = b""
        self._task: asyncio.Task[None] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()

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
        ready = b"x-ready-at: %.6f\r\n" % self.ready_at
        if b'"stream": true' in body or b'"stream":true' in body:
            tokens = _TOKENS.search(body)
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                + ready
                + b"transfer-encoding: chunked\r\n\r\n"
            )
            self._task = asyncio.create_task(self._stream(int(tokens[1]) if tokens else 10))
            return
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n%s"
            % (ready, len(_COMPLETION), _COMPLETION)
        )

    async def _stream(self, tokens: int) -> None:
        start = time.monotonic()
        for i in range(tokens):
            event = b'data: {"t":%.6f,"choices":[{"delta":{"content":"tok "}}]}\n\n' % time.monotonic()
            self._transport.write(b"%x\r\n%s\r\n" % (len(event), event))
            await asyncio.sleep(max(0.0, start + (i + 1) / self.rate - time.monotonic()))
        self._transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


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
    parser.add_argument("--load-time", type=float, default=0.0, help="seconds before it listens")
    arguments = parser.parse_args()
    Upstream.rate = arguments.rate
    time.sleep(arguments.load_time)
    with contextlib.suppress(ImportError, KeyboardInterrupt):
        import uvloop

        uvloop.run(serve(arguments.port))
