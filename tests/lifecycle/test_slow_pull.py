"""A start that is preceded by something slow: the keeper and admission see the same deadline."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from tests.lifecycle.test_keeper import FakeProbe, FakeRuntime
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle import keeper, reconciler
from tidegate_lifecycle.catalog import Catalog, Model
from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.fleet import Fleet
from tidegate_lifecycle.keeper import Tools
from tidegate_lifecycle.link import Link
from tidegate_lifecycle.messages import Order
from tidegate_lifecycle.probes import Probe
from tidegate_lifecycle.reconciler import Reconciler
from tidegate_lifecycle.runtimes.base import Runtime
from tidegate_lifecycle.store import Store
from tidegate_lifecycle.supply import model_supply
from tidegate_lifecycle.world import Policy

TIMEOUT = 60.0


async def until(condition: Callable[[], bool]) -> None:
    """Lets the others run until it holds."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is looked at announces nothing
            await asyncio.sleep(0.001)


async def test_a_pull_of_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the image is pulled admission is always told time enough, though no more than a start may take;
    from the launch on both count down to the same end."""
    now = 1000.0
    for module in (keeper, reconciler):
        monkeypatch.setattr(module, "monotonic", lambda: now)
    monkeypatch.setattr(reconciler, "TICK", 0.001)
    model = Model("m", vram_mib=100, start_timeout=TIMEOUT)
    card = Device("gpu0", "default", 24000, 22000, 0, "", "", 0)
    link, store = Link(1, None), Store(tmp_path)
    core = Reconciler(Fleet(Catalog({"m": model}), Policy(), tmp_path, 1, link, store, [card], {}))
    runtime, fleet = FakeRuntime(), core.fleet
    tools = Tools(cast(Runtime, runtime), cast(Probe, FakeProbe(ok=False)), core.post)
    work = asyncio.create_task(core.run(tools, []))

    def left() -> float:
        return model_supply(fleet.told.views["m"], now).start_deadline_ms / 1000

    try:
        core.post(Order("load", "m", asyncio.get_running_loop().create_future()))
        await until(lambda: "m" in fleet.told.views and left() == TIMEOUT)
        for _ in range(360):
            now += 10.0
            await until(lambda: TIMEOUT / 2 <= left() <= TIMEOUT)
        assert fleet.told.views["m"].state == pb.MODEL_STATE_LOADING
        assert not fleet.circuits.known
        runtime.pulled.set()
        await until(lambda: fleet.told.views["m"].instances[0].address != "")
        assert left() == TIMEOUT
        now += TIMEOUT - 1.0
        await until(lambda: left() == 1.0)
        assert not fleet.circuits.known
        now += 1.0
        await until(lambda: "m" in fleet.circuits.known)
        assert fleet.told.views["m"].reason == pb.REASON_START_FAILED
    finally:
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        await fleet.let_go()
        await store.close()
