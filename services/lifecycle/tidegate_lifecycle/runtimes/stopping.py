"""Stops that are joined, hastened, and carried out whoever loses patience: the same for all runtimes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine


class Stopping:
    """A stop that is under way."""

    def __init__(self, kill_at: float) -> None:
        self.kill_at = kill_at
        """When patience ends, on the loop's clock."""
        self._hasten = asyncio.Event()

    def hasten(self, kill_at: float) -> None:
        """Patience ends then, if that is sooner."""
        if kill_at < self.kill_at:
            self.kill_at = kill_at
            self._hasten.set()

    async def wait(self, ended: asyncio.Future[str]) -> None:
        """Until the server ends or its grace does, which a second caller may shorten."""
        loop = asyncio.get_running_loop()
        while not ended.done() and loop.time() < self.kill_at:
            hastened = asyncio.ensure_future(self._hasten.wait())
            try:
                left = self.kill_at - loop.time()
                await asyncio.wait((ended, hastened), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            finally:
                hastened.cancel()
            self._hasten.clear()


class Stops:
    """The stops under way, by instance. Each is a task: a cancelled caller doesn't undo it."""

    def __init__(self) -> None:
        self._tasks: dict[str, tuple[Stopping, asyncio.Task[None]]] = {}

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._tasks

    async def join(
        self, instance_id: str, grace: float, work: Callable[[Stopping], Coroutine[None, None, None]]
    ) -> None:
        """Begins the stop with `work`, or joins the one under way and hastens it when `grace` is shorter."""
        kill_at = asyncio.get_running_loop().time() + grace
        if instance_id not in self._tasks:
            stopping = Stopping(kill_at)
            task = asyncio.create_task(work(stopping), name=f"stop {instance_id}")
            self._tasks[instance_id] = stopping, task
            task.add_done_callback(lambda _: self._tasks.pop(instance_id, None))
        stopping, task = self._tasks[instance_id]
        stopping.hasten(kill_at)
        await asyncio.shield(task)

    async def finish(self, patience: float | None = None) -> None:
        """Waits until all are done; after `patience` seconds those that aren't are given up."""
        loop = asyncio.get_running_loop()
        until = None if patience is None else loop.time() + patience
        while tasks := [task for _, task in self._tasks.values()]:
            left = None if until is None else max(0.0, until - loop.time())
            _, pending = await asyncio.wait(tasks, timeout=left)
            if pending:
                for task in pending:
                    task.cancel()
                await asyncio.wait(pending)
