"""A TCP proxy between two services: it delays, stalls, cuts, and swallows while connections seem to live."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

CHUNK = 65536


@dataclass
class Way:
    """One direction of all connections. Changed by the proxy's own loop alone."""

    delay: float = 0.0
    """Seconds that each byte is late."""
    flows: asyncio.Event = field(default_factory=asyncio.Event)
    """Cleared: nothing is read, so that the sender's window fills; nothing is lost."""


class Pipe:
    """One connection through the proxy: a task for each direction."""

    def __init__(self, client: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self.client = client
        self.server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.deaf = {"up": False, "down": False}
        """A direction whose bytes are taken and thrown away. For good: TCP can't mend that."""

    def reset(self) -> None:
        """Ends both sides with RST."""
        for _, writer in filter(None, (self.client, self.server)):
            with contextlib.suppress(OSError):
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy(threading.Thread):
    """Listens on a free port of 127.0.0.1 and passes on to `target`, in a loop of its own.

    `up` is the way from who connects to the target, `down` the way back.
    """

    def __init__(self, target: int) -> None:
        super().__init__(daemon=True)
        self.port = 0
        self._target = target
        self._pipes: set[Pipe] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._deaf = {"up": False, "down": False}
        self._refuses = False
        self._listening = threading.Event()
        self.start()
        assert self._listening.wait(10)

    @property
    def address(self) -> str:
        """Where to connect."""
        return f"127.0.0.1:{self.port}"

    def delay(self, up: float = 0.0, down: float = 0.0) -> None:
        """From now on every byte is so many seconds late."""

        def change() -> None:
            self._ways["up"].delay, self._ways["down"].delay = up, down

        self._do(change)

    def stall(self, *ways: str) -> None:
        """A bandwidth of zero: nothing moves, nothing is lost. Both directions when none is named."""

        def change() -> None:
            for way in ways or ("up", "down"):
                self._ways[way].flows.clear()

        self._do(change)

    def swallow(self, *ways: str, fresh: bool = True) -> None:
        """Half-open: bytes of these directions vanish, and the connections stay up. For the connections that
        exist this is for good; `fresh`: for new ones too, until `restore`."""

        def change() -> None:
            for way in ways or ("up", "down"):
                self._deaf[way] = fresh
                for pipe in self._pipes:
                    pipe.deaf[way] = True

        self._do(change)

    def cut(self, refuse: bool = False) -> None:
        """Ends every connection with RST; `refuse`: new ones too, until `restore`."""

        def change() -> None:
            self._refuses = refuse
            for pipe in [*self._pipes]:
                pipe.reset()

        self._do(change)

    def restore(self) -> None:
        """Everything flows again. Connections that have lost bytes are reset, as they are when a peer hears
        of a connection that it has forgotten."""

        def change() -> None:
            self._refuses = False
            for way in self._ways.values():
                way.delay = 0.0
                way.flows.set()
            self._deaf = dict.fromkeys(self._deaf, False)
            for pipe in [*self._pipes]:
                if any(pipe.deaf.values()):
                    pipe.reset()

        self._do(change)

    def connections(self) -> int:
        """How many there are now."""
        return len(self._pipes)

    def close(self) -> None:
        """Ends everything."""
        self.cut(refuse=True)
        self._loop.call_soon_threadsafe(self._over.set)
        self.join(10)
        assert not self.is_alive()

    def run(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._ways = {"up": Way(), "down": Way()}
        for way in self._ways.values():
            way.flows.set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._over.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipe = Pipe((reader, writer))
        pipe.deaf = dict(self._deaf)
        if self._refuses:
            pipe.reset()
            return
        self._pipes.add(pipe)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            pipe.server = await asyncio.open_connection("127.0.0.1", self._target)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass("up", pipe, reader, pipe.server[1]))
                group.create_task(self._pass("down", pipe, pipe.server[0], writer))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass  # one side has ended, so the other one does
        finally:
            pipe.reset()
            self._pipes.discard(pipe)
            self._tasks.discard(task)

    async def _pass(
        self, name: str, pipe: Pipe, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Reads, and writes each piece when it is due; raises when the connection ends."""
        way, loop = self._ways[name], self._loop
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def write() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                await way.flows.wait()
                if not data:
                    return
                writer.write(data)
                await writer.drain()

        writing = asyncio.create_task(write())
        try:
            while True:
                await way.flows.wait()
                data = await reader.read(CHUNK)
                if pipe.deaf[name]:
                    if not data:  # the end of the connection vanishes too
                        await asyncio.Event().wait()
                    continue
                queue.put_nowait((loop.time() + way.delay, data))
                if not data:
                    await writing
                    raise ConnectionResetError
        finally:
            writing.cancel()
            await asyncio.wait({writing})

    def _do(self, change: Callable[[], None]) -> None:
        """Changes something in the proxy's loop, and waits until it is so."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                change()
            except BaseException as failure:
                done.set_exception(failure)
            else:
                done.set_result(None)

        self._loop.call_soon_threadsafe(run)
        done.result(10)
