"""The task that estimates: when it reads, what it posts, and what it forgets."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.until import until
from tidegate_lifecycle import estimating as module
from tidegate_lifecycle.catalog import Catalog, Model
from tidegate_lifecycle.estimate.shape import Cache, Shape, UnknownError
from tidegate_lifecycle.estimating import Estimator, keep_up, take_estimate
from tidegate_lifecycle.messages import Estimated
from tidegate_lifecycle.modelfiles import LaterError
from tidegate_lifecycle.needs import Estimate

SHAPE = Shape(2**30, (Cache(32, 8, 256),), native_length=8192)
A, B = (Model(name, engine="vllm", source=f"org/{name}") for name in "ab")


class Desk:
    """A reader that answers as told, and what was posted."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.posted: list[Estimated] = []
        self.answers: dict[str, Callable[[], Awaitable[Shape]]] = {}
        self.at_once = self.most = 0
        self.estimator = Estimator(self._read, self.posted.append)

    async def _read(self, model: Model) -> Shape:
        self.read.append(model.name)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            return await self.answers[model.name]() if model.name in self.answers else SHAPE
        finally:
            self.at_once -= 1

    def consider(self, *models: Model) -> frozenset[str]:
        return self.estimator.consider(Catalog({model.name: model for model in models}))

    async def until(self, posted: int) -> None:
        await until(lambda: len(self.posted) >= posted, "the estimator has got there")


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    """One that is cleared at the end."""
    made = Desk()
    yield made
    await made.estimator.close()


async def forever() -> Shape:
    """A disk that hangs."""
    await asyncio.Event().wait()
    raise AssertionError


async def test_models_whose_need_isnt_known_are_read_once(desk: Desk) -> None:
    """Not those that declare it, nor those whose engine has no files; and not again for other settings."""
    others = (
        dataclasses.replace(A, name="declared", vram_mib=1),
        dataclasses.replace(A, name="share", vram_share=0.5),
        Model("command", command=("x",)),
        Model("outside", engine="external", urls=("http://h",)),
    )
    assert desk.consider(A, B, *others) == {"a", "b"}
    await desk.until(2)
    assert sorted(desk.read) == ["a", "b"]
    assert all(message.estimate.mib[1] > 1024 for message in desk.posted)
    assert desk.consider(dataclasses.replace(A, idle_timeout=5.0), B) == frozenset()
    assert desk.consider(dataclasses.replace(A, max_model_len=10), B) == {"a"}
    await desk.until(3)
    assert desk.posted[-1].model.max_model_len == 10
    assert sorted(desk.read) == ["a", "a", "b"]


async def test_what_is_gone_or_changed_is_read_no_further(desk: Desk) -> None:
    """A reading of old settings ends, whatever it waits for."""
    desk.answers["a"] = desk.answers["b"] = forever
    desk.consider(A, B)
    await until(lambda: desk.at_once == 2, "the estimator has got there")
    del desk.answers["a"]
    assert desk.consider(dataclasses.replace(A, dtype="float16")) == {"a", "b"}
    await desk.until(1)
    await until(lambda: desk.at_once == 0, "the estimator has got there")
    assert [message.model.dtype for message in desk.posted] == ["float16"]


async def test_a_start_waits_only_so_long(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is told that there is none yet, while the reading goes on."""
    monkeypatch.setattr(module, "PATIENCE", 0.02)
    go = asyncio.Event()

    async def slow() -> Shape:
        await go.wait()
        return SHAPE

    desk.answers["a"] = slow
    desk.consider(A)
    await desk.until(1)
    assert desk.posted[0].estimate == Estimate(why="its files are still being read")
    go.set()
    await desk.until(2)
    assert desk.posted[1].estimate.mib


async def test_a_hub_that_is_away_is_asked_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told at once; what isn't understood is not read a second time."""
    monkeypatch.setattr(module, "AGAIN", (0.01, 0.02))
    failures: list[UnknownError] = [LaterError("nobody answers"), LaterError("nobody answers")]

    async def away() -> Shape:
        if failures:
            raise failures.pop()
        return SHAPE

    async def strange() -> Shape:
        raise UnknownError("it is strange")

    desk.answers |= {"a": away, "b": strange}
    desk.consider(A, B)
    await until(lambda: any(message.estimate.mib for message in desk.posted), "the estimator has got there")
    told = {message.model.name: message.estimate.why for message in desk.posted if not message.estimate.mib}
    assert told == {"a": "nobody answers; set vram", "b": "it is strange; set vram"}
    assert (desk.read.count("a"), desk.read.count("b")) == (3, 1)


async def test_a_fault_over_somebodys_files_ends_nothing(desk: Desk) -> None:
    """Whatever is in them; the others are estimated."""

    async def fault() -> Shape:
        raise ZeroDivisionError

    desk.answers["a"] = fault
    desk.consider(A, B)
    await desk.until(2)
    told = {message.model.name: message.estimate for message in desk.posted}
    assert told["a"] == Estimate(why="its files aren't understood; set vram")
    assert told["b"].mib


async def test_not_all_are_read_at_once(desk: Desk) -> None:
    """A hundred models don't ask the hub a hundred things together."""

    async def turn() -> Shape:
        await asyncio.sleep(0)
        return SHAPE

    models = [dataclasses.replace(A, name=f"m{n}") for n in range(30)]
    desk.answers = {model.name: turn for model in models}
    desk.consider(*models)
    await desk.until(30)
    assert desk.most == module.AT_ONCE


async def test_the_fleet_keeps_what_counts(desk: Desk) -> None:
    """Estimates of old settings are dropped at once and never come back; until then a start waits."""
    fleet: Any = SimpleNamespace(catalog=Catalog({"a": A, "b": B}), estimates={}, estimating=set())
    keep_up(fleet, desk.estimator)
    assert fleet.estimating == {"a", "b"}
    await desk.until(2)
    old = list(desk.posted)
    for message in old:
        take_estimate(fleet, message)
    assert (fleet.estimating, set(fleet.estimates)) == (set(), {"a", "b"})
    keep_up(fleet, desk.estimator)
    assert len(desk.read) == 2
    fleet.catalog = Catalog({"a": dataclasses.replace(A, max_num_seqs=3)})
    keep_up(fleet, desk.estimator)
    assert (fleet.estimating, fleet.estimates) == ({"a"}, {})
    for message in old:
        take_estimate(fleet, message)
    assert (fleet.estimating, fleet.estimates) == ({"a"}, {})
    await desk.until(3)
    take_estimate(fleet, desk.posted[-1])
    assert (fleet.estimating, set(fleet.estimates)) == (set(), {"a"})
