"""What arrived, byte for byte, so that a test can prove what was sent on to the engine."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from aiohttp import web

_KEPT = 200
_WHOLE_BODY = 4096
"""Bodies shorter than this are kept as they are."""


class Entry:
    """One request."""

    __slots__ = ("body", "digest", "ended", "headers", "length", "method", "number", "status", "target")

    def __init__(self, number: int, request: web.Request) -> None:
        self.number = number
        self.method = request.method
        self.target = request.raw_path
        self.headers = request.raw_headers
        self.body: bytes | None = None
        self.digest: str | None = None
        self.length: int | None = None
        self.status: int | None = None
        self.ended = "running"

    def received(self, body: bytes) -> None:
        """The body is here whole."""
        self.length = len(body)
        self.digest = hashlib.sha256(body).hexdigest()
        self.body = body if len(body) < _WHOLE_BODY else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON. `body` is None where it is long or hasn't arrived whole."""
        path, _, query = self.target.partition("?")
        headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in self.headers]
        return {
            "number": self.number,
            "method": self.method,
            "path": path,
            "query": query,
            "headers": headers,
            "traceparent": next((value for name, value in headers if name.lower() == "traceparent"), None),
            "body_length": self.length,
            "body_sha256": self.digest,
            "body": None if self.body is None else self.body.decode("utf-8", "replace"),
            "status": self.status,
            "ended": self.ended,
        }


class Journal:
    """The last requests: 200 with a method other than GET, and apart from them the last 200 GETs, so that
    polling doesn't push out what a test looks for."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._work: deque[Entry] = deque(maxlen=_KEPT)
        self._polls: deque[Entry] = deque(maxlen=_KEPT)

    @contextmanager
    def record(self, request: web.Request) -> Iterator[Entry]:
        """Keeps the request; leaving the block says how it ended."""
        entry = Entry(next(self._numbers), request)
        (self._polls if entry.method == "GET" else self._work).append(entry)
        try:
            yield entry
        except BaseException:
            # A client that leaves cancels its handler, or its writes fail.
            entry.ended = "aborted"
            raise
        entry.ended = "completed"

    def clear(self) -> None:
        """Forgets all."""
        self._work.clear()
        self._polls.clear()

    def entries(self, path: str | None = None) -> list[dict[str, Any]]:
        """In order of arrival; only those of a path where one is given."""
        ordered = sorted([*self._work, *self._polls], key=lambda entry: entry.number)
        listed = (entry.as_dict() for entry in ordered)
        return [entry for entry in listed if path is None or entry["path"] == path]
