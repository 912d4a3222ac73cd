"""What every runtime does alike: real processes, and real containers of the Docker engine."""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, Generator
from dataclasses import replace
from pathlib import Path

import pytest

from tidegate_lifecycle import logs
from tidegate_lifecycle.runtimes.base import Runtime, StartFailed

from .conftest import eventually, in_time
from .kinds import SDK_SOCKETS, DockerKind, ProcessKind

SLEEP = "import time; print('up'); time.sleep(600)"
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
inside = subprocess.Popen([sys.executable, "-c", code])
outside = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print("children are up", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["process", pytest.param("docker", marks=[pytest.mark.docker, SDK_SOCKETS])])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[ProcessKind]:
    """One kind of runtime; nothing of it is left."""
    made = {"process": ProcessKind, "docker": DockerKind}[request.param](tmp_path)
    yield made
    made.clean()


@pytest.fixture
async def runtime(kind: ProcessKind) -> AsyncGenerator[Runtime]:
    """An open runtime; what it started is ended."""
    made = kind.make()
    await made.open()
    yield made
    await asyncio.gather(*(made.stop(server, 0) for server in await made.list()))
    await made.close()


async def says(runtime: Runtime, model: str, text: str, within: float = 20.0) -> list[str]:
    """The model's log, once it holds that line."""
    end = time.monotonic() + within
    while True:
        lines = await runtime.tail(model, 100)
        if text in lines:
            return lines
        assert time.monotonic() < end, f"{text!r} was not said, but {lines}"
        await asyncio.sleep(0.02)


async def test_a_started_server_is_what_was_ordered(kind: ProcessKind) -> None:
    """A server has its model's variables and none of ours; its handle tells what the order said."""
    runtime = kind.make({"PATH": os.environ["PATH"], "SECRET_TOKEN": "x"})
    await runtime.open()
    wanted = kind.spec("import os, time; print(*os.environ); print('that\\'s all'); time.sleep(600)")
    server = await runtime.start(wanted)
    assert (server.instance_id, server.model, server.signature) == (wanted.instance_id, "org/model:a", "s1")
    assert (server.device_ids, server.reserved_mib, server.was_ready) == (("gpu0",), 1024, False)
    assert server.pid > 0
    assert server.address.startswith("http://")
    assert server.address.endswith(":8000")
    lines = await says(runtime, server.model, "that's all")
    assert "MODEL_SETTING" in lines[0]
    assert "SECRET_TOKEN" not in lines[0]
    await runtime.stop(server, 0)
    await runtime.close()


async def test_stop_ends_a_server_that_listens_to_sigterm_without_waiting_for_the_grace(
    kind: ProcessKind, runtime: Runtime
) -> None:
    """A server that ends when asked is gone long before its grace is over, its log stays."""
    server = await runtime.start(kind.spec(SLEEP))
    await says(runtime, server.model, "up")
    begun = time.monotonic()
    await runtime.stop(server, 60)
    assert time.monotonic() - begun < 10
    assert await server.exited() == "signal 15"
    assert await runtime.list() == []
    assert not kind.remains(server.instance_id)
    assert await runtime.tail(server.model, 10) == ["up"]


async def test_stop_kills_a_stubborn_server_with_all_its_children(
    kind: ProcessKind, runtime: Runtime
) -> None:
    """After the grace everything that the server started is killed, be it in its session or not."""
    server = await runtime.start(kind.spec(STUBBORN))
    await says(runtime, server.model, "children are up")
    begun = time.monotonic()
    await runtime.stop(server, 0.5)
    assert 0.4 < time.monotonic() - begun < 15
    assert not kind.remains(server.instance_id)
    assert await server.exited() == "signal 9"


async def test_all_processes_of_a_server_are_told(kind: ProcessKind, runtime: Runtime) -> None:
    """Itself and its children, in its session or not, by the host's numbers; of one that has gone, none."""
    server = await runtime.start(kind.spec(STUBBORN))
    await says(runtime, server.model, "children are up")
    pids = await runtime.processes(server)
    assert server.pid in pids
    assert len(pids) >= 3
    assert pids <= {int(name) for name in os.listdir("/proc") if name.isdigit()}
    await runtime.stop(server, 0)
    assert await runtime.processes(server) == frozenset()


async def test_two_stops_are_one_and_the_second_may_hasten(kind: ProcessKind, runtime: Runtime) -> None:
    """A second stop joins the first; one with a shorter grace hastens it; a later one finds nothing."""
    server = await runtime.start(kind.spec(STUBBORN))
    await says(runtime, server.model, "children are up")
    patient = asyncio.create_task(runtime.stop(server, 600))
    longer = asyncio.create_task(runtime.stop(server, 900))
    done, _ = await asyncio.wait({patient, longer}, timeout=0.3)
    assert not done
    await asyncio.wait_for(runtime.stop(server, 0), 15)
    await asyncio.wait_for(asyncio.gather(patient, longer), 1)
    await runtime.stop(server, 0)
    assert not kind.remains(server.instance_id)


async def test_a_cancelled_stop_is_carried_out_all_the_same(kind: ProcessKind, runtime: Runtime) -> None:
    """Whoever loses patience with a stop doesn't leave the server running."""
    server = await runtime.start(kind.spec(SLEEP))
    task = asyncio.create_task(runtime.stop(server, 5))
    await asyncio.sleep(0)
    task.cancel()
    assert await in_time(server.exited(), 10)
    await runtime.stop(server, 0)
    assert await runtime.list() == []
    assert not kind.remains(server.instance_id)


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.3])
async def test_a_cancelled_start_leaves_nothing_running(kind: ProcessKind, moment: float) -> None:
    """When the caller of start is cancelled, nobody has the handle: the runtime ends what it started."""
    runtime = kind.make()
    await runtime.open()
    wanted = kind.spec(SLEEP)
    task = asyncio.create_task(runtime.start(wanted))
    await asyncio.wait({task}, timeout=moment)
    if not task.done():
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        await runtime.stop(task.result(), 0)
    await runtime.close()
    assert not await asyncio.to_thread(kind.remains, wanted.instance_id)


async def test_the_end_of_a_server_is_seen_at_once_with_its_status(
    kind: ProcessKind, runtime: Runtime
) -> None:
    """Every waiter learns soon that a server has ended, and how; a cancelled waiter harms none."""
    server = await runtime.start(kind.spec("import sys; print('bye'); sys.exit(3)"))
    first, second = (asyncio.create_task(server.exited()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert await in_time(second, 5) == "exit status 3"
    assert await in_time(server.exited(), 1) == "exit status 3"
    assert await runtime.tail(server.model, 10) == ["bye"]
    assert await runtime.list() == []
    sleeper = await runtime.start(kind.spec(SLEEP))
    await asyncio.to_thread(kind.kill, sleeper)
    assert await in_time(sleeper.exited(), 2) == "signal 9"


@pytest.mark.parametrize("program", ["no-such-program-x", "/nowhere/secret/no-such-program-x"])
async def test_a_program_that_is_not_there_is_said_without_its_path(
    kind: ProcessKind, runtime: Runtime, program: str
) -> None:
    """The start fails, or the server ends at once with a log that tells; nothing stays."""
    wanted = replace(kind.spec(SLEEP), argv=(program,))
    try:
        server = await runtime.start(wanted)
    except StartFailed as error:
        words = str(error)
    else:
        assert await in_time(server.exited(), 5) == "exit status 127"
        words = logs.reason(await runtime.tail(server.model, 10))
        await runtime.stop(server, 0)
    assert re.match("the program (no-such-program-x )?was not found", words)
    assert "nowhere" not in words
    assert not kind.remains(wanted.instance_id)
    assert await runtime.list() == []


async def test_an_instance_is_started_once(kind: ProcessKind, runtime: Runtime) -> None:
    """A second start of the same instance is refused and harms nothing."""
    wanted = kind.spec(SLEEP)
    server = await runtime.start(wanted)
    with pytest.raises(StartFailed, match="exists already"):
        await runtime.start(wanted)
    assert [one.instance_id for one in await runtime.list()] == [server.instance_id]


async def test_a_log_can_be_followed_over_a_restart_of_its_model(kind: ProcessKind, runtime: Runtime) -> None:
    """Following begins at the end, gives whole lines once, and goes on with the next instance's log."""
    server = await runtime.start(kind.spec("print('old'); import time; time.sleep(600)"))
    await says(runtime, server.model, "old")
    lines, offset = await runtime.log_since(server.model, None)
    assert lines == []
    await runtime.stop(server, 0)
    assert (await runtime.log_since(server.model, offset))[0] == []
    await runtime.start(kind.spec("print('one'); print('two'); import time; time.sleep(600)"))
    await says(runtime, server.model, "two")
    lines, offset = await runtime.log_since(server.model, offset)
    assert lines == ["one", "two"]
    assert (await runtime.log_since(server.model, offset))[0] == []
    assert await runtime.tail("another model", 10) == []


async def test_the_next_process_adopts_what_runs(kind: ProcessKind, runtime: Runtime) -> None:
    """A runtime opened later on the same data lists what runs as it was, and sees its end at once."""
    before = kind.make()
    await before.open()
    started = await before.start(kind.spec(SLEEP, model="m"))
    other = await before.start(kind.spec(SLEEP, model="n"))
    await before.mark_ready(started)
    assert started.was_ready
    await says(before, "n", "up")
    await before.close()
    servers = {server.model: server for server in await runtime.list()}
    assert set(servers) == {"m", "n"}
    for old, new in ((started, servers["m"]), (other, servers["n"])):
        assert (new.instance_id, new.address, new.pid) == (old.instance_id, old.address, old.pid)
        assert (new.signature, new.device_ids, new.reserved_mib) == ("s1", ("gpu0",), 1024)
        assert 0 <= new.age < 60
    assert (servers["m"].was_ready, servers["n"].was_ready) == (True, False)
    assert await runtime.list() == list(servers.values())
    await asyncio.to_thread(kind.kill, servers["m"])
    assert await in_time(servers["m"].exited(), 2) in ("ended", "signal 9")
    await runtime.stop(servers["n"], 5)
    assert not kind.remains(other.instance_id)
    assert await runtime.tail("n", 5) == ["up"]


async def test_what_ended_unseen_is_swept(kind: ProcessKind, runtime: Runtime) -> None:
    """A server that ended while nobody watched is swept by list; its last lines stay."""
    before = kind.make()
    await before.open()
    server = await before.start(kind.spec(SLEEP))
    await says(before, server.model, "up")
    await before.mark_ready(server)
    await before.close()
    await asyncio.to_thread(kind.kill, server)
    end = time.monotonic() + 5
    while await runtime.list():  # a kill takes a moment
        assert time.monotonic() < end
    assert not kind.remains(server.instance_id)
    assert await runtime.tail(server.model, 5) == ["up"]


# Starts servers one after the other until it is killed.
BUSY = """
import asyncio, itertools, sys
from dataclasses import replace
from pathlib import Path
from tests.lifecycle.runtime.kinds import DockerKind, ProcessKind
async def main():
    kind = {"process": ProcessKind, "docker": DockerKind}[sys.argv[1]](Path(sys.argv[2]))
    kind.network = sys.argv[3]
    if sys.argv[1] == "docker":
        kind.options = replace(kind.options, network=sys.argv[3])
    runtime = kind.make()
    await runtime.open()
    for n in itertools.count():
        spec = replace(kind.spec(""), instance_id=f"{sys.argv[4]}/{n}", argv=("sleep", "600"))
        await asyncio.gather(*(runtime.start(replace(spec, instance_id=f"{sys.argv[4]}/{n}/{i}"))
                               for i in range(2)))
asyncio.run(main())
"""


def kill_while_starting(kind: ProcessKind, mark: str, moment: float) -> None:
    """Kills a process that starts servers with -9, some moment after its first start."""
    arguments = [kind.name, str(kind.folder), getattr(kind, "network", ""), mark]
    root = Path(__file__).resolve().parents[3]
    program = [sys.executable, "-c", textwrap.dedent(BUSY), *arguments]
    busy = subprocess.Popen(program, stdout=subprocess.PIPE, cwd=root)
    assert busy.stdout
    while b"server.started" not in busy.stdout.readline():
        assert busy.poll() is None
    time.sleep(moment)  # whenever that is: any instant must do
    busy.kill()
    busy.wait()
    busy.stdout.close()


@pytest.mark.parametrize("seed", range(3))
async def test_kill_9_at_any_instant_of_a_start_leaves_no_server_unfound(
    kind: ProcessKind, runtime: Runtime, seed: int
) -> None:
    """Whenever the starter is killed: the next process lists what it started, and nothing else runs."""
    mark = f"busy-{kind.data_dir.parent.name}-{seed}-{os.getpid()}"
    moment = random.Random(seed).uniform(0, 0.05 if kind.name == "process" else 1.0)
    await asyncio.to_thread(kill_while_starting, kind, mark, moment)
    servers = await runtime.list()  # first: what is between its fork and its exec isn't marked yet
    assert servers
    ids = {server.instance_id for server in servers}
    await eventually(lambda: set(kind.remains(mark)) == ids)  # a create that was under way ends as an orphan
    await asyncio.gather(*(runtime.stop(server, 0) for server in servers))
    assert not await asyncio.to_thread(kind.remains, mark)
