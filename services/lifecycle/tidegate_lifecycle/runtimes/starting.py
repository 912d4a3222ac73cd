"""Starts that end with a server or with nothing, whoever loses patience: the same for all runtimes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Generic, TypeVar

_S = TypeVar("_S")


class Starts(Generic[_S]):
    """The starts under way, by instance. Each is a task: a cancelled caller gets it ended, not torn apart."""

    def __init__(self, end: Callable[[_S], Coroutine[None, None, None]]) -> None:
        self._end = end
        """Ends a server of which nobody has the handle, at once."""
        self._ids: set[str] = set()
        self._abandoned: set[asyncio.Task[None]] = set()

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    async def carry_out(self, instance_id: str, work: Callable[[], Coroutine[None, None, _S]]) -> _S:
        """Does the work and gives its server. When the caller is cancelled, the work is finished all the same
        and what it started is ended, before the cancellation goes on."""
        self._ids.add(instance_id)
        task = asyncio.create_task(self._run(instance_id, work), name=f"start {instance_id}")
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            ending = asyncio.create_task(self._abandon(task), name=f"abandon {instance_id}")
            self._abandoned.add(ending)
            ending.add_done_callback(self._abandoned.discard)
            await asyncio.shield(ending)
            raise

    async def finish(self, patience: float | None = None) -> None:
        """Waits until those whose callers were cancelled are ended; after `patience` seconds they are given
        up."""
        while self._abandoned:
            _, pending = await asyncio.wait(set(self._abandoned), timeout=patience)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _run(self, instance_id: str, work: Callable[[], Coroutine[None, None, _S]]) -> _S:
        try:
            return await work()
        finally:
            self._ids.discard(instance_id)

    async def _abandon(self, task: asyncio.Task[_S]) -> None:
        await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None:
            await self._end(task.result())
