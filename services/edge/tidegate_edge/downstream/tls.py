"""TLS between a client's TCP connection and what it asks: a protocol to the one, a transport to the other.

Instead of the event loop's own, so that a connection counts and has its times from the moment it is accepted,
so that all bytes that its client hasn't taken are counted, and so that each connection costs what it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any, cast

import structlog

from tidegate_edge.downstream.connection import Connection
from tidegate_edge.envelope import Failure

log = structlog.get_logger("tidegate.edge")

_RECORD = 16 * 1024
"""Bytes that are encrypted or decrypted at a time: the buffers between keep the size of the largest."""


class TlsTransport(asyncio.Transport, asyncio.Protocol):
    """One connection. What is written is encrypted and handed on at once, so that the TCP transport's buffer
    and its flow control are the connection's. Until the handshake is over nothing can be written."""

    __slots__ = ("_connection", "_ended", "_incoming", "_outgoing", "_paused", "_raw", "_shaken", "_tls")

    def __init__(self, connection: Connection, context: ssl.SSLContext) -> None:
        super().__init__()
        self._connection = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        """None = the client doesn't speak TLS, and is told so."""
        self._shaken = False
        """The handshake is over."""
        self._ended = False
        """Nothing more is written, and what comes is dropped."""
        self._paused = False
        self._raw: asyncio.Transport

    # What the TCP transport says.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._connection.connection_made(self)

    def data_received(self, data: bytes) -> None:
        tls = self._tls
        for start in range(0, len(data), _RECORD):
            if self._ended or tls is None:
                return
            self._incoming.write(data[start : start + _RECORD])
            if self._shaken or self._shake(tls):
                self._decrypt(tls)

    def eof_received(self) -> None:
        """Without TLS's own end: a client that has left, too."""
        self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()

    # What the connection says.

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As the TCP transport has it, and `ssl_object`."""
        return self._tls if name == "ssl_object" else self._raw.get_extra_info(name, default)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """In encrypted bytes."""
        self._raw.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """In encrypted bytes."""
        return self._raw.get_write_buffer_size()

    def is_closing(self) -> bool:
        return self._ended or self._raw.is_closing()

    def pause_reading(self) -> None:
        self._paused = True
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        """What was decrypted no further is, soon: not in the midst of what the caller does."""
        self._paused = False
        self._raw.resume_reading()
        if self._tls is not None:
            asyncio.get_running_loop().call_soon(self._decrypt, self._tls)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        tls = self._tls
        if tls is None:
            self._raw.write(data)
        elif self._shaken and not self._ended:
            for start in range(0, len(data), _RECORD):
                tls.write(data[start : start + _RECORD])
                self._flush()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        """The last that is sent; what still comes is dropped."""
        self._end()
        if not self._raw.is_closing():
            self._raw.write_eof()

    def close(self) -> None:
        """When what was written has been taken."""
        self._end()
        self._raw.close()

    def abort(self) -> None:
        """At once."""
        self._ended = True
        self._raw.abort()

    # The encryption.

    def _shake(self, tls: ssl.SSLObject) -> bool:
        """Goes on with the handshake; whether it is over."""
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except ssl.SSLError as error:
            log.debug("a TLS handshake failed", reason=error.reason)
            self._mistaken(error)
            return False
        self._flush()
        self._shaken = True
        self._connection.encrypted()
        return True

    def _mistaken(self, error: ssl.SSLError) -> None:
        """1. Who speaks HTTP is told so in HTTP. 2. Who speaks another TLS is told so in TLS. Both end."""
        if error.reason == "HTTP_REQUEST":  # 1
            self._tls = None
            self._connection.refuse(Failure("bad_request", "This port is for https."))
        else:  # 2
            self._flush()
            self._ended = True
            self._raw.close()

    def _decrypt(self, tls: ssl.SSLObject) -> None:
        """Hands on what has come, unless the connection doesn't listen."""
        while not self._paused and not self._ended:
            try:
                data = tls.read(_RECORD)
            except ssl.SSLWantReadError:
                break
            except ssl.SSLError:  # damaged on its way, or forged
                self.abort()
                return
            if not data:
                self._connection.eof_received()
                self.close()
                return
            self._connection.data_received(data)
        self._flush()

    def _end(self) -> None:
        """Says that nothing more is sent."""
        if self._shaken and not self._ended and self._tls is not None:
            with contextlib.suppress(ssl.SSLError):  # it would wait for the client to say so, too
                self._tls.unwrap()
            self._flush()
        self._ended = True

    def _flush(self) -> None:
        if self._outgoing.pending and not self._raw.is_closing():
            self._raw.write(self._outgoing.read())
