"""Two hundred containers: how long a restarted service takes to know them all, and to look at them again.

Needs a Docker engine with `IMAGE` on it, and some 3 GB of memory; it says so and measures nothing where there
is none. The containers do nothing and are removed at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path

import docker
import structlog
from docker.errors import DockerException

from bench.table import Table, ms
from tidegate_chassis.config import ConfigError
from tidegate_lifecycle.runtimes.base import Server, StartFailed, StartSpec
from tidegate_lifecycle.runtimes.docker.container import DockerOptions, Limits
from tidegate_lifecycle.runtimes.docker.runtime import DockerRuntime

IMAGE = "python:3.11-slim-bookworm"
MANY = 200
AT_ONCE = 4
"""Starts and stops that are under way together."""
SEEN = 2.0
"""Seconds in which an end by others' hands is to be seen."""


def run(seconds: float) -> None:
    """Prints the table; `seconds` has no meaning here."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    table = Table(f"{MANY} containers", "what", "seconds", "processor", "longest gap of the loop")
    with tempfile.TemporaryDirectory() as folder:
        try:
            asyncio.run(_measure(Path(folder), table))
        except (ConfigError, StartFailed, DockerException) as error:
            table.row(f"not measured: {error}")


async def _measure(folder: Path, table: Table) -> None:
    options = DockerOptions(f"tidegate-bench-{uuid.uuid4().hex[:8]}", "never", Limits(64 << 20))
    first, second = (DockerRuntime(folder, options) for _ in range(2))
    await first.open()
    try:
        async with _row(table, f"start, {AT_ONCE} at a time"):
            await _each(partial(_start, first, folder, n) for n in range(MANY))
    finally:
        # As after a kill: the next process finds them by their labels.
        servers = await first.list()
    await second.open()
    try:
        async with _row(table, "first listing: all adopted"):
            adopted = await second.list()
        assert len(adopted) == len(servers) == MANY, len(adopted)
        async with _row(table, "a pass over all"):
            await second.list()
        began = time.monotonic()
        victim = adopted[0]
        await asyncio.to_thread(_kill, victim)
        await victim.exited()
        took = time.monotonic() - began
        table.row("one killed by hand: until seen", f"{took:.2f}", target=f"≤ {SEEN:g} s", met=took <= SEEN)
        async with _row(table, f"kill and remove, {AT_ONCE} at a time"):
            await _each(partial(second.stop, server, 0) for server in adopted)
    finally:
        await asyncio.gather(*(second.stop(server, 0) for server in await second.list()))
        await first.close()
        await second.close()


async def _start(runtime: DockerRuntime, folder: Path, n: int) -> None:
    host, port = await runtime.endpoint()
    argv = ("sleep", "3600")
    instance = f"bench.m{n}.{uuid.uuid4().hex[:8]}"
    await runtime.start(StartSpec(instance, f"m{n}", "s", argv, {}, folder, host, port, (), 0, image=IMAGE))


def _kill(server: Server) -> None:
    with contextlib.closing(docker.from_env().api) as client:
        found = client.containers(filters={"label": f"tidegate.instance={server.instance_id}"})
        client.kill(found[0]["Id"])


async def _each(works: Iterable[Callable[[], Awaitable[object]]]) -> None:
    """All of them, `AT_ONCE` at a time."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(work: Callable[[], Awaitable[object]]) -> None:
        async with turn:
            await work()

    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(one(work))


@contextlib.asynccontextmanager
async def _row(table: Table, what: str) -> AsyncIterator[None]:
    """A row for what happens in the block."""
    longest, over = 0.0, asyncio.Event()

    async def tick() -> None:
        nonlocal longest
        while not over.is_set():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before - 0.001)

    ticking = asyncio.ensure_future(tick())
    began, used = time.monotonic(), time.process_time()
    yield
    took, cpu = time.monotonic() - began, time.process_time() - used
    over.set()
    await ticking
    table.row(what, f"{took:.2f}", f"{cpu:.2f} s", ms(longest))
