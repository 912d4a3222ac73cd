"""A load generator: closed loops over kept connections, with as little work per answer as possible."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
STAMP = re.compile(rb'"content": ?"@([0-9.]+) "')
"""When a chunk was written by `bench.upstream`."""


def request(url: str, body: bytes, head: bytes = b"") -> bytes:
    """A chat completion's bytes on the wire; `head`: further lines of its head."""
    parts = urlsplit(url)
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: %s\r\ncontent-type: application/json\r\n"
        b"%scontent-length: %d\r\n\r\n%s" % (parts.netloc.encode(), head, len(body), body)
    )


def quantile(values: list[float], share: float) -> float:
    """The value below which that share of all lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@dataclass
class Result:
    """What one run saw."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    """Seconds of each answer, or of each chunk from the server's write to here."""
    failures: int = 0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds


async def closed_loop(url: str, body: bytes, connections: int, seconds: float) -> Result:
    """Each connection sends the next request when it has the answer to the last one."""
    result = Result(seconds)
    message = request(url, body)
    end = time.monotonic() + seconds

    async def loop() -> None:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        while time.monotonic() < end:
            began = time.monotonic()
            writer.write(message)
            head = await reader.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            assert length is not None, head
            await reader.readexactly(int(length[1]))
            if b" 200 " in head[:20]:
                result.latencies.append(time.monotonic() - began)
            else:
                result.failures += 1
        writer.close()

    await asyncio.gather(*(loop() for _ in range(connections)))
    return result


async def streams(url: str, body: bytes, count: int) -> Result:
    """`count` streams at once, each read to its end; the delay of every chunk."""
    began = time.monotonic()
    result = Result(0)
    message = request(url, body)

    async def one() -> None:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(message)
        while True:
            data = await reader.read(65536)
            now = time.monotonic()
            result.latencies.extend(now - float(stamp) for stamp in STAMP.findall(data))
            if not data or b"[DONE]" in data:
                break
        writer.close()

    await asyncio.gather(*(one() for _ in range(count)))
    result.seconds = time.monotonic() - began
    return result


async def first_byte(url: str, body: bytes) -> tuple[float, bytes]:
    """When the first byte of an answer came (monotonic), and its head."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(request(url, body))
    first = await reader.read(1)
    at = time.monotonic()
    head = first + await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return at, head
