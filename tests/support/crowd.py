"""Many clients on raw sockets: they ask, read byte by byte, and go away abruptly where they are told to.

No HTTP library: one would finish a request in good order, or hide how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

HUNG = 60.0
"""Seconds after which a client gives up: no test may count on that."""
CONTENT = re.compile(rb'"delta":\{"content":"[^"]')
DONE = b"data: [DONE]\n\n"
LAST = -1
"""In place of a number of events: the end mark."""


@dataclass(frozen=True)
class Leave:
    """When and how a client goes away: after so many seconds or events, whichever is first."""

    seconds: float = math.inf
    events: float = math.inf
    """Of a stream; `LAST` = when its end mark has come."""
    how: str = "close"
    """close (FIN), reset (RST), or half (says that it sends no more, and is gone a moment later)."""


STAYS = Leave()


@dataclass(frozen=True)
class Ask:
    """One request."""

    model: str
    tokens: int = 4
    stream: bool = True
    leave: Leave = STAYS
    keep: bool = False
    """The connection is used for this client's next request too."""
    headers: tuple[tuple[str, str], ...] = ()

    def written(self, identity: str) -> bytes:
        """The bytes."""
        message = [{"role": "user", "content": identity}]
        body = {"model": self.model, "messages": message, "max_tokens": self.tokens, "stream": self.stream}
        raw = json.dumps(body).encode()
        fields = [("host", "x"), ("content-type", "application/json"), ("content-length", str(len(raw)))]
        fields += [("x-request-id", identity), *self.headers]
        head = "".join(f"{name}: {value}\r\n" for name, value in fields)
        return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + raw


@dataclass
class Seen:
    """What came of one request, as its client saw it."""

    identity: str
    ask: Ask
    port: int
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    end: str = "hung"
    """complete; refused (an error with a status); broken (an error in the stream); left; cut (the connection
    ended before the answer); unreachable; hung; or wrong (an answer that no client could use)."""

    @property
    def code(self) -> str:
        """The error's code, "" without one."""
        found = re.search(rb'"code": ?"(\w+)"', self.body) if self.end in ("refused", "broken") else None
        return found[1].decode() if found else ""

    @property
    def tokens(self) -> int:
        """Tokens that came with a stream."""
        return len(CONTENT.findall(self.body))

    def __repr__(self) -> str:
        took = self.ended - self.began
        return f"<{self.identity} {self.end} {self.status} {self.code} {took:.2f} s {self.body[-200:]!r}>"


class Client:
    """One client after another on one connection, as long as that is kept."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._wires: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, identity: str, ask: Ask) -> Seen:
        """Sends one request and reads until its end, or until it is time to leave."""
        seen = Seen(identity, ask, self.port)
        try:
            async with asyncio.timeout(min(HUNG, ask.leave.seconds)):
                await self._exchange(seen)
        except TimeoutError:
            seen.end = "hung" if ask.leave.seconds > HUNG else "left"
        except ConnectionRefusedError:
            seen.end = "unreachable"
        except (ConnectionError, asyncio.IncompleteReadError):
            seen.end = "cut"
        seen.ended = time.monotonic()
        closes = seen.headers.get("connection") == "close"
        if seen.end not in ("complete", "refused", "broken") or closes or not ask.keep:
            await self.hang_up(ask.leave.how)
        return seen

    async def hang_up(self, how: str = "close") -> None:
        """Ends the connection, if there is one."""
        wires, self._wires = self._wires, None
        if wires is None:
            return
        reader, writer = wires
        sock = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            if how == "half":
                sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await reader.read(65536)
            elif how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def _exchange(self, seen: Seen) -> None:
        if self._wires is None:
            self._wires = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._wires
        writer.write(seen.ask.written(seen.identity))
        head = await reader.readuntil(b"\r\n\r\n")
        line, *fields = head[:-4].decode("latin-1").split("\r\n")
        seen.status = int(line.split()[1])
        seen.headers = {name.lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
        wanted = seen.ask.leave.events
        if wanted == 0:
            seen.end = "left"
            return
        if seen.headers.get("transfer-encoding") != "chunked":
            seen.body = await reader.readexactly(int(seen.headers.get("content-length", 0)))
        while "transfer-encoding" in seen.headers:
            size = int(await reader.readuntil(b"\r\n"), 16)
            seen.body += (await reader.readexactly(size + 2))[:-2]
            if size == 0:
                break
            if DONE in seen.body[-100:] if wanted == LAST else seen.body.count(b"data: ") >= wanted:
                seen.end = "left"
                return
        seen.end = _judge(seen)


def _judge(seen: Seen) -> str:
    """How an answer that came to its end ended."""
    if seen.status != 200:
        return "refused" if b'"error"' in seen.body else "wrong"
    if not seen.ask.stream:
        usage = json.loads(seen.body).get("usage", {})
        return "complete" if usage.get("completion_tokens") == seen.ask.tokens else "wrong"
    if b'"error"' in seen.body:
        return "broken"
    whole = seen.body.endswith(DONE) and seen.tokens == seen.ask.tokens
    return "complete" if whole else "wrong"


class Crowd(threading.Thread):
    """Clients that ask one after the other, in a loop of their own, until told to end or `total` asked."""

    def __init__(
        self,
        ports: Sequence[int],
        plan: Callable[[random.Random], Ask],
        *,
        workers: int,
        seed: int = 0,
        total: float = math.inf,
    ) -> None:
        """`plan` makes a request of a generator that knows the seed and the request's number, so that a run
        asks the same again. Each worker stays with one of the ports."""
        super().__init__(daemon=True)
        self.seen: list[Seen] = []
        self.failure: BaseException | None = None
        self._ports, self._plan, self._workers = list(ports), plan, workers
        self._seed, self._total, self._next = seed, total, 0
        self._told = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as failure:
            self.failure = failure

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self._workers):
                group.create_task(self._work(self._ports[number % len(self._ports)]))

    async def _work(self, port: int) -> None:
        client = Client(port)
        while not self._told.is_set() and self._next < self._total:
            number, self._next = self._next, self._next + 1
            ask = self._plan(random.Random(f"{self._seed}:{number}"))
            seen = await client.ask(f"r{self._seed}-{number}", ask)
            self.seen.append(seen)
            if seen.end not in ("complete", "left"):
                await asyncio.sleep(0.05)
        await client.hang_up()

    def end(self) -> list[Seen]:
        """No more requests; those that run go to their end. Everything that was seen."""
        self._told.set()
        return self.finish()

    def finish(self) -> list[Seen]:
        """Waits for the end of all requests."""
        self.join(HUNG + 30)
        assert not self.is_alive(), "a client hangs"
        if self.failure is not None:
            raise self.failure
        return self.seen

    def completed(self, port: int = 0, since: float = 0.0) -> int:
        """How many complete answers there were so far (of one port; begun later than `since`)."""
        return sum(
            seen.end == "complete" and port in (0, seen.port) and seen.began >= since for seen in [*self.seen]
        )

    def ends(self) -> Counter[str]:
        """How often each end was seen, with its status and code."""
        return Counter(f"{seen.end} {seen.status} {seen.code}".strip() for seen in [*self.seen])
