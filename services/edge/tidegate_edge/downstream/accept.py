"""Connections from a listening socket that several processes share: each takes its part."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from collections.abc import Callable

import structlog

log = structlog.get_logger("tidegate.edge")

_HOLD = 0.005
"""Seconds that a connection is left to a process that has fewer."""
_HOLDS = 2
"""After so many, nobody else has taken it: it is taken."""
_SHORT = 1.0
"""Seconds until the next try when the system has no descriptor or memory for a connection."""
_CLOSED = -1


class Board:
    """How many connections each process has, in memory that all of them see. One cell per process, written by
    it alone while it lives; -1 = it takes none."""

    def __init__(self, cells: int, fd: int = -1) -> None:
        """`fd`: an existing board, which is then this object's; by default a new one is made."""
        size = 8 * cells
        self.fd = os.memfd_create("connections") if fd < 0 else fd
        """To be passed on to the processes."""
        if fd < 0:
            os.ftruncate(self.fd, size)
        self._memory = mmap.mmap(self.fd, size)
        self._cells = memoryview(self._memory).cast("q")
        if fd < 0:
            for cell in range(cells):
                self._cells[cell] = _CLOSED

    def __getitem__(self, cell: int) -> int:
        return self._cells[cell]

    def write(self, cell: int, connections: int) -> None:
        """What the owner of a cell has."""
        self._cells[cell] = connections

    def clear(self, cell: int) -> None:
        """Its owner takes no more connections, or is gone."""
        self._cells[cell] = _CLOSED

    def least(self) -> int:
        """The fewest connections that a process has which takes more."""
        return min((count for count in self._cells if count != _CLOSED), default=0)


class Acceptor:
    """Takes connections for one process.

    All are woken by a connection. Left to themselves whoever is awake takes all that wait: of 32 one process
    gets 30. So whoever has more than the least leaves a connection to the others for some milliseconds.
    """

    def __init__(
        self,
        listening: socket.socket,
        board: Board,
        cell: int,
        protocol: Callable[[], asyncio.Protocol],
        count: Callable[[], int],
    ) -> None:
        """`protocol` makes the protocol of a connection, `count` tells how many there are."""
        self._loop = asyncio.get_running_loop()
        self._listening = listening
        self._board = board
        self._cell = cell
        self._protocol = protocol
        self._count = count
        self._made: set[asyncio.Task[object]] = set()
        self._holds = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.counted()
        self._listen()

    def counted(self) -> None:
        """The number of connections has changed."""
        if not self._closed:
            self._board.write(self._cell, self._count() + len(self._made))

    def close(self) -> None:
        """Takes no more connections; the socket stays with the other processes. May be called again."""
        if self._closed:
            return
        self._closed = True
        self._board.clear(self._cell)
        self._deaf()
        if self._timer is not None:
            self._timer.cancel()
        self._listening.close()

    async def settled(self) -> None:
        """Waits until every connection that was taken has its protocol."""
        if self._made:
            await asyncio.wait(self._made)

    def _listen(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listening.fileno(), self._ready)

    def _deaf(self) -> None:
        self._loop.remove_reader(self._listening.fileno())

    def _rest(self, seconds: float) -> None:
        self._deaf()
        self._timer = self._loop.call_later(seconds, self._listen)

    def _ready(self) -> None:
        """Somebody wants to connect.

        1. Another process has fewer connections: it is left to that one, but not for long. 2. It is taken;
        nothing is there when another one was quicker.
        """
        if self._holds < _HOLDS and self._board[self._cell] > self._board.least():  # 1
            self._holds += 1
            self._rest(_HOLD)
            return
        self._holds = 0
        try:
            taken, _ = self._listening.accept()  # 2
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("no connection could be taken; the next try comes", error=error.strerror)
            self._rest(_SHORT)
            return
        taken.setblocking(False)
        made = self._loop.create_task(self._make(taken))
        self._made.add(made)
        made.add_done_callback(self._done)
        self.counted()

    async def _make(self, taken: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, taken)
        except OSError:  # it is gone already
            taken.close()

    def _done(self, made: asyncio.Task[object]) -> None:
        self._made.discard(made)
        self.counted()
