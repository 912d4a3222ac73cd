"""What one process knows of the others: nothing when it is the only one, else what the master tells."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import structlog

from tidegate_edge.downstream.accept import Board
from tidegate_edge.envelope import Failure
from tidegate_edge.workers.link import Link, Message
from tidegate_edge.workers.sums import taken

if TYPE_CHECKING:
    from tidegate_edge.shared import Edge

log = structlog.get_logger("tidegate.edge")

PATIENCE = 2.0
"""Seconds that a worker has to tell of itself."""
_ASK = 2 * PATIENCE
"""Seconds that the master has, who asks the workers."""
_HELLO = 4096
"""Bytes; longer than the master's first message."""


@dataclass(frozen=True)
class Post:
    """What a worker is given by the master."""

    number: int
    """From 1 on; a worker's successor has the same."""
    count: int
    """Workers in all."""
    cell: int
    """Its own on the board."""
    link: socket.socket
    listening: socket.socket
    board: Board
    renew: asyncio.Event = field(default_factory=asyncio.Event)
    """SIGHUP: another process is wanted in this one's place."""

    @classmethod
    def taken(cls, link: socket.socket) -> Post:
        """The master's first message, which was sent before this process began. Blocks."""
        hello, descriptors, _, _ = socket.recv_fds(link, _HELLO, 2)
        told = json.loads(hello)
        listening = socket.socket(fileno=descriptors[0])
        listening.setblocking(False)
        board = Board(2 * told["count"], descriptors[1])
        return cls(told["number"], told["count"], told["cell"], link, listening, board)

    def offer(self, link: socket.socket) -> None:
        """Sends that message; `link` is the master's end."""
        told = {"number": self.number, "count": self.count, "cell": self.cell}
        socket.send_fds(link, [json.dumps(told).encode()], [self.listening.fileno(), self.board.fd])


class Alone:
    """The only process of an edge."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge
        self.retiring = asyncio.Event()
        """Another one has taken this process's place: what it has may go on, nothing new begins."""

    async def metrics(self) -> bytes:
        """Of all processes, as Prometheus reads it. Raises Failure (503) when they can't be asked."""
        return self._edge.metrics.text()

    async def told(self) -> list[dict[str, Any]]:
        """Each process, for the status. Raises Failure (503) when they can't be asked."""
        return [{"worker": 1, "pid": os.getpid(), "state": "serving", **self._edge.told()}]


class Member(Alone):
    """A worker among others."""

    def __init__(self, edge: Edge, link: Link, stop: asyncio.Event) -> None:
        """`stop` is set when the master says so or is gone."""
        super().__init__(edge)
        self._link = link
        self._stop = stop
        self._tasks: list[asyncio.Task[None]] = []

    def begin(self, renew: asyncio.Event) -> None:
        """Hears what the master says from now on. When `renew` is set it is asked for another process."""
        self._tasks = [asyncio.create_task(self._hear()), asyncio.create_task(self._pass_on(renew))]

    def listens(self) -> None:
        """This process takes connections."""
        self._link.say(do="listening")

    async def _hear(self) -> None:
        await self._link.hear(self._take)
        if not self._stop.is_set():
            log.warning("the master is gone; stopping")
        self._stop.set()

    async def _pass_on(self, renew: asyncio.Event) -> None:
        while True:
            await renew.wait()
            renew.clear()
            self._link.say(do="renew")

    async def leave(self, patience: float) -> None:
        """The last word, within `patience` seconds: what was counted here isn't lost."""
        for task in self._tasks:
            task.cancel()
        self._link.say(do="last", families=taken(self._edge.metrics.registry))
        await self._link.said(patience)
        self._link.close()

    async def metrics(self) -> bytes:
        text = await self._link.ask("metrics", _ASK)
        if text is None:
            raise _silent()
        return str(text).encode()

    async def told(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] | None = await self._link.ask("workers", _ASK)
        if workers is None:
            raise _silent()
        return workers

    def _take(self, message: Message) -> None:
        if message.get("do") == "stop":
            self._stop.set()
        elif message.get("do") == "retire":
            self.retiring.set()
        elif message.get("ask") == "metrics":
            self._link.say(answer=taken(self._edge.metrics.registry), number=message["number"])
        elif message.get("ask") == "told":
            self._link.say(answer=self._edge.told(), number=message["number"])


def _silent() -> Failure:
    return Failure("server_is_overloaded", "The master process doesn't answer; try again.", retry_after=2)
