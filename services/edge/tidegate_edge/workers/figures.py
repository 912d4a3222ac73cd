"""What all workers tell of themselves, as one: for /metrics and the status."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Set
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tidegate_edge.metrics import MasterMetrics
from tidegate_edge.workers.peers import PATIENCE
from tidegate_edge.workers.process import Worker
from tidegate_edge.workers.sums import Sums, taken

_LOOK = 10.0
"""Seconds between two looks at what the workers have counted: so much is lost when one is killed."""


class Figures:
    """Asks the workers, and remembers those that are gone."""

    def __init__(self, alive: Set[Worker]) -> None:
        """`alive`: the master's own set."""
        self._alive = alive
        self._ended = Sums()
        self._metrics = MasterMetrics()

    def forget(self, worker: Worker) -> None:
        """It has ended; what it has counted stays."""
        self._ended.add(worker.families, ended=True)
        self._metrics.ends.labels("retired" if worker.retiring else "died").inc()

    async def look(self) -> None:
        """Asks now and then, unasked, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK)
            await self._summed()

    async def text(self) -> str:
        """The metrics, as Prometheus reads them."""
        text = await asyncio.to_thread(generate_latest, await self._summed())
        return text.decode()

    def registry(self) -> CollectorRegistry:
        """The metrics, to be asked for in other threads."""
        registry = CollectorRegistry()
        registry.register(_All(self, asyncio.get_running_loop()))
        return registry

    async def told(self) -> list[dict[str, Any]]:
        """Each worker, for the status."""
        workers = sorted(self._alive, key=lambda worker: (worker.number, worker.started))
        return list(await asyncio.gather(*(_told(worker) for worker in workers)))

    async def _summed(self) -> Sums:
        """Of all processes that there are and were, and the master's own."""
        await asyncio.gather(*(_refresh(worker) for worker in self._alive))
        sums = Sums()
        sums.add(self._ended.families())
        sums.add(taken(self._metrics.registry))
        for worker in self._alive:
            sums.add(worker.families)
        return sums


class _All(Collector):
    def __init__(self, figures: Figures, loop: asyncio.AbstractEventLoop) -> None:
        self._figures = figures
        self._loop = loop

    def collect(self) -> Iterable[Metric]:
        summed = asyncio.run_coroutine_threadsafe(self._figures._summed(), self._loop)
        return summed.result(2 * PATIENCE).collect()


async def _refresh(worker: Worker) -> None:
    if worker.listening.is_set():
        families = await worker.link.ask("metrics", PATIENCE)
        if families is not None and not worker.last:
            worker.families = families


async def _told(worker: Worker) -> dict[str, Any]:
    told = None
    if worker.listening.is_set():
        told = await worker.link.ask("told", PATIENCE)
    known = {"worker": worker.number, "pid": worker.pid, "state": worker.state}
    return {**known, **(told or {"answers": False})}
