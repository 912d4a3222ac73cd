"""The last transitions and decisions, kept in a ring, and those who watch them."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

import structlog

log = structlog.get_logger("tidegate.events")

KEPT = 1000
"""How many events are kept, and how many a slow watcher may lag behind."""


@dataclass(frozen=True)
class Event:
    """One of them."""

    n: int
    at: float
    """Monotonic seconds."""
    kind: str
    model: str
    instance_id: str
    message: str


class Events:
    """Bounded in every direction: a watcher that doesn't read misses the oldest."""

    def __init__(self) -> None:
        self.kept: deque[Event] = deque(maxlen=KEPT)
        self._watchers: set[asyncio.Queue[Event]] = set()
        self._n = 0

    def add(self, now: float, kind: str, model: str = "", instance_id: str = "", message: str = "") -> None:
        """Keeps it, logs it, tells the watchers."""
        self._n += 1
        event = Event(self._n, now, kind, model, instance_id, message)
        self.kept.append(event)
        log.info(kind, model=model, instance=instance_id, why=message)
        for watcher in self._watchers:
            if watcher.full():
                watcher.get_nowait()
            watcher.put_nowait(event)

    def watch(self) -> asyncio.Queue[Event]:
        """A queue of the events from now on; give it back with `unwatch`."""
        queue: asyncio.Queue[Event] = asyncio.Queue(KEPT)
        self._watchers.add(queue)
        return queue

    def unwatch(self, queue: asyncio.Queue[Event]) -> None:
        """Ends it."""
        self._watchers.discard(queue)
