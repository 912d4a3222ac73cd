"""What a model server says of its own load, asked for each second: a task per server, nobody waits for it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from tidegate_chassis.process import monotonic
from tidegate_lifecycle.messages import Sampled
from tidegate_lifecycle.probes import Load, Probe

EVERY = 1.0
"""Seconds between two askings."""
RARELY = 30.0
"""Seconds between two askings at most, of a server that doesn't answer or tells nothing of the kind."""
SOON = 0.05
"""Seconds between the first two askings when somebody waits for the answer to change; then twice as many."""
TIMEOUT = 2.0
"""Seconds in which it must answer."""

NOTHING = Load(None, None)


class Sampler:
    """Asks one server. `ask` is synchronous; `run` ends only by cancellation."""

    def __init__(self, instance_id: str, probe: Probe, post: Callable[[Sampled], None]) -> None:
        self._id, self._probe, self._post = instance_id, probe, post
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Somebody waits for news: the next asking begins now."""
        self._asked.set()

    async def run(self, address: str) -> None:
        """Asks until cancelled. What isn't told is not posted, and the last sample grows old."""
        pause = EVERY
        while True:
            self._asked.clear()
            began = monotonic()
            load = await self._probe.load(address, TIMEOUT)
            pause = next_pause(load, pause)
            if load != NOTHING:
                self._post(Sampled(self._id, load, began))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._asked.wait()
                    pause = SOON / 2


def next_pause(load: Load, pause: float) -> float:
    """Seconds until the next asking, after those before this one: rarely, when nothing is told; soon and then
    later, when somebody waits for the end of what runs; else each second."""
    if load == NOTHING:
        return min(RARELY, max(EVERY, 2 * pause))
    return min(EVERY, 2 * pause) if load.running else EVERY
