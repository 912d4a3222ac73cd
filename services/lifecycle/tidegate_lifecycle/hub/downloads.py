"""Transfers that run now: one for each file, however many want it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tidegate_lifecycle.hub.threads import begin
from tidegate_lifecycle.hub.transfer import Job, Transfer


@dataclass
class _Running:
    transfer: Transfer
    ended: asyncio.Future[None]
    callers: set[object] = field(default_factory=set)


class Downloads:
    """Used on one event loop. A transfer that nobody waits for any more is stopped."""

    def __init__(self) -> None:
        self._running: dict[Path, _Running] = {}

    async def fetch(self, job: Job, watch: Callable[[Transfer], None]) -> None:
        """Returns when the file is in its place; joins a transfer of it that runs already. HubFailed.

        `watch` is given the transfer, for its progress.
        """
        while (running := self._running.get(job.target)) is not None and not running.callers:
            await asyncio.wait({running.ended})  # it was given up, and its thread is on its way out
        if running is None:
            running = self._begin(job)
        caller = object()
        running.callers.add(caller)
        watch(running.transfer)
        try:
            await asyncio.shield(running.ended)
        finally:
            running.callers.discard(caller)
            if not running.callers:
                running.transfer.stop()

    def _begin(self, job: Job) -> _Running:
        transfer = Transfer(job)
        ended = asyncio.wrap_future(begin(transfer.run, "tidegate-download"))
        running = self._running[job.target] = _Running(transfer, ended)

        def forget(done: asyncio.Future[None]) -> None:
            del self._running[job.target]
            if not done.cancelled():
                done.exception()  # seen: its callers may have left

        ended.add_done_callback(forget)
        return running
