"""Estimates of all models that need one: at the start, after each change of the catalogue, off the loop.

Nothing waits for it but the start of a model whose need is unknown, and that for a few seconds at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from tidegate_lifecycle.catalog import Catalog, Model
from tidegate_lifecycle.estimate.amounts import estimate
from tidegate_lifecycle.estimate.shape import Shape, UnknownError
from tidegate_lifecycle.fleet import Fleet
from tidegate_lifecycle.messages import Estimated
from tidegate_lifecycle.modelfiles import LaterError
from tidegate_lifecycle.needs import Estimate

log = structlog.get_logger("tidegate.estimating")

PATIENCE = 10.0
"""Seconds after which a model may start without its estimate."""
AGAIN = (30.0, 600.0)
"""Seconds until a hub that doesn't answer is asked again: at first, and at most."""
AT_ONCE = 4
"""Models that are read at the same time."""
_ENGINES = frozenset({"vllm", "llamacpp"})

Read = Callable[[Model], Awaitable[Shape]]


class Estimator:
    """Which models are being estimated, each in a task of its own. Only the reconciler calls it."""

    def __init__(self, read: Read, post: Callable[[Estimated], None]) -> None:
        self._read, self._post = read, post
        self._gate = asyncio.Semaphore(AT_ONCE)
        self.catalog: Catalog | None = None
        """The one that was considered last."""
        self._models: dict[str, Model] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def consider(self, catalog: Catalog) -> frozenset[str]:
        """Begins with models that are new or have changed, and forgets those that are gone.

        Gives the names of all these: what was known of them counts no more. Never waits.
        """
        self.catalog = catalog
        wanted = {model.name: model for model in catalog.models.values() if needed(model)}
        known = self._models
        kept = {name for name in wanted if name in known and settings(known[name]) == settings(wanted[name])}
        stale, fresh = known.keys() - kept, wanted.keys() - kept
        for name in stale:
            self._tasks.pop(name).cancel()
        for name in fresh:
            self._tasks[name] = asyncio.ensure_future(self._work(wanted[name]))
        self._models = wanted
        return frozenset(stale | fresh)

    async def close(self) -> None:
        """Ends what is still being read."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _work(self, model: Model) -> None:
        """One model, until its files have told what they do; a hub that is away is asked again and again."""
        pause = AGAIN[0]
        late = asyncio.get_running_loop().call_later(PATIENCE, self._post, Estimated(model, _LATE))
        try:
            while True:
                async with self._gate:
                    found, again = await self._once(model)
                late.cancel()
                self._post(Estimated(model, found))
                if not again:
                    return
                await asyncio.sleep(pause)
                pause = min(2 * pause, AGAIN[1])
        finally:
            late.cancel()

    async def _once(self, model: Model) -> tuple[Estimate, bool]:
        """An estimate, or an empty one with the reason; and whether to try again."""
        try:
            found = estimate(await self._read(model), model)
        except Exception as error:
            if not isinstance(error, UnknownError):
                log.exception("a model's files aren't understood", model=model.name)
                return Estimate(why="its files aren't understood; set vram"), False
            log.info("no estimate", model=model.name, reason=str(error))
            return Estimate(why=f"{error}; set vram"), isinstance(error, LaterError)
        log.info("estimated", model=model.name, mib=dict(found.mib), why=found.why)
        return found, False


def keep_up(fleet: Fleet, estimator: Estimator) -> None:
    """Has the models of the catalogue estimated that are new in it. Called by the reconciler in each turn."""
    if fleet.catalog is estimator.catalog:
        return
    for name in estimator.consider(fleet.catalog):
        fleet.estimates.pop(name, None)
    models = fleet.catalog.models.values()
    fleet.estimating = {one.name for one in models if needed(one) and one.name not in fleet.estimates}


def take_estimate(fleet: Fleet, message: Estimated) -> None:
    """Puts an estimate in place, unless the model's settings have changed meanwhile."""
    current = fleet.catalog.models.get(message.model.name)
    if current is not None and settings(current) == settings(message.model):
        fleet.estimates[current.name] = message.estimate
        fleet.estimating.discard(current.name)


_LATE = Estimate(why="its files are still being read")


def needed(model: Model) -> bool:
    """Its need isn't declared, and its engine's files can be read."""
    return model.engine in _ENGINES and model.vram_mib is None and model.vram_share is None


def settings(model: Model) -> tuple[Any, ...]:
    """All that an estimate depends on."""
    return (
        *(model.engine, model.source, model.dtype, model.quantization, model.kv_cache_dtype),
        *(model.max_model_len, model.max_num_seqs, model.kv_reservation_seqs, model.tensor_parallel_size),
        *(model.extra_args, model.volumes, bool(model.image), dict(model.env)),
    )
