"""The listening socket, and all connections of clients."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import structlog

from tidegate_chassis.config import ConfigError, Problem
from tidegate_chassis.tls import Certificates
from tidegate_edge.downstream.accept import Acceptor, Board
from tidegate_edge.downstream.connection import Connection, Stage
from tidegate_edge.downstream.deadlines import Deadlines
from tidegate_edge.downstream.exchange import Exchange
from tidegate_edge.downstream.tls import TlsTransport
from tidegate_edge.envelope import Failure

log = structlog.get_logger("tidegate.edge")

Application = Callable[[Exchange], Awaitable[None]]

_BACKLOG = 1024
_SEND_BUFFER = 128 * 1024
"""The kernel doubles it: what a client that doesn't read may leave in the kernel, per connection."""
_LINGER = 5.0
"""Seconds in which what a client still sends behind its connection's last answer is read and dropped."""
_SPARE_FILES = 256
"""Open files beside clients' connections and as many to model servers."""
_TOLD = 128
"""Clients beyond the most connections that are told so at one time; it takes them a moment to close."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may take. Seconds and bytes."""

    connections: int = 10_000
    head: int = 64 * 1024
    head_timeout: float = 10.0
    """From the first byte of a request to the end of its head; also for a TLS handshake."""
    idle_timeout: float = 75.0
    """Between two requests, and before the first."""
    write_timeout: float = 30.0
    """For the last bytes of an answer."""


class Server:
    """Serves one application on one socket. Connections tell it of every stage they are in."""

    def __init__(self, app: Application, limits: Limits, refused: Callable[[Failure], None]) -> None:
        """`refused` is told of every request that never reached the application."""
        self.longest_head = limits.head
        self.draining = False
        """Every answer is its connection's last."""
        self.refused = refused
        self._app = app
        self._most = limits.connections
        self._loop = asyncio.get_running_loop()
        self._listener: asyncio.Server | Acceptor | None = None
        self._connections: set[Connection] = set()
        self._emptied = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = Deadlines[Connection](limits.idle_timeout, Connection.expired)
        self._heads = Deadlines[Connection](limits.head_timeout, Connection.expired)
        self._flushing = Deadlines[Connection](limits.write_timeout, Connection.overdue)
        self._lingering = Deadlines[Connection](_LINGER, Connection.lingered)

    def __len__(self) -> int:
        return len(self._connections)

    async def start(
        self,
        listening: socket.socket,
        certificates: Certificates | None = None,
        shared: tuple[Board, int] | None = None,
    ) -> None:
        """Accepts connections on a bound socket; with `certificates` by TLS. `shared`: with other processes;
        the board, and our cell."""
        _allow_files(2 * self._most + _SPARE_FILES)
        # What the kernel buffers for each client is bounded; accepted connections inherit it.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        protocol = partial(self._protocol, certificates)
        if shared is not None:
            self._listener = Acceptor(listening, *shared, protocol, self.__len__)
        else:
            self._listener = await self._loop.create_server(protocol, sock=listening, backlog=_BACKLOG)

    def _protocol(self, certificates: Certificates | None) -> asyncio.Protocol:
        """What a new connection speaks."""
        connection = Connection(self)
        context = None if certificates is None else certificates.current.context
        return connection if context is None else TlsTransport(connection, context)

    def close_port(self) -> None:
        """No new connections. May be called again."""
        if self._listener is not None:
            self._listener.close()

    def retire(self) -> None:
        """No new connections; those that are there have one more request each. An idle one isn't closed: a
        request may be on its way, and would be lost."""
        self.draining = True
        self.close_port()

    async def emptied(self) -> None:
        """Waits until there is no connection."""
        if isinstance(self._listener, Acceptor):
            await self._listener.settled()
        while self._connections:
            self._emptied.clear()
            await self._emptied.wait()

    def drain(self) -> None:
        """No new connections, and no further requests on those that are there: idle ones are closed."""
        self.retire()
        for connection in list(self._connections):
            if connection.stage in (Stage.HANDSHAKE, Stage.IDLE):
                connection.close()

    async def stop(self, patience: float) -> None:
        """Closes the port and all connections; clients have `patience` seconds to take what is left."""
        self.drain()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=patience)
        for task in self._tasks:
            task.cancel()
        for connection in list(self._connections):
            connection.cut(reset=False)
        for clock in (self._idle, self._heads, self._flushing, self._lingering):
            clock.stop()

    # What connections say.

    @property
    def flooded(self) -> bool:
        """There are so many connections that a new one can't even be told so."""
        return len(self._connections) > self._most + _TOLD

    def welcome(self, connection: Connection) -> bool:
        """A new one. Beyond the most the one that has been idle longest goes; False when none is idle."""
        self._connections.add(connection)
        if len(self._connections) <= self._most:
            return True
        idle = self._idle.oldest()
        if idle is None:
            return False
        idle.close()
        return True

    def staged(self, connection: Connection) -> None:
        """It is in another stage, and has that stage's time."""
        self._time(connection, self._clock(connection))

    def owes(self, connection: Connection) -> None:
        """Its client has time to take what waits for it."""
        self._time(connection, self._flushing)

    def _clock(self, connection: Connection) -> Deadlines[Connection] | None:
        stage = connection.stage
        if stage is Stage.ANSWER:
            return None  # its time limits are the application's
        if stage in (Stage.HANDSHAKE, Stage.HEAD):
            return self._heads
        if stage is Stage.LAST:
            return self._lingering
        return self._flushing if connection.stuck else self._idle

    def _time(self, connection: Connection, clock: Deadlines[Connection] | None) -> None:
        if connection.clock is not None:
            connection.clock.discard(connection)
        connection.clock = clock
        if clock is self._flushing:
            connection.owed = connection.unsent
        if clock is not None:
            clock.add(connection)

    def gone(self, connection: Connection) -> None:
        """It is closed."""
        self._connections.discard(connection)
        if connection.clock is not None:
            connection.clock.discard(connection)
        if isinstance(self._listener, Acceptor):
            self._listener.counted()
        if not self._connections:
            self._emptied.set()

    def serve(self, exchange: Exchange) -> None:
        """A request has come: its answer is the application's."""
        task = self._loop.create_task(self._answer(exchange))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, exchange: Exchange) -> None:
        try:
            await self._app(exchange)
        except Exception:
            log.exception("a request failed")
        finally:
            exchange.cut()  # unless its answer has ended


def bind(listen: str) -> socket.socket:
    """A listening socket for `host:port`. Blocks for a name. Raises ConfigError.

    Without SO_REUSEPORT on purpose: a second program on the same port would silently get half of the
    connections.
    """
    host, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise _cannot(f"{host} is no address of this machine ({error.strerror})") from None
    family, kind, protocol, _, address = min(found, key=lambda item: item[0] != socket.AF_INET)
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise _cannot(f"can't listen on {listen} ({error.strerror}); `ss -ltnp` shows who does") from None
    listening.setblocking(False)
    return listening


def url_of(listening: socket.socket, secure: bool = False) -> str:
    """Where a listening socket is reached."""
    host, port = listening.getsockname()[:2]
    scheme = "https" if secure else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _cannot(why: str) -> ConfigError:
    return ConfigError([Problem("edge.listen", why)])


def _allow_files(wanted: int) -> None:
    """As many open files as connections need, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        log.warning("fewer open files are allowed than connections may need", allowed=most, wanted=wanted)
