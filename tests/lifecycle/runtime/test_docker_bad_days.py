"""Days on which the Docker daemon hangs, answers nonsense or is away: the loop goes on, and so do servers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import containers
from tests.support.docker_proxy import Proxy, environ_through
from tidegate_chassis.config import ConfigError
from tidegate_lifecycle.runtimes.base import StartFailed
from tidegate_lifecycle.runtimes.docker.daemon import THREADS, WAITING, Daemon, NoAnswer, Patience
from tidegate_lifecycle.runtimes.docker.runtime import DockerRuntime

from .conftest import eventually, in_time
from .kinds import SDK_SOCKETS, DockerKind

pytestmark = [pytest.mark.docker, SDK_SOCKETS]

SLEEP = "import time; print('up'); time.sleep(600)"
SHORT = Patience(look=1.0, end=1.0, start=1.5, pull=2.0)


@pytest.fixture
def proxy(tmp_path: Path) -> Generator[Proxy]:
    """The daemon, behind a socket of ours."""
    made = Proxy(tmp_path)
    yield made
    made.close()
    for thread in threading.enumerate():
        if thread.name.startswith("tidegate-docker"):
            thread.join(5)
    gc.collect()  # while its warnings are let pass


@pytest.fixture
def kind(tmp_path: Path) -> Generator[DockerKind]:
    """A data directory and a network's name; nothing of it is left."""
    made = DockerKind(tmp_path)
    yield made
    made.clean()


@pytest.fixture
async def runtime(kind: DockerKind, proxy: Proxy) -> AsyncGenerator[DockerRuntime]:
    """An open runtime behind the proxy; in the end all is mended, and what it started is ended."""
    made = made_through(kind, proxy)
    await made.open()
    await made.list()
    await eventually(lambda: made._hearing)
    yield made
    proxy.lift()
    await asyncio.gather(*(made.stop(server, 0) for server in await made.list()))
    await made.close()


def made_through(kind: DockerKind, proxy: Proxy, patience: Patience | None = None) -> DockerRuntime:
    return DockerRuntime(kind.data_dir, kind.options, environ_through(proxy), patience)


@contextlib.contextmanager
def impatient(runtime: DockerRuntime) -> Iterator[None]:
    """Deadlines are short for a block."""
    before, runtime._daemon.patience = runtime._daemon.patience, SHORT
    yield
    runtime._daemon.patience = before


@contextlib.asynccontextmanager
async def no_gap(most: float = 0.7) -> AsyncIterator[None]:
    """Fails when the loop stood still for longer meanwhile."""
    worst = 0.0

    async def tick() -> None:
        nonlocal worst
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            worst = max(worst, time.monotonic() - before - 0.01)

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()
    assert worst < most, f"the loop stood still for {worst:.3f} s"


@pytest.mark.parametrize("day", ["no socket", "not allowed", "hung", "500"])
async def test_an_unusable_daemon_is_a_configuration_error(kind: DockerKind, proxy: Proxy, day: str) -> None:
    """The error names the key, says what is wrong and what to do, within its deadline."""
    words = {
        "no socket": "its socket doesn't exist",
        "not allowed": "its socket may not be used by this user",
        "hung": "no answer",
        "500": "Docker error: the database is locked",
    }
    if day == "no socket":
        proxy.cut()
    elif day == "not allowed":
        proxy.path.chmod(0)
        if os.geteuid() == 0:
            words[day] = ""  # nothing is forbidden to root: it just opens
    elif day == "hung":
        proxy.hang()
    else:
        proxy.answer(".*", 500, {"message": "the database is locked"})
    runtime = made_through(kind, proxy, SHORT)
    async with no_gap():
        if words[day]:
            with pytest.raises(ConfigError) as told:
                await asyncio.wait_for(runtime.open(), 5)
            assert str(told.value).startswith("lifecycle.runtime: docker: ")
            assert words[day] in str(told.value)
            assert "DOCKER_HOST" in str(told.value)
        else:
            await runtime.open()
    await runtime.close()


async def test_a_hung_daemon_fails_starts_in_time_and_harms_nothing_that_runs(
    kind: DockerKind, proxy: Proxy, runtime: DockerRuntime
) -> None:
    """While it hangs: a start fails within its deadline, the loop goes on, running servers are as before;
    a stop waits. When it is back, the stop is carried out, the end of others is seen, and starts work."""
    first, second = await asyncio.gather(*(runtime.start(kind.spec(SLEEP)) for _ in range(2)))
    proxy.hang("(GET|POST|DELETE) /(?!.*events)")
    with impatient(runtime):
        async with no_gap():
            with pytest.raises(StartFailed, match="Docker gave no answer"):
                await asyncio.wait_for(runtime.start(kind.spec(SLEEP)), 5)
            stopping = asyncio.create_task(runtime.stop(first, 0))
            assert await asyncio.wait_for(runtime.tail(first.model, 10), 5) == []
            assert (await asyncio.wait_for(runtime.log_since(first.model, None), 5))[0] == []
            await runtime.mark_ready(second)
            await runtime.maintain()
        assert not stopping.done()
    waiting = asyncio.create_task(second.exited())
    await asyncio.to_thread(kind.kill, second)
    proxy.lift()
    await asyncio.wait_for(stopping, 20)
    assert await in_time(waiting, 10) == "signal 9"
    third = await runtime.start(kind.spec(SLEEP))
    assert await runtime.list() == [third]


@pytest.mark.parametrize("call", ["containers/create", "containers/[^/]+/start"])
async def test_an_answer_that_comes_too_late_leaves_no_orphan(
    kind: DockerKind, proxy: Proxy, runtime: DockerRuntime, call: str
) -> None:
    """The daemon did it, but its answer came after the deadline: the start failed, so the container goes."""
    rule = proxy.hang(f"POST /v[0-9.]+/{call}", after=True)
    wanted = kind.spec(SLEEP)
    with impatient(runtime), pytest.raises(StartFailed, match="Docker gave no answer"):
        await runtime.start(wanted)
    assert rule.seen
    proxy.lift()
    await eventually(lambda: not containers.bearing(owner=kind.owner))
    assert await runtime.list() == []
    assert await runtime.start(wanted) in await runtime.list()


async def test_a_create_that_the_daemon_does_later_leaves_no_orphan(
    kind: DockerKind, proxy: Proxy, runtime: DockerRuntime
) -> None:
    """The daemon hung and only later does what nobody waits for any more: it is removed when it appears."""
    proxy.hang("POST /v[0-9.]+/containers/create")
    wanted = kind.spec(SLEEP)
    with impatient(runtime), pytest.raises(StartFailed):
        await runtime.start(wanted)
    assert not containers.bearing(owner=kind.owner)
    with containers.engine() as client:
        labels = {containers.OWNER: kind.owner, containers.INSTANCE: wanted.instance_id}
        client.create_container(containers.PYTHON, ["true"], labels=labels)
    await eventually(lambda: not containers.bearing(owner=kind.owner))


async def test_calls_that_wait_for_a_hung_daemon_are_bounded(proxy: Proxy) -> None:
    """So many wait, in so many threads; the next one fails at once."""
    proxy.hang()
    daemon = Daemon(replace(SHORT, look=2.0), environ_through(proxy))

    async def call() -> str:
        try:
            await daemon.call(daemon.patience.look, lambda client: client.version())
        except NoAnswer as error:
            return str(error)
        return "answered"

    async with no_gap():
        waiting = [asyncio.create_task(call()) for _ in range(THREADS + WAITING)]
        await asyncio.sleep(0)
        assert await asyncio.wait_for(call(), 0.5) == "too many calls wait for Docker"
        assert len(daemon._threads) <= THREADS
        assert "answered" not in await asyncio.gather(*waiting)
    proxy.lift()
    await eventually(lambda: not daemon._calls)
    assert await call() == "answered"
    await asyncio.to_thread(daemon.close)


async def test_a_daemon_that_answers_500_is_quoted_without_paths(
    kind: DockerKind, proxy: Proxy, runtime: DockerRuntime
) -> None:
    """A start fails with its words; a stop goes on until it works."""
    server = await runtime.start(kind.spec(SLEEP))
    proxy.answer("POST /v[0-9.]+/containers/create", 500, {"message": "layer /var/lib/secret/x is damaged"})
    with pytest.raises(StartFailed, match="Docker error: layer <path> is damaged") as told:
        await runtime.start(kind.spec(SLEEP))
    assert "secret" not in str(told.value)
    rule = proxy.answer("(DELETE|POST) /v[0-9.]+/containers/", 500, {"message": "not now"})
    stopping = asyncio.create_task(runtime.stop(server, 0))
    await eventually(lambda: len(rule.seen) > 2)
    assert not stopping.done()
    proxy.lift()
    await asyncio.wait_for(stopping, 20)
    assert not containers.bearing(owner=kind.owner)


async def test_a_stopped_daemon_is_found_again_and_nothing_is_missed(
    kind: DockerKind, proxy: Proxy, runtime: DockerRuntime
) -> None:
    """What happened while there was no daemon to hear is seen within two seconds of its return."""
    killed, removed, kept = await asyncio.gather(*(runtime.start(kind.spec(SLEEP)) for _ in range(3)))
    proxy.cut()
    await eventually(lambda: not runtime._hearing)
    await asyncio.to_thread(kind.kill, killed)
    (found,) = containers.bearing(instance=removed.instance_id)
    await asyncio.to_thread(containers.remove, found["Id"])
    async with no_gap():
        with pytest.raises(StartFailed, match="the Docker daemon can't be reached"):
            await runtime.start(kind.spec(SLEEP))
    proxy.mend()
    assert await in_time(killed.exited(), 5) == "signal 9"
    assert await in_time(removed.exited(), 5) == "removed by hand"
    assert [one for one in await runtime.list() if one is kept] == [kept]
    await eventually(lambda: runtime._hearing)
    await asyncio.to_thread(kind.kill, kept)
    assert await in_time(kept.exited(), 5) == "signal 9"


async def test_a_pull_that_fails_is_said_and_pulled_once(kind: DockerKind, proxy: Proxy) -> None:
    """Two starts wait for one pull; the registry's reason is told; a stalled pull ends too."""
    kind.options = replace(kind.options, pull="missing")
    runtime = made_through(kind, proxy)
    await runtime.open()
    said = [{"status": "Pulling"}, {"error": "manifest for x/y:1 not found: manifest unknown"}]
    rule = proxy.answer("POST /v[0-9.]+/images/create", 200, said)
    missing = [replace(kind.spec(SLEEP), image="x/y:1") for _ in range(2)]
    failures = await asyncio.gather(*(runtime.start(one) for one in missing), return_exceptions=True)
    assert len(rule.seen) == 1
    for failure in failures:
        assert isinstance(failure, StartFailed)
        assert "the image x/y:1 can't be pulled: " in str(failure)
        assert "manifest unknown" in str(failure)
    proxy.lift()
    proxy.hang("POST /v[0-9.]+/images/create")
    begun = time.monotonic()
    with impatient(runtime), pytest.raises(StartFailed, match=r"can't be pulled: Docker gave no answer"):
        await runtime.start(missing[0])
    assert time.monotonic() - begun < 20
    await runtime.close()


async def test_a_close_does_not_wait_for_a_hung_daemon(
    kind: DockerKind, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop that can't be carried out is given up after a while; the next process sees to it."""
    monkeypatch.setattr("tidegate_lifecycle.runtimes.docker.runtime.CLOSING", 0.5)
    runtime = made_through(kind, proxy)
    await runtime.open()
    server = await runtime.start(kind.spec(SLEEP))
    proxy.hang("(POST|DELETE) /")
    runtime._daemon.patience = SHORT
    stopping = asyncio.create_task(runtime.stop(server, 0))
    await asyncio.wait({stopping}, timeout=0.1)
    await asyncio.wait_for(runtime.close(), 10)
    stopping.cancel()
    await asyncio.wait({stopping})
    proxy.lift()
    after = kind.make()
    await after.open()
    for found in await after.list():  # none, where Docker has meanwhile done what it was asked to
        assert found.instance_id == server.instance_id
        await after.stop(found, 0)
    assert not containers.bearing(owner=kind.owner)
    await after.close()
