"""Notices that files have changed. Looks are taken in a thread, a few a second."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path

PACE = 0.5
"""Seconds between two looks at the files. A change counts when two of them have seen the same: editors write
in several steps, or put another file in its place, and what belongs together is written one by one."""

_Look = tuple[tuple[int, int, int] | None, ...]
"""Of each file the time of the last change (of the mode too), size and inode; None = it isn't there."""


class FileWatch:
    """One file, or some that belong together, and how they looked last."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._look: _Look = tuple(None for _ in paths)
        self._told = self._look

    async def changed(self, asked: asyncio.Event | None = None) -> bool:
        """Waits until a file looks otherwise than at the last return; the first look at one that exists
        counts too. Or until `asked`, which is cleared; True = it was asked for."""
        while True:
            at_once = await _pause(asked)
            look = await asyncio.to_thread(_look, self._paths)
            steady, self._look = look == self._look, look
            if at_once or (steady and look != self._told):
                self._told = look
                return at_once


async def _pause(asked: asyncio.Event | None) -> bool:
    if asked is None:
        await asyncio.sleep(PACE)
        return False
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asked.wait(), PACE)
    at_once = asked.is_set()
    asked.clear()
    return at_once


def _look(paths: Iterable[Path]) -> _Look:
    return tuple(map(_one, paths))


def _one(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ctime_ns, found.st_size, found.st_ino
