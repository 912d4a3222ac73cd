"""Waiting on a loop for what nobody announces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


async def until(condition: Callable[[], Any], what: str, seconds: float = 10.0) -> Any:
    """Polls until `condition` (or what it awaits) holds; fails with `what` after the deadline."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert loop.time() < end, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.005)
