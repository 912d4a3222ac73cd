"""What servers say of their load: when they are asked, what is believed, and who is told."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from tidegate_lifecycle import sampling
from tidegate_lifecycle.catalog import Catalog, Model
from tidegate_lifecycle.fleet import Fleet
from tidegate_lifecycle.instance import SAMPLE_LASTS, STANDSTILL, Instance, InstanceState
from tidegate_lifecycle.link import Link, Stream
from tidegate_lifecycle.messages import Sampled
from tidegate_lifecycle.probes import Load, Probe
from tidegate_lifecycle.sampling import EVERY, NOTHING, RARELY, SOON, Sampler, next_pause
from tidegate_lifecycle.store import Store
from tidegate_lifecycle.world import Policy


class FakeProbe:
    """Answers with the next load of a list, and then with the last one again."""

    def __init__(self, *loads: Load) -> None:
        self.loads, self.asked, self.began = list(loads), 0, asyncio.Event()

    async def load(self, address: str, timeout: float) -> Load:
        self.asked += 1
        self.began.set()
        await asyncio.sleep(0)
        return self.loads.pop(0) if len(self.loads) > 1 else self.loads[0]


def test_pauses() -> None:
    """Each second; ever more rarely when nothing is told, but again each second once something is; soon, and
    then less so, while somebody waits for the end of what runs."""
    pauses = [EVERY]
    for _ in range(8):
        pauses.append(next_pause(NOTHING, pauses[-1]))
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, RARELY, RARELY, RARELY, RARELY]
    assert next_pause(Load(1, None), RARELY) == next_pause(Load(None, 0), RARELY) == EVERY
    soon = [SOON / 2]
    for _ in range(6):
        soon.append(next_pause(Load(1, 0), soon[-1]))
    assert soon[1:] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0]
    assert next_pause(Load(0, 0), SOON) == EVERY


def test_figures_that_stand_still_are_not_believed() -> None:
    """A server that says it works, while nobody has a lease on it and nothing moves, has stopped counting."""
    item = Instance("i", "m", (), 0, 0.0, state=InstanceState.READY)

    def told(at: float, running: int, figures: int, leases: int = 0) -> int | None:
        item.leases = leases
        item.sample(running, 0, at, figures)
        item.forget(at)
        return item.running

    assert told(100.0, 3, 1) == 3
    assert told(100.0 + STANDSTILL, 3, 1) == 3
    assert told(100.1 + STANDSTILL, 3, 1) is None
    assert told(120.0, 3, 1, leases=1) == 3, "somebody uses it: its engine may count at the end alone"
    assert told(121.0, 3, 2) == 3
    assert told(122.0, 0, 3) == 0
    assert told(900.0, 0, 3) == 0, "an idle engine moves nothing"


async def test_a_server_is_asked_at_once_when_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent server posts nothing; `ask` shortens the pause, and one that came during an asking counts."""
    monkeypatch.setattr(sampling, "EVERY", 3600.0)
    monkeypatch.setattr(sampling, "RARELY", 3600.0)
    posted: asyncio.Queue[Sampled] = asyncio.Queue()
    probe = FakeProbe(NOTHING, Load(1, 2), Load(0, 0))
    sampler = Sampler("i", cast(Probe, probe), posted.put_nowait)
    task = asyncio.create_task(sampler.run("http://x"))
    async with asyncio.timeout(5):
        await probe.began.wait()
        sampler.ask()
        first = await posted.get()
        assert (probe.asked, first.instance_id, first.load) == (2, "i", Load(1, 2))
        second = await posted.get()  # without being asked again: something ran
        assert second.load == Load(0, 0)
        assert second.at > first.at
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert posted.empty()


def test_a_sample_grows_old() -> None:
    """Five seconds after it was asked for it says nothing any more."""
    item = Instance("i", "m", (), 0, 0.0, state=InstanceState.READY)
    item.sample(1, 2, 100.0)
    item.forget(100.0 + SAMPLE_LASTS)
    assert (item.running, item.queued) == (1, 2)
    item.forget(100.1 + SAMPLE_LASTS)
    assert (item.running, item.queued) == (None, None)


def test_samples_are_news_without_haste(tmp_path: Path) -> None:
    """A sample that differs is told with the next report, the same one isn't; a state is told at once."""
    fleet = Fleet(Catalog({"m": Model("m")}), Policy(), tmp_path, 1, Link(1, None), Store(tmp_path), [], {})
    item = fleet.instances["i"] = Instance("i", "m", (), 0, 0.0, state=InstanceState.READY)
    stream = fleet.link.stream = Stream(sent=0)

    def published() -> tuple[bool, bool]:
        stream.changed.clear()
        stream.urgent.clear()
        fleet.told.publish(fleet, 1.0)
        return stream.changed.is_set(), stream.urgent.is_set()

    published()
    item.sample(3, 0, 1.0)
    assert published() == (True, False)
    item.sample(3, 0, 2.0)
    assert published() == (False, False)
    (told,) = fleet.told.views["m"].instances
    assert (told.running, told.queued) == (3, 0)
    item.to(InstanceState.STOPPING, 3.0)
    assert published() == (True, True)
