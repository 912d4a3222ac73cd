"""The answer to one client: its head, its bytes, and an error in whatever form is still possible."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from tidegate_edge import envelope
from tidegate_edge.downstream.exchange import Exchange
from tidegate_edge.envelope import Failure
from tidegate_edge.head import Headers

_SSE_FIELDS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Answer:
    """What has been said to the client so far."""

    __slots__ = ("_exchange", "_path", "begun", "ended", "events", "last", "status")

    def __init__(self, exchange: Exchange, path: bytes) -> None:
        self._exchange = exchange
        self._path = path
        self.begun = False
        """The head is out; the status can't be changed any more."""
        self.ended = False
        self.events = False
        """The body is an SSE stream to which an error can be added."""
        self.last = b""
        """The last bytes sent."""
        self.status = 0

    def start(self, status: int, headers: Headers, events: bool) -> None:
        """Sends the head."""
        self.begun, self.events, self.status = True, events, status
        self._exchange.start(status, headers)

    def start_events(self, own: Headers) -> None:
        """Sends the head of an SSE stream of the edge's own."""
        self.start(200, [*_SSE_FIELDS, *own], events=True)

    def more(self, data: bytes) -> Awaitable[None]:
        """Sends bytes of the body; waits while the client takes none."""
        self.last = data
        return self._exchange.more(data)

    def end(self, data: bytes = b"") -> None:
        """Sends the last bytes."""
        self.ended = True
        self._exchange.end(data)

    def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """A complete answer."""
        self.begun = self.ended = True
        self.status = status
        self._exchange.whole(status, headers, body)

    def cut(self) -> None:
        """Ends it in a way that the client sees as broken."""
        self.ended = True
        self._exchange.cut()

    def fail(self, failure: Failure, own: Headers) -> None:
        """Ends with an error: as a response of its own, inside the stream, or by cutting the connection.
        Never in a way that looks complete."""
        if not self.begun:
            self.whole(failure.status, [*failure.headers(), *own], failure.body())
        else:
            self.fail_in_stream(failure.error())

    def fail_in_stream(self, error: dict[str, Any]) -> None:
        """Ends a begun stream with an error object. A cut event is ended first: its line would swallow it."""
        if not self.events or self.ended:
            self.cut()
            return
        whole = not self.last or self.last.endswith((b"\n\n", b"\r\n\r\n"))
        self.end((b"" if whole else b"\n\n") + envelope.in_stream(self._path, error))
