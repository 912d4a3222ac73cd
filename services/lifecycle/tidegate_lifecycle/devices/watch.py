"""Reads the devices again and again: now and then, and fast while memory of ours is to be seen free."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from tidegate_chassis.process import monotonic
from tidegate_lifecycle.devices.reader import Devices
from tidegate_lifecycle.messages import DevicesRead

EVERY = 5.0
"""Seconds between two readings when nothing presses, or more where each is dear."""
SELDOM = 20
"""So many times the least pause, then."""


class DeviceWatch:
    """One reading at a time. `run` is its task; `hurry` is synchronous."""

    def __init__(self, devices: Devices, post: Callable[[DevicesRead], None], every: float = EVERY) -> None:
        self._devices, self._post, self._every = devices, post, every
        self._hurried = asyncio.Event()

    def hurry(self, on: bool) -> None:
        """Whether to read fast: at once, and as often as the program may be asked."""
        if on:
            self._hurried.set()
        else:
            self._hurried.clear()

    async def run(self) -> None:
        """Until it is cancelled."""
        least = self._devices.every
        while True:
            if self._hurried.is_set():
                await asyncio.sleep(least)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(self._every, SELDOM * least)):
                        await self._hurried.wait()
            began = monotonic()
            self._post(DevicesRead(tuple(await self._devices.read()), began))
