"""The timer: lets the dispatcher look at the clock, after the input that had arrived was read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.metrics import Gaps
from tidegate_chassis.process import GapMeter

INTERVAL = 0.05
"""Seconds between two looks: how late a deadline may be noticed."""
LATE = 0.25
"""Seconds by which a tick may come too late and still count as one on time."""

log = structlog.get_logger("tidegate.admission")


class Timer:
    """Ticks, and judges how late a tick comes (SIGSTOP, a suspended machine, a loop that was busy)."""

    def __init__(self, dispatcher: Dispatcher, gaps: Gaps, clock: Callable[[], float]) -> None:
        self._dispatcher, self._gaps, self._clock = dispatcher, gaps, clock
        self._meter = GapMeter(INTERVAL)
        self._skipped = False

    async def run(self) -> None:
        """Until cancelled. An exception out of the dispatcher ends it, and the service."""
        self._meter.observe(self._clock())  # a process that is stopped before its first tick has a gap too
        while True:
            await asyncio.sleep(INTERVAL)
            self.look(self._clock())

    def look(self, now: float) -> None:
        """One tick.

        1. The loop was away for more than a quarter of the lease's time to live: all expiries are shifted.
        2. It came late: what edges said meanwhile is still unread, so nothing expires before the next tick.
           Never twice in a row, or a busy loop would never end anything.
        3. Otherwise: the dispatcher ends what is over.
        """
        late = self._meter.observe(now)
        shifted = late > self._dispatcher.lease_ttl / 4
        self._gaps.note(late, shifted)
        if shifted:  # 1
            log.warning("loop.gap", seconds=round(late, 3))
            self._dispatcher.shift(late, now)
        if late > LATE and not self._skipped:  # 2
            self._skipped = True
            return
        self._skipped = False
        self._dispatcher.tick(now)  # 3
