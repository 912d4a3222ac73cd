"""Real processes for the process runtime: small programs, and specs that start them."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from tests.support.guard.blocking import allow_grpc
from tidegate_lifecycle.runtimes.base import StartSpec
from tidegate_lifecycle.runtimes.process import ProcessRuntime

_COUNT = itertools.count(1)


@pytest.fixture(autouse=True)
def blocking_is_an_error() -> Generator[BlockBuster]:
    """A call of the service that blocks the loop fails the test."""
    with blockbuster_ctx("tidegate_lifecycle") as guard:
        yield allow_grpc(guard)


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncGenerator[ProcessRuntime]:
    """A runtime on a data directory of its own; what it started is ended."""
    made = ProcessRuntime(tmp_path / "data")
    await made.open()
    yield made
    for server in await made.list():
        await made.stop(server, 0)
    await made.close()


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., StartSpec]:
    """Makes a spec that runs a Python program: its text, then its arguments."""

    def make(program: str, *arguments: str, model: str = "org/model:a", port: int = 0) -> StartSpec:
        return StartSpec(
            instance_id=f"node/{model}/{next(_COUNT)}-{os.getpid()}",
            model=model,
            signature="s1",
            argv=(sys.executable, "-u", "-c", program, *arguments),
            env={"MODEL_SETTING": "1"},
            cwd=tmp_path,
            host="127.0.0.1",
            port=port,
            device_ids=("gpu0",),
            reserved_mib=1024,
        )

    return make


async def eventually(condition: Callable[[], bool], within: float = 10.0) -> None:
    """Waits until something that nobody announces is so."""
    end = time.monotonic() + within
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < end, "it didn't come true in time"
        await asyncio.sleep(0.01)


async def in_time(wait: Awaitable[str], within: float) -> str:
    """An awaitable's result, which must come in time."""
    return await asyncio.wait_for(wait, within)


def stat_of(pid: int) -> tuple[str, int]:
    """State letter and start time of a process; ("X", 0) when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return fields[0], int(fields[19])


def runs(pid: int) -> bool:
    """A living process has that pid."""
    return stat_of(pid)[0] not in "XZ"


def records_in(data_dir: Path) -> list[str]:
    """Names of the record files."""
    return sorted(path.name for path in (data_dir / "instances").iterdir())
