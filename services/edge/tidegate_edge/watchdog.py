"""One timer per request for all its time limits, looked at lazily: a chunk costs two assignments."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Watchdog:
    """Calls `expired(cause)` when what is expected hasn't come within its limit.

    The hot loop writes `since`, `limit` and `cause` directly; the timer only looks at them now and then, at
    least every `grain` seconds, and exactly when a limit may have passed.
    """

    __slots__ = ("_expired", "_grain", "_handle", "_loop", "cause", "limit", "now", "since")

    def __init__(self, grain: float, expired: Callable[[str], None]) -> None:
        """`grain`: the shortest of all limits, in seconds."""
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        self._grain = grain
        self._expired = expired
        self.since = self.now()
        self.limit = float("inf")
        self.cause = ""
        self._handle = self._loop.call_later(grain, self._look)

    def expect(self, limit: float, cause: str) -> None:
        """From now on something must happen within `limit` seconds."""
        self.since, self.limit, self.cause = self.now(), limit, cause

    def rest(self) -> None:
        """Nothing is expected: the wait has a limit elsewhere."""
        self.limit = float("inf")

    def stop(self) -> None:
        """For good; and lets go of the one it would call, which holds this watchdog itself."""
        self._handle.cancel()
        self._expired = _nobody

    def _look(self) -> None:
        now = self.now()
        if now >= self.since + self.limit:
            self._expired(self.cause)
            return
        self._handle = self._loop.call_at(min(self.since + self.limit, now + self._grain), self._look)


def _nobody(_: str) -> None:
    """Nobody is interested any more."""
