"""What real model servers report of their load: told to admission and operators, and waited for in drains."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lifecycle.harness import SERVER, Admission, Service, alive, model
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb

Make = Callable[..., Service]


class Metrics:
    """The /metrics of a model server, as a file that it reads each time."""

    def __init__(self, path: Path) -> None:
        self.path, self.flags = path, ("--metrics", str(path))
        self.says(0, 0)

    def says(self, running: int, waiting: int) -> None:
        """Changes what it answers."""
        text = f'vllm:num_requests_running{{engine="0"}} {running}\nvllm:num_requests_waiting {waiting}\n'
        written = self.path.with_suffix(".new")
        written.write_text(text)
        written.rename(self.path)


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes a service that is stopped at the end of the test."""
    made: list[Service] = []

    def create(models: dict[str, Any], **lifecycle: Any) -> Service:
        made.append(Service(tmp_path, models, **lifecycle))
        return made[-1]

    yield create
    for service in made:
        await service.stop()


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    """The figures of a server."""
    return Metrics(tmp_path / "metrics")


async def unload(service: Service, name: str) -> None:
    """An operator's order."""
    async with service.stub() as stub:
        await stub.UnloadModel(pb.UnloadModelRequest(model=name), timeout=5)


def loads(admission: Admission, name: str) -> Callable[[], tuple[int, int] | None]:
    """What supply says that a model's server reports; None = nothing."""

    def read() -> tuple[int, int] | None:
        item = admission.instance(name)
        known = item is not None and item.HasField("running") and item.HasField("queued")
        return (item.running, item.queued) if item is not None and known else None

    return read


async def test_load_is_told_to_admission_and_operators(make: Make, metrics: Metrics) -> None:
    """Any engine's server that reports its load is sampled each second; a silent one stays unset, and what
    is no longer reported is forgotten."""
    service = make({"a": model("4GiB", *metrics.flags), "silent": model("4GiB")})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1, silent=1)
        await admission.ready("a")
        silent = await admission.ready("silent")
        read = loads(admission, "a")
        await admission.until(lambda: read() == (0, 0))
        metrics.says(7, 4)
        await admission.until(lambda: read() == (7, 4))
        shown = {item.model: item for item in (await service.status()).instances}
        assert (shown["a"].running, shown["a"].queued) == (7, 4)
        assert not shown["silent"].HasField("running")
        assert not silent.HasField("running")
        count = len(admission.reports)
        await service.elapse(1.5)
        assert len(admission.reports) == count, "the same sample again is no news"
        metrics.path.write_text("nothing of the kind\n")
        await admission.until(lambda: admission.instance("a") and read() is None)


async def test_load_of_an_external_server(make: Make, metrics: Metrics, unused_tcp_port: int) -> None:
    """A server that runs elsewhere is sampled too."""
    service = make({"x": {"engine": "external", "urls": [f"http://127.0.0.1:{unused_tcp_port}"]}})
    await service.start()
    command = [sys.executable, str(SERVER), "--port", str(unused_tcp_port), *metrics.flags]
    process = await asyncio.create_subprocess_exec(*command)
    try:
        async with Admission(service).connected() as admission:
            metrics.says(2, 5)
            await admission.until(lambda: loads(admission, "x")() == (2, 5))
    finally:
        process.kill()
        await process.wait()


async def test_a_drain_waits_for_the_servers_own_count(make: Make, metrics: Metrics) -> None:
    """Without a lease a server that says it runs something goes on, until it says that it doesn't."""
    service = make({"a": model("4GiB", *metrics.flags)})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        a = await admission.ready("a")
        metrics.says(1, 0)
        await admission.until(lambda: loads(admission, "a")() == (1, 0))
        pid = (await service.status()).instances[0].pid
        await unload(service, "a")
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
        await service.elapse(2.5)
        (shown,) = (await service.status()).instances
        assert (shown.state, shown.leases, shown.running) == (pb.INSTANCE_STATE_DRAINING, 0, 1)
        assert alive(pid)
        assert a.instance_id == shown.instance_id
        metrics.says(0, 0)
        await admission.gone("a", timeout=5)
    assert not alive(pid)


async def test_a_count_that_never_falls_is_bounded_by_the_drain(make: Make, metrics: Metrics) -> None:
    """A server that always says it runs something is cut at the drain's deadline."""
    service = make({"a": model("4GiB", *metrics.flags)}, drain_timeout="1500ms")
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        await admission.ready("a")
        metrics.says(1, 0)
        await admission.until(lambda: loads(admission, "a")() == (1, 0))
        await unload(service, "a")
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
        await service.elapse(1.0)
        assert (await service.status()).instances[0].state == pb.INSTANCE_STATE_DRAINING
        await admission.gone("a", timeout=5)


async def test_an_idle_server_is_asked_at_once(make: Make, metrics: Metrics) -> None:
    """A sample from before the last release is old news: the server is asked again, and no second is lost."""
    service = make({"a": model("4GiB", *metrics.flags)})
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        a = await admission.ready("a")
        admission.lease(a.instance_id, 1)
        metrics.says(1, 0)
        await admission.until(lambda: loads(admission, "a")() == (1, 0))
        await unload(service, "a")
        await admission.until(lambda: admission.instance("a", pb.INSTANCE_STATE_DRAINING))
        metrics.says(0, 0)
        clock = asyncio.get_running_loop().time
        began = clock()
        admission.lease(a.instance_id, 0)
        await admission.until(
            lambda: admission.instance("a", pb.INSTANCE_STATE_STOPPING) or not _there(admission)
        )
        assert clock() - began < 0.6
        await admission.gone("a")


def _there(admission: Admission) -> bool:
    return bool(admission.models["a"].instances)
