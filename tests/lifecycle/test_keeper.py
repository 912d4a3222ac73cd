"""A keeper with a runtime in memory: what it tells, and that it always ends with the server gone."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from tidegate_lifecycle import keeper as module
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.engines import ENGINES
from tidegate_lifecycle.keeper import ExternalKeeper, Keeper, Tools
from tidegate_lifecycle.messages import BecameReady, Died, Gone, Launched, Sampled, StartEnded
from tidegate_lifecycle.probes import Health, Load, Probe
from tidegate_lifecycle.runtimes.base import Runtime, Server, StartSpec


class FakeServer:
    """A server that ends when told."""

    address, pid = "http://127.0.0.1:1", 1

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def exited(self) -> str:
        await self.ended.wait()
        return "signal 9"


class FakeRuntime:
    """Records what was stopped."""

    def __init__(self) -> None:
        self.stopped: list[float] = []
        self.lines = ["RuntimeError: no"]
        self.pulled, self.abandoned, self.server = asyncio.Event(), False, FakeServer()
        self.begun = asyncio.Event()

    async def mark_ready(self, server: Any) -> None:
        return

    async def tail(self, model: str, lines: int) -> list[str]:
        return self.lines

    async def stop(self, server: Any, grace: float) -> None:
        self.stopped.append(grace)

    async def endpoint(self) -> tuple[str, int]:
        return "127.0.0.1", 1

    async def start(self, spec: Any) -> Any:
        """As when an image is pulled first, until `pulled` is set."""
        self.begun.set()
        try:
            await self.pulled.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # it takes a moment to end what was begun
            self.abandoned = True
            raise
        return self.server


class FakeProbe:
    """Answers as told."""

    def __init__(self, ok: bool) -> None:
        self.ok, self.asked = ok, 0

    async def get(self, address: str, path: str, timeout: float) -> Health:
        self.asked += 1
        return Health(self.ok, "" if self.ok else "no answer")

    async def load(self, address: str, timeout: float) -> Load:
        return Load(2, 1)


class Life:
    """A keeper that adopts a server, and what it has told."""

    def __init__(self, ok: bool) -> None:
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.server, self.runtime, self.probe = FakeServer(), FakeRuntime(), FakeProbe(ok)
        tools = Tools(cast(Runtime, self.runtime), cast(Probe, self.probe), self.told.put_nowait)
        self.keeper = Keeper("i", Model("m"), ENGINES["command"], tools)

    def begin(self, ready: bool, deadline: float) -> asyncio.Task[None]:
        return asyncio.create_task(self.keeper.adopt(cast(Server, self.server), ready, deadline))

    async def next(self, kind: type[Any]) -> Any:
        """What is told next, samples of its load aside, unless they are asked for."""
        async with asyncio.timeout(5):
            while isinstance(message := await self.told.get(), Sampled) and kind is not Sampled:
                pass
        assert isinstance(message, kind), message
        return message


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Health checks follow each other at once."""
    monkeypatch.setattr(module, "HEALTH_EVERY", 0.001)


async def test_three_failed_checks_end_a_server() -> None:
    """A server that no longer answers is told as dead after three checks in a row, and is stopped."""
    life = Life(ok=False)
    task = life.begin(ready=True, deadline=0.0)
    assert "3 health checks failed" in (await life.next(Died)).text
    await life.next(Gone)
    await task
    assert life.probe.asked == 3
    assert life.runtime.stopped == [module.HUNG_GRACE], "one that hangs isn't waited for as long"


async def test_end_of_a_ready_server() -> None:
    """Its own end is seen at once and told in words."""
    life = Life(ok=True)
    task = life.begin(ready=True, deadline=0.0)
    life.server.ended.set()
    assert (await life.next(Died)).text.startswith("the server ended (signal 9: killed, by the kernel if")
    await life.next(Gone)
    await task


async def test_start_deadline() -> None:
    """A server that isn't ready by its deadline has failed, and is stopped."""
    life = Life(ok=False)
    task = life.begin(ready=False, deadline=0.0)
    message = await life.next(StartEnded)
    assert message.kind == "deadline"
    assert message.text == "the server wasn't ready by its start deadline: RuntimeError: no"
    await life.next(Gone)
    await task
    assert life.runtime.stopped


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (
            "AssertionError: Error in memory profiling. Initial free memory 21.5 GiB, current 21.9",
            "neighbour",
        ),
        ("ValueError: No available memory for the cache blocks. Try increasing", "memory"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "memory"),
        ("OSError: damaged file", "exited"),
    ],
)
async def test_a_failed_start_is_told_by_its_kind(line: str, kind: str) -> None:
    """What its last words say decides what follows: another try, more memory, or a back-off."""
    life = Life(ok=False)
    life.runtime.lines = ["INFO starts", line, "INFO ends"]
    life.server.ended.set()
    task = life.begin(ready=False, deadline=float("inf"))
    assert (await life.next(StartEnded)).kind == kind
    await life.next(Gone)
    await task


async def test_told_to_stop() -> None:
    """Told to stop it tells nothing but the end, with the shortest grace that it was given."""
    life = Life(ok=True)
    task = life.begin(ready=False, deadline=float("inf"))
    await life.next(BecameReady)
    life.keeper.stop(2.0)
    await life.next(Gone)
    await task
    assert life.runtime.stopped == [2.0]


async def test_told_to_stop_while_its_image_is_pulled() -> None:
    """A start that takes long is ended at once, and what it had begun is gone before that is told."""
    life = Life(ok=True)
    task = asyncio.create_task(life.keeper.start(lambda host, port, files: cast(StartSpec, None), 0.0))
    await life.runtime.begun.wait()
    life.keeper.stop()
    await life.next(Gone)
    await task
    assert life.runtime.abandoned
    assert not life.runtime.stopped


async def test_what_goes_before_a_server_is_no_part_of_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A download of an hour leaves a server its whole time; what is told as its launch agrees."""
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    life = Life(ok=False)
    task = asyncio.create_task(life.keeper.start(lambda host, port, files: cast(StartSpec, None), 60.0))
    await life.runtime.begun.wait()
    now += 3600.0
    life.runtime.pulled.set()
    assert (await life.next(Launched)).at == now
    async with asyncio.timeout(5):
        while life.probe.asked < 3:  # noqa: ASYNC110 - the probe announces nothing
            await asyncio.sleep(0)
    assert life.told.empty()
    now += 61.0
    assert (await life.next(StartEnded)).kind == "deadline"
    await life.next(Gone)
    await task


async def test_its_load_is_told_until_it_ends() -> None:
    """A server that serves is asked for its load; after its end nothing more is told."""
    life = Life(ok=True)
    task = life.begin(ready=True, deadline=0.0)
    assert (await life.next(Sampled)).load == Load(2, 1)
    life.keeper.sampler.ask()
    await life.next(Sampled)
    life.keeper.stop()
    await life.next(Gone)
    await task
    assert life.told.empty()


async def test_load_of_an_external_server() -> None:
    """One that runs elsewhere is asked too."""
    life = Life(ok=True)
    keeper = ExternalKeeper("i", Model("m"), ENGINES["external"], "http://x", life.keeper.tools)
    task = asyncio.create_task(keeper.run())
    await life.next(BecameReady)
    assert (await life.next(Sampled)).load == Load(2, 1)
    keeper.stop()
    await life.next(Gone)
    await task
    assert life.told.empty()
