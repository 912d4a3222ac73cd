"""A request to the edge's application in this process, by a real connection on a transport in memory."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from tidegate_edge.downstream.connection import Connection
from tidegate_edge.downstream.exchange import Exchange
from tidegate_edge.downstream.server import Application, Server


class _Line(asyncio.Transport):
    """Takes everything at once."""

    def __init__(self, sent: list[bytes]) -> None:
        super().__init__()
        self._sent = sent
        self._closing = False

    def write(self, data: Any) -> None:
        self._sent.append(bytes(data))

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    abort = close

    def can_write_eof(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class _Host:
    """What a connection needs of a server."""

    draining = False
    longest_head = 65536

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []

    def welcome(self, _: Connection) -> bool:
        return True

    def staged(self, _: Connection) -> None:
        pass

    gone = staged

    def serve(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)


class Request:
    """One POST, as a task of the application's own, and what it said."""

    def __init__(self, app: Application, body: bytes, path: str = "/v1/chat/completions") -> None:
        self.sent: list[bytes] = []
        """One for each write."""
        host = _Host()
        self._connection = Connection(cast(Server, host))
        self._connection.connection_made(_Line(self.sent))
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        self._connection.data_received(head.encode())
        self._connection.data_received(body)
        (exchange,) = host.exchanges
        self.task = asyncio.ensure_future(app(exchange))

    def leave(self) -> None:
        """The client goes away."""
        self._connection.connection_lost(None)

    @property
    def status(self) -> int:
        """The answer's; 0 = there is none."""
        return int(self.sent[0].split(b" ", 2)[1]) if self.sent else 0

    @property
    def said(self) -> bytes:
        """Everything, as on the wire."""
        return b"".join(self.sent)
