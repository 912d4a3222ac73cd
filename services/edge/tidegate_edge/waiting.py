"""SSE comments for a client whose streaming request waits: proxies and clients then don't time out (E9)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tidegate_edge.answer import Answer
from tidegate_edge.head import Headers
from tidegate_edge.ticket import Progress

_EVERY = 15.0
"""Seconds between two comments."""


class Waiting:
    """Begins after a while, unless `stop` comes first. Costs one timer until then."""

    __slots__ = ("_answer", "_describe", "_every", "_own", "_resting", "_stopping", "_task", "_timer")

    def __init__(self, answer: Answer, after: float, describe: Callable[[], str], own: Headers) -> None:
        """`after` in seconds; `describe` gives the text of a comment; `own`: fields for the head."""
        self._answer = answer
        self._every = min(_EVERY, after)
        self._describe = describe
        self._own = own
        self._resting = self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(after, self._begin)

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._comment())

    async def _comment(self) -> None:
        self._answer.start_events(self._own)
        while not self._stopping:
            await self._answer.more(f": {self._describe()}\n\n".encode())
            if self._stopping:
                return
            self._resting = True
            await asyncio.sleep(self._every)
            self._resting = False

    async def stop(self) -> None:
        """No more comments; returns when the last one is out, so that nothing is mixed with it."""
        self._timer.cancel()
        self._stopping = True
        if self._task is not None:
            if self._resting:
                self._task.cancel()
            await asyncio.wait({self._task})

    def abandon(self) -> None:
        """Ends it at once: nobody listens any more. Synchronous."""
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()


def describe(model: str, progress: Progress | None) -> str:
    """What a waiting client is told."""
    if progress is None:
        return "queued"
    about = f", about {progress.eta:.0f} s" if progress.eta >= 1 else ""
    return f"loading {model}{about}" if progress.loading else f"queued {progress.position}{about}"
