"""The caller's own deadline: it runs from the moment in which its request arrived, whatever it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tidegate_edge.envelope import Failure

_T = TypeVar("_T")
_ADMISSIONS_TURN = 0.5
"""Seconds after the deadline in which admission may still say that it has passed."""


class Due:
    """When a request's caller wants it to be under way at the latest."""

    __slots__ = ("_at", "_now")

    def __init__(self, deadline: float, now: Callable[[], float]) -> None:
        """`deadline` in seconds from now; 0 = none."""
        self._at = now() + deadline if deadline else 0.0
        self._now = now

    def left(self) -> float:
        """Seconds that are left; 0 = there is no deadline. Raises Failure (504) when none is left."""
        if not self._at:
            return 0.0
        left = self._at - self._now()
        if left <= 0.0:
            raise _too_late()
        return left

    async def granted(self, waiting: Awaitable[_T]) -> _T:
        """Waits for admission's answer, which ends the wait by the deadline; an admission that is away can't,
        so that it ends here. Raises Failure (504)."""
        if not self._at:
            return await waiting
        try:
            async with asyncio.timeout(self._at + _ADMISSIONS_TURN - self._now()):
                return await waiting
        except TimeoutError:
            raise _too_late() from None


def _too_late() -> Failure:
    return Failure("deadline_exceeded", "The request's own deadline has passed while it waited.", final=True)
