"""The HTTP client towards model servers: one request, one response, bytes as they come.

All of aiohttp that the edge uses is in this file, so that it can be replaced by something faster.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from multidict import CIMultiDict
from yarl import URL

Headers = list[tuple[bytes, bytes]]

_KEEP_ALIVE = 3.0
"""Seconds that an idle connection is kept: vLLM closes its side after 5; the next POST would race that."""
_READ_BUFFER = 64 * 1024
"""aiohttp stops reading at twice this: what a slow client may leave lying here."""
_PIECE = 256 * 1024
"""Longer bodies are written in pieces, so that a slow server doesn't get all of it into our buffers."""
_NOT_OURS = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")


class ConnectFailed(Exception):
    """No byte of an answer came: no connection was made, or it closed before. May be tried elsewhere."""


class Broken(Exception):
    """The answer began and broke off, or was no HTTP. Never tried again: the server has begun to work."""


class Reply:
    """A response whose head has come."""

    __slots__ = ("_response", "headers", "reused", "status")

    def __init__(self, response: aiohttp.ClientResponse, reused: bool) -> None:
        self._response = response
        self.status = response.status
        self.headers: Headers = list(response.raw_headers)
        self.reused = reused
        """It came on a connection that had been used before."""

    @property
    def open_ended(self) -> bool:
        """Nothing but the end of the connection tells where the body ends."""
        names = [name.lower() for name, _ in self.headers]
        return b"content-length" not in names and b"transfer-encoding" not in names

    async def read(self) -> bytes:
        """The next bytes, as they came; empty at the end. Raises Broken."""
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError, RuntimeError) as error:
            # RuntimeError: aiohttp's word for a connection that closed between two reads
            raise Broken(type(error).__name__) from None

    def on_end(self, callback: Callable[[], None]) -> None:
        """`callback` is called once when the last byte has come from the server, read or not; at once if it
        has already. Not called when the response breaks off."""
        self._response.content.on_eof(callback)

    def rest(self) -> bytes:
        """All that has come and was not read. Only inside and after the callback of `on_end`."""
        return self._response.content.read_nowait(-1)

    def close(self) -> None:
        """Closes the connection, unless the response has ended and it went back to the pool. Synchronous."""
        self._response.close()


class Upstream:
    """Connections to all model servers, kept alive between requests."""

    def __init__(self, connect_timeout: float) -> None:
        """`connect_timeout`: seconds for name, TCP and TLS together."""
        self._session = aiohttp.ClientSession(
            connector=_Connector(limit=0, keepalive_timeout=_KEEP_ALIVE, ttl_dns_cache=10),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect_timeout, sock_read=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            read_bufsize=_READ_BUFFER,
            max_line_size=32 * 1024,
            max_field_size=32 * 1024,
            skip_auto_headers=_NOT_OURS,
        )

    async def close(self) -> None:
        """Closes every connection."""
        await self._session.close()

    async def open(self, method: str, url: str, headers: Headers, body: bytes) -> Reply:
        """Sends a request and waits for the head of its response; `url` is sent as it is.

        A kept connection that turns out to have been closed meanwhile is replaced by a new one at once: the
        server can't have seen the request. Raises ConnectFailed or Broken.
        """
        attempt = _Attempt()
        try:
            return await self._send(attempt, method, url, headers, body)
        except ConnectFailed:
            if not attempt.reused:
                raise
        attempt = _Attempt(fresh=True)
        return await self._send(attempt, method, url, headers, body)

    async def _send(self, attempt: _Attempt, method: str, url: str, headers: Headers, body: bytes) -> Reply:
        _attempt.set(attempt)
        sent = CIMultiDict((_text(name), _text(value)) for name, value in headers)
        data: Any = body
        if len(body) > _PIECE:
            sent["Content-Length"] = str(len(body))
            data = _pieces(body)
        try:
            response = await self._session.request(
                method, URL(url, encoded=True), headers=sent, data=data, allow_redirects=False
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if attempt.answered:
                raise Broken(type(error).__name__) from None
            raise ConnectFailed(type(error).__name__) from None
        return Reply(response, attempt.reused)


async def _pieces(body: bytes) -> AsyncIterator[memoryview]:
    view = memoryview(body)
    for at in range(0, len(body), _PIECE):
        yield view[at : at + _PIECE]


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


class _Attempt:
    """What became of one request's connection. The connector fills it in; a context variable leads there."""

    __slots__ = ("fresh", "handler")

    def __init__(self, fresh: bool = False) -> None:
        self.fresh = fresh
        """Only a new connection will do."""
        self.handler: _Handler | None = None

    @property
    def reused(self) -> bool:
        return self.handler is not None and self.handler.uses > 1

    @property
    def answered(self) -> bool:
        """A byte of the answer has come."""
        return self.handler is not None and self.handler.answered


_attempt: contextvars.ContextVar[_Attempt] = contextvars.ContextVar("attempt")


class _Handler(ResponseHandler):
    """aiohttp's protocol, which also knows how often it was used and whether the answer has begun."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.uses = 0
        self.answered = False

    def data_received(self, data: bytes) -> None:
        self.answered = True
        super().data_received(data)


class _Connector(aiohttp.TCPConnector):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory = cast(
            "functools.partial[ResponseHandler]", functools.partial(_Handler, loop=self._loop)
        )

    async def connect(self, req: Any, traces: Any, timeout: Any) -> Any:
        attempt = _attempt.get()
        connection = await super().connect(req, traces, timeout)
        handler = connection.protocol
        while attempt.fresh and isinstance(handler, _Handler) and handler.uses:
            connection.close()
            connection = await super().connect(req, traces, timeout)
            handler = connection.protocol
        assert isinstance(handler, _Handler), "the connector's factory makes these"
        handler.uses += 1
        handler.answered = False
        attempt.handler = handler
        return connection
