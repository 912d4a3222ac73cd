"""An open loop: requests come when they come, whatever became of those before. A process of its own.

`python -m bench.offered` reads a plan from its input and writes what became of each request. A refused
request is not tried again. Latency counts from the moment at which a request was due, so a client that is
late counts as latency, not as less load.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import json
import random
import re
import subprocess
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import uvloop

from bench.client import request

PATIENCE = 300.0
"""Seconds after the last request was due in which its answer may come."""
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Offer:
    """What one tenant asks for."""

    tenant: str
    rate: float
    """Requests a second, at random (Poisson); 0 = all at once."""
    begin: float
    """Seconds after the start."""
    seconds: float
    """How long it asks; 0 = all at once."""
    count: int = 0
    """How many are asked for at once."""
    tokens: int = 10
    """Length of an answer, on average."""
    spread: float = 0.0
    """Lengths are even between (1 − spread) and (1 + spread) times `tokens`; 0–1."""
    model: str = "bench"


class Answer(NamedTuple):
    """What became of a request."""

    tenant: str
    due: float
    """When it was to be sent, in seconds after the start."""
    seconds: float
    """From then to the last byte of its answer."""
    status: int
    """0 = none came."""
    tokens: int


class Load:
    """An open loop that runs in a process of its own."""

    def __init__(self, url: str, offers: list[Offer], connections: int) -> None:
        """`connections` are opened before the start; more come as they are needed."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.offered"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
        )
        plan = {"url": url, "connections": connections, "offers": [asdict(offer) for offer in offers]}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(plan).encode())
        self._process.stdin.close()

    def answers(self) -> list[Answer]:
        """Waits for the end."""
        assert self._process.stdout is not None
        try:
            answers = [Answer(*row) for row in json.load(self._process.stdout)]
            assert self._process.wait(10) == 0
            return answers
        finally:
            self._process.kill()
            self._process.wait()


def arrivals(offer: Offer, number: int) -> list[tuple[float, str, int, str]]:
    """When the requests of an offer are due: (seconds, tenant, tokens, model); the same in each run."""
    chance = random.Random(number)
    due, times = offer.begin, [offer.begin] * offer.count
    while offer.rate and (due := due + chance.expovariate(offer.rate)) < offer.begin + offer.seconds:
        times.append(due)
    return [
        (at, offer.tenant, round(offer.tokens * (1 + offer.spread * (2 * chance.random() - 1))), offer.model)
        for at in times
    ]


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop
        self._buffer = b""
        self._asked: tuple[str, float, int] | None = None
        self._message = b""
        self._used = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, message: bytes, tenant: str, due: float, tokens: int) -> None:
        """Sends a request."""
        self._asked, self._message = (tenant, due, tokens), message
        self.transport.write(message)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head) if found else None
        if not found or (length is not None and len(rest) < int(length[1])):
            return
        self._buffer, self._used = b"", True
        self._over(int(head[9:12]))
        self._loop.idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self._loop.idle:
            self._loop.idle.remove(self)
        if self._asked is not None and self._used and not self._buffer:
            # A kept connection that is closed in the moment of its use (after 30 s): clients try again.
            self._loop.send_on_new(self._message, *self._asked)
        else:
            self._over(0)

    def _over(self, status: int) -> None:
        asked, self._asked = self._asked, None
        if asked is not None:
            tenant, due, tokens = asked
            self._loop.over(Answer(tenant, due, self._loop.now() - due, status, tokens))


class _Loop:
    """All connections and what they saw."""

    def __init__(self, url: str) -> None:
        self.idle: deque[_Connection] = deque()
        self._url = url
        self._host, self._port = urlsplit(url).hostname or "", urlsplit(url).port or 80
        self._began = 0.0
        self._open = 0
        self._answers: list[Answer] = []
        self._done = asyncio.Event()
        self._late: set[asyncio.Task[None]] = set()
        self._messages: dict[tuple[str, int, str], bytes] = {}

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def over(self, answer: Answer) -> None:
        """A request has ended."""
        self._answers.append(answer)
        self._open -= 1
        if not self._open:
            self._done.set()

    async def run(self, plan: list[tuple[float, str, int, str]], connections: int) -> list[Answer]:
        """Sends each request when it is due, and waits for the last answer."""
        for _ in range(connections):
            self.idle.append(await self._connect())
        self._open = len(plan)
        self._began = time.monotonic()
        for due, tenant, tokens, model in plan:
            if due > self.now():
                await asyncio.sleep(due - self.now())
            message = self._message(tenant, tokens, model)
            if self.idle:
                self.idle.popleft().send(message, tenant, due, tokens)
            else:
                self.send_on_new(message, tenant, due, tokens)
        async with asyncio.timeout(PATIENCE):
            await self._done.wait()
        for connection in list(self.idle):
            connection.transport.abort()
        return self._answers

    def send_on_new(self, message: bytes, tenant: str, due: float, tokens: int) -> None:
        """Sends a request as soon as a connection more is open."""
        task = asyncio.create_task(self._send_on_new(message, tenant, due, tokens))
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def _send_on_new(self, message: bytes, tenant: str, due: float, tokens: int) -> None:
        try:
            connection = await self._connect()
        except OSError:
            self.over(Answer(tenant, due, self.now() - due, 0, tokens))
            return
        connection.send(message, tenant, due, tokens)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self), self._host, self._port)
        return connection

    def _message(self, tenant: str, tokens: int, model: str) -> bytes:
        message = self._messages.get((tenant, tokens, model))
        if message is None:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": "x" * 200}],
                "max_tokens": tokens,
                "stream": False,
            }
            head = b"x-tidegate-tenant: %s\r\n" % tenant.encode() if tenant else b""
            message = request(self._url, json.dumps(body).encode(), head)
            self._messages[tenant, tokens, model] = message
        return message


def main() -> None:
    """Runs the plan that stands on the input."""
    plan = json.load(sys.stdin)
    offers = [Offer(**offer) for offer in plan["offers"]]
    gc.disable()  # nothing here makes cycles, and a pause would count as the gateway's latency
    every = list(heapq.merge(*(arrivals(offer, number) for number, offer in enumerate(offers))))
    json.dump(uvloop.run(_Loop(plan["url"]).run(every, plan["connections"])), sys.stdout)


if __name__ == "__main__":
    main()
