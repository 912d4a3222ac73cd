"""TCP connections in memory, for a `ShuffleLoop`: asyncio's transports, with bounded buffers and a delay."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from tests.support.shuffle import ShuffleLoop

HIGH = 64 * 1024
"""Bytes that the other side may leave unread before a writer is paused."""


class Wires:
    """All listeners and connections of a loop. Takes its place in `loop.transports`."""

    def __init__(self, loop: ShuffleLoop, delay: Callable[[], float] = lambda: 0.0) -> None:
        """`delay`: seconds that each piece takes; pieces of one direction stay in order."""
        self.loop, self.delay = loop, delay
        self.listeners: dict[int, Callable[[], asyncio.Protocol]] = {}
        self.open: dict[Transport, None] = {}
        """Ends of connections that nobody has closed."""
        self._port = 40_000
        loop.transports = self

    def listen(self, factory: Callable[[], asyncio.Protocol], host: str, port: int | None) -> Listener:
        """Connections to the port are taken from now on."""
        self._port += 1
        self.listeners[port or self._port] = factory
        return Listener(self, host, port or self._port)

    async def connect(self, factory: Callable[[], asyncio.Protocol], host: str, port: int) -> Any:
        """Connects, as `create_connection` does."""
        await asyncio.sleep(self.delay())
        if port not in self.listeners:
            raise ConnectionRefusedError(111, f"nobody listens on {host}:{port}")
        ours, theirs = Transport(self, factory()), Transport(self, self.listeners[port]())
        ours.peer, theirs.peer = theirs, ours
        theirs.protocol.connection_made(theirs)
        ours.protocol.connection_made(ours)
        try:
            await asyncio.sleep(0)
        except BaseException:
            ours.abort()
            raise
        return ours, ours.protocol


class Listener:
    """What `create_server` gives."""

    def __init__(self, wires: Wires, host: str, port: int) -> None:
        self._wires, self._name = wires, (host, port)
        self.sockets = [self]

    def getsockname(self) -> tuple[str, int]:
        """Host and port."""
        return self._name

    def close(self) -> None:
        """Connections are refused from now on."""
        self._wires.listeners.pop(self._name[1], None)


class Transport(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, wires: Wires, protocol: asyncio.Protocol) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.protocol = protocol
        self.peer: Transport
        self._wires, self._loop = wires, wires.loop
        self._coming: deque[bytes | Exception | None] = deque()
        """On the way; None = the end, an exception = the connection broke."""
        self._unread: deque[bytes | Exception | None] = deque()
        self._latest = 0.0
        self._closing = self._lost = self._half_closed = False
        self._reading, self._paused = True, False
        wires.open[self] = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if data and not (self._closing or self._half_closed):
            self.peer._arrive(bytes(data))
            if self.get_write_buffer_size() and not self._paused:
                self._paused = True
                cast(Any, self.protocol).pause_writing()

    def write_eof(self) -> None:
        if not (self._closing or self._half_closed):
            self._half_closed = True
            self.peer._arrive(None)

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return max(
            0,
            sum(len(one) for one in [*self.peer._coming, *self.peer._unread] if isinstance(one, bytes))
            - HIGH,
        )

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._loop.call_soon(self._read)

    def is_reading(self) -> bool:
        return self._reading

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = cast(asyncio.Protocol, protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def close(self) -> None:
        self._end(None, None)

    def abort(self) -> None:
        self._end(None, ConnectionResetError(104, "reset"))

    def _end(self, why: Exception | None, told: Exception | None) -> None:
        if self._closing:
            return
        self._closing = True
        self._coming.clear()
        self._unread.clear()
        if told is not None or not self._half_closed:
            self.peer._arrive(told)
        self._loop.call_soon(self._lose, why)

    def _lose(self, why: Exception | None) -> None:
        if not self._lost:
            self._lost = True
            self._wires.open.pop(self, None)
            self.protocol.connection_lost(why)

    def _arrive(self, item: bytes | Exception | None) -> None:
        if self._closing:
            return
        self._coming.append(item)
        self._latest = max(self._latest, self._loop.time() + self._wires.delay())
        if self._latest > self._loop.time():
            self._loop.call_at(self._latest, self._take)
        else:
            self._loop.call_soon(self._take)

    def _take(self) -> None:
        if self._coming:
            self._unread.append(self._coming.popleft())
            self._read()

    def _read(self) -> None:
        while self._unread and self._reading and not self._closing:
            item = self._unread.popleft()
            if isinstance(item, bytes):
                _deliver(self.protocol, item)
                self.peer._resume()
            elif isinstance(item, Exception):
                self._closing = True
                self._loop.call_soon(self._lose, item)
            elif not self.protocol.eof_received():
                self.close()

    def _resume(self) -> None:
        if self._paused and not self.get_write_buffer_size():
            self._paused = False
            if not self._closing:
                self._loop.call_soon(cast(Any, self.protocol).resume_writing)


def _deliver(protocol: asyncio.BaseProtocol, data: bytes) -> None:
    """As asyncio's transports do for either kind of protocol."""
    if not isinstance(protocol, asyncio.BufferedProtocol):
        cast(asyncio.Protocol, protocol).data_received(data)
        return
    while data:
        room = memoryview(cast(Any, protocol.get_buffer(len(data))))
        size = min(len(room), len(data))
        room[:size] = data[:size]
        protocol.buffer_updated(size)
        data = data[size:]
