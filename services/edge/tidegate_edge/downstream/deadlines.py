"""Connections whose time runs: one timer for all that have the same patience."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_T = TypeVar("_T", bound=Hashable)
_SWEEP = 0.5
"""Seconds between two looks."""


class Deadlines(Generic[_T]):
    """Members that have the same patience each, in the order in which it runs out. One timer for all."""

    def __init__(self, patience: float, expired: Callable[[_T], None]) -> None:
        """`patience` in seconds; `expired` is called up to half a second after it."""
        self._loop = asyncio.get_running_loop()
        self._patience = patience
        self._expired = expired
        self._since: dict[_T, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._since)

    def add(self, member: _T) -> None:
        """Its time runs from now on, also when it was a member."""
        self._since.pop(member, None)
        self._since[member] = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(_SWEEP, self._sweep)

    def discard(self, member: _T) -> None:
        """Its time doesn't run any more. May be called again."""
        self._since.pop(member, None)

    def __contains__(self, member: _T) -> bool:
        return member in self._since

    def oldest(self) -> _T | None:
        """The member whose time has run longest."""
        return next(iter(self._since), None)

    def stop(self) -> None:
        """For good."""
        self._since.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _sweep(self) -> None:
        self._timer = None
        before = self._loop.time() - self._patience
        while (member := self.oldest()) is not None and self._since[member] <= before:
            del self._since[member]
            self._expired(member)
        if self._since:
            self._timer = self._loop.call_later(_SWEEP, self._sweep)
