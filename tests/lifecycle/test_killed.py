"""kill -9 of the service in each phase of a model server's life: what runs is what is tracked, afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from tests.lifecycle.harness import SERVER, Admission, Service, model
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb

Make = Callable[..., Service]


class Fleet:
    """Two models that don't fit beside each other, and what is known of their processes."""

    def __init__(self, make: Make, folder: Path, stop_time: float = 0.0) -> None:
        self.folder = folder
        flags = {name: ("--load", "0.5", "--starts", str(folder / f"starts-{name}")) for name in "ab"}
        self.service = make(
            {
                "a": model("20GiB", *flags["a"], "--stop-time", str(stop_time)),
                "b": model("20GiB", *flags["b"]),
            }
        )

    def starts(self, name: str) -> int:
        """How often a server of it was started, by the servers themselves."""
        path = self.folder / f"starts-{name}"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def running(self, name: str) -> set[int]:
        """Its processes, by the kernel."""
        mark, found = f"starts-{name}", set()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
                if entry.name.isdigit() and str(SERVER) in words and str(self.folder / mark) in words:
                    found.add(int(entry.name))
        return found

    async def tracked(self, name: str) -> set[int]:
        """Its processes, by the service."""
        return {item.pid for item in (await self.service.status()).instances if item.model == name}


@pytest.fixture
def fleet(make: Make, tmp_path: Path) -> Fleet:
    """The service and its models."""
    return Fleet(make, tmp_path)


@contextlib.asynccontextmanager
async def asked(address: str) -> AsyncIterator[list[int]]:
    """A client that asks a server all the time, as a request that is relayed does; its answers."""
    statuses: list[int] = []
    done = asyncio.Event()

    async def ask() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=10) as client:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    statuses.append((await client.get(f"{address}/health")).status_code)
                    await asyncio.wait_for(done.wait(), 0.02)

    task = asyncio.create_task(ask())
    yield statuses
    done.set()
    await task


async def closed(address: str) -> None:
    """Waits until nobody listens there any more."""
    async with asyncio.timeout(10), httpx.AsyncClient(trust_env=False) as client:
        with contextlib.suppress(httpx.TransportError):
            while True:
                await client.get(f"{address}/health")


async def check(fleet: Fleet, admission: Admission) -> None:
    """Both models can be had, one after the other; and no process runs that isn't tracked."""
    for name, other in (("b", "a"), ("a", "b")):
        admission.say(**{name: 1, other: 0})
        await admission.ready(name)
        await admission.gone(other)
        assert fleet.running(name) == await fleet.tracked(name)
        assert len(fleet.running(name)) == 1
        assert not fleet.running(other)
    assert "exceed a device's budget" not in fleet.service.log.read_text()
    assert "a fatal error" not in fleet.service.log.read_text()


async def test_killed_during_a_start(fleet: Fleet) -> None:
    """The server that loads is found and becomes ready: it isn't started a second time."""
    await fleet.service.start()
    async with Admission(fleet.service).connected() as admission:
        admission.say(a=1)
        await admission.until(
            lambda: (i := admission.instance("a", pb.INSTANCE_STATE_STARTING)) and i.address
        )
        await fleet.service.kill()
    await fleet.service.start()
    async with Admission(fleet.service, 8).connected() as admission:
        admission.say(a=1)
        await admission.ready("a")
        assert fleet.starts("a") == 1
        await check(fleet, admission)


async def test_killed_during_a_drain(fleet: Fleet) -> None:
    """What it serves goes on without a failure, the drain is planned again, and ends with the last lease."""
    await fleet.service.start()
    async with Admission(fleet.service).connected() as admission, fleet.service.stub() as stub:
        admission.say(a=1)
        a = await admission.ready("a")
        admission.lease(a.instance_id, 1)
        await stub.UnloadModel(pb.UnloadModelRequest(model="a"), timeout=5)
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
        async with asked(a.address) as statuses:
            await fleet.service.kill()
            await fleet.service.start()
            async with Admission(fleet.service, 8).connected() as after:
                after.lease(a.instance_id, 1)
                again = await after.until(lambda: after.instance("a"))
                assert again.instance_id == a.instance_id, "a drain doesn't survive the service"
        assert len(statuses) > 5
        assert set(statuses) == {200}
    async with Admission(fleet.service, 9).connected() as admission:
        await check(fleet, admission)
    assert (fleet.starts("a"), fleet.starts("b")) == (2, 1)


async def test_killed_during_an_eviction(fleet: Fleet) -> None:
    """The victim serves its lease to the end, is drained again for the same ticket, and makes room once."""
    await fleet.service.start()
    async with Admission(fleet.service).connected() as admission:
        admission.say(a=1)
        a = await admission.ready("a")
        admission.lease(a.instance_id, 1)
        admission.say(b=1)
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
        await fleet.service.kill()
    async with asked(a.address) as statuses:
        await fleet.service.start()
        async with Admission(fleet.service, 8).connected() as admission:
            admission.lease(a.instance_id, 1)
            admission.say(b=1)
            await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
            assert fleet.starts("b") == 0
    assert set(statuses) == {200}
    async with Admission(fleet.service, 9).connected() as admission:
        await check(fleet, admission)
    assert (fleet.starts("a"), fleet.starts("b")) == (2, 1)


@pytest.mark.parametrize("evicted", [False, True])
async def test_killed_during_a_stop(make: Make, tmp_path: Path, evicted: bool) -> None:
    """A server that was told to end does, and is not started again for nobody; its room is given on once."""
    fleet = Fleet(make, tmp_path, stop_time=3.0)
    await fleet.service.start()
    async with Admission(fleet.service).connected() as admission, fleet.service.stub() as stub:
        admission.say(a=1)
        a = await admission.ready("a")
        if evicted:
            admission.say(b=1)
        else:
            await stub.UnloadModel(pb.UnloadModelRequest(model="a"), timeout=5)
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_STOPPING))
        await closed(a.address)
        await fleet.service.kill()
    await fleet.service.start()
    async with Admission(fleet.service, 8).connected() as admission:
        if evicted:
            admission.say(b=1)
            await admission.ready("b")
        await admission.gone("a")
        assert not fleet.running("a")
        assert fleet.starts("a") == 1
        await check(fleet, admission)
