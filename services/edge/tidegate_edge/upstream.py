"""The HTTP client towards model servers: one request, one response, bytes as they come.

Connections are kept per origin, as many as its model server has slots; the one used last is used first. What
goes over one is in `connection.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

from tidegate_edge.connection import INCOMING, Broken, ConnectFailed, Connection, Headers, Reply, Unread

__all__ = ["Broken", "ConnectFailed", "Reply", "Upstream"]

_KEEP_ALIVE = 3.0
"""Seconds that an idle connection is kept: vLLM closes its side after 5; the next POST would race that."""
_SWEEP = 1.0
"""Seconds between two looks at idle connections; one that is older is not used in any case."""
_WITHOUT_BODY = frozenset(("GET", "HEAD"))


@dataclass(frozen=True, slots=True)
class _Origin:
    """A model server's scheme, host and port."""

    url: str
    host: str
    port: int
    tls: bool


class Upstream:
    """Connections to all model servers, kept alive between requests."""

    def __init__(self, connect_timeout: float) -> None:
        """`connect_timeout`: seconds for name, TCP and TLS together."""
        self._timeout = connect_timeout
        self._loop = asyncio.get_running_loop()
        self._incoming = memoryview(bytearray(INCOMING))
        self._open: set[Connection] = set()
        self._idle: dict[str, list[Connection]] = {}
        """By origin; the one that has been idle longest comes first."""
        self._connecting: dict[str, set[asyncio.Timeout]] = {}
        """By origin: the limits of connections that are being made."""
        self._sweeper: asyncio.TimerHandle | None = None
        self._tls: ssl.SSLContext | None = None

    async def close(self) -> None:
        """Closes every connection."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._open):
            connection.abort()
        await asyncio.sleep(0)  # transports say that they are closed in the loop's next round

    async def open(
        self, method: str, url: str, headers: Headers, body: bytes | Unread, slots: int = 1
    ) -> Reply:
        """Sends a request and waits for the head of its response; `url` is sent as it is. `slots`: requests
        that its server takes at a time; no more idle connections to it are kept.

        A kept connection that is closed before a byte of the answer came is replaced by a new one at once:
        its keep-alive had most likely ended just then. Where no new one can be made, or it isn't answered,
        the server has most likely gone: the other kept ones are closed. Raises ConnectFailed or Broken.
        """
        origin, authority, path = _parted(url)
        head = _head(method, path, authority, headers, len(body))
        bodiless = method == "HEAD"
        kept = self._kept(origin)
        if kept is not None:
            kept.slots = slots
            with contextlib.suppress(ConnectFailed):
                return await kept.exchange(head, body, bodiless)
        try:
            fresh = await self._connect(_origin(origin))
            fresh.slots = slots
            return await fresh.exchange(head, body, bodiless)
        except ConnectFailed:
            self._close_idle(origin)
            raise

    def forget(self, url: str) -> None:
        """A server has gone; `url` is any of its URLs. Its idle connections are closed, and requests that it
        has not answered yet fail at once. Synchronous."""
        origin = _parted(url)[0]
        self._close_idle(origin)
        for limit in list(self._connecting.get(origin, ())):
            if not limit.expired():
                limit.reschedule(self._loop.time())
        for connection in [one for one in self._open if one.origin == origin]:
            connection.forget()

    def _close_idle(self, origin: str) -> None:
        for connection in self._idle.pop(origin, ()):
            connection.abort()

    def _kept(self, origin: str) -> Connection | None:
        idle, oldest = self._idle.get(origin), self._loop.time() - _KEEP_ALIVE
        while idle:
            connection = idle.pop()
            if connection.open and connection.idle_since > oldest:
                return connection
            connection.abort()
        return None

    async def _connect(self, origin: _Origin) -> Connection:
        connecting = self._connecting.setdefault(origin.url, set())
        try:
            async with asyncio.timeout(self._timeout) as limit:
                connecting.add(limit)
                if origin.tls and self._tls is None:
                    self._tls = await asyncio.to_thread(ssl.create_default_context)
                _, connection = await self._loop.create_connection(  # asyncio and uvloop set TCP_NODELAY
                    lambda: Connection(origin.url, self._incoming, self._free, self._gone),
                    origin.host,
                    origin.port,
                    ssl=self._tls if origin.tls else None,
                )
        except (OSError, UnicodeError) as error:
            raise ConnectFailed(type(error).__name__) from None
        finally:
            connecting.discard(limit)
            if not connecting:
                self._connecting.pop(origin.url, None)
        if connection.open:  # else it is gone already, and nobody would take it off the list
            self._open.add(connection)
        return connection

    def _free(self, connection: Connection) -> None:
        connection.idle_since = self._loop.time()
        idle = self._idle.setdefault(connection.origin, [])
        idle.append(connection)
        if len(idle) > connection.slots:
            idle.pop(0).abort()
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(_SWEEP, self._sweep)

    def _gone(self, connection: Connection) -> None:
        self._open.discard(connection)
        with contextlib.suppress(KeyError, ValueError):  # only idle ones are there
            self._idle[connection.origin].remove(connection)

    def _sweep(self) -> None:
        """Closes what has been idle for too long."""
        oldest = self._loop.time() - _KEEP_ALIVE
        for origin, idle in list(self._idle.items()):
            while idle and idle[0].idle_since <= oldest:
                idle.pop(0).abort()
            if not idle:
                del self._idle[origin]
        self._sweeper = self._loop.call_later(_SWEEP, self._sweep) if self._idle else None


def _parted(url: str) -> tuple[str, str, str]:
    """Origin, authority and path (without its first slash) of a URL."""
    scheme, _, rest = url.partition("://")
    authority, _, path = rest.partition("/")
    return f"{scheme}://{authority}", authority, path


@functools.lru_cache(1024)
def _origin(url: str) -> _Origin:
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    return _Origin(url, parts.hostname or "", parts.port or (443 if tls else 80), tls)


def _head(method: str, path: str, host: str, headers: Headers, length: int) -> bytes:
    """A request's head. Raises ValueError when a line break in a part of it would make it another request."""
    lines = [b"%s /%s HTTP/1.1" % (method.encode(), path.encode("latin-1")), b"host: " + host.encode()]
    lines += [b"%s: %s" % one for one in headers]
    if length or method not in _WITHOUT_BODY:
        lines.append(b"content-length: %d" % length)
    head = b"\r\n".join(lines) + b"\r\n\r\n"
    if head.count(b"\n") != len(lines) + 1:
        raise ValueError("a line break in a request's head")
    return head
