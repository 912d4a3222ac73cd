"""The answer to one client: its head, its bytes, and an error in whatever form is still possible."""

from __future__ import annotations

from typing import Any

from tidegate_edge import envelope
from tidegate_edge.envelope import Failure
from tidegate_edge.head import Headers

_SSE_FIELDS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Cut(Exception):
    """The answer was half-sent and can't be ended: leaves the application, so that the connection closes
    without an end and the client sees a truncated body."""


class Answer:
    """What has been said to the client so far."""

    __slots__ = ("_path", "_send", "begun", "ended", "events", "last", "status")

    def __init__(self, send: Any, path: bytes) -> None:
        self._send = send
        self._path = path
        self.begun = False
        """The head is out; the status can't be changed any more."""
        self.ended = False
        self.events = False
        """The body is an SSE stream to which an error can be added."""
        self.last = b""
        """The last bytes sent."""
        self.status = 0

    async def start(self, status: int, headers: Headers, events: bool) -> None:
        """Sends the head."""
        self.begun, self.events, self.status = True, events, status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def start_events(self, own: Headers) -> None:
        """Sends the head of an SSE stream of the edge's own."""
        await self.start(200, [*_SSE_FIELDS, *own], events=True)

    async def more(self, data: bytes) -> None:
        """Sends bytes of the body; waits while the client takes none."""
        self.last = data
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """Sends the last bytes."""
        self.ended = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """A complete answer."""
        await self.start(status, headers, events=False)
        await self.end(body)

    async def fail(self, failure: Failure, own: Headers) -> None:
        """Ends with an error: as a response of its own, inside the stream, or by cutting the connection
        (Cut). Never in a way that looks complete."""
        if not self.begun:
            body = failure.body()
            length = (b"content-length", b"%d" % len(body))
            await self.whole(failure.status, [*failure.headers(), length, *own], body)
        else:
            await self.fail_in_stream(failure.error())

    async def fail_in_stream(self, error: dict[str, Any]) -> None:
        """Ends a begun stream with an error object. A cut event is ended first: its line would swallow it."""
        if not self.events or self.ended:
            self.ended = True
            raise Cut
        whole = not self.last or self.last.endswith((b"\n\n", b"\r\n\r\n"))
        await self.end((b"" if whole else b"\n\n") + envelope.in_stream(self._path, error))
