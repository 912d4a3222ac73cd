"""The process runtime after a kill -9 of the process that started the servers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tidegate_lifecycle.runtimes.base import StartSpec
from tidegate_lifecycle.runtimes.process import ProcessRuntime
from tidegate_lifecycle.runtimes.records import VARIABLE, Record, Records

from .conftest import eventually, in_time, records_in, runs, stat_of

Spec = Callable[..., StartSpec]

CHATTY = "import time\nwhile True: print('still here', flush=True); time.sleep(0.02)"

# Another lifecycle process: starts one server and waits to be killed.
FIRST = """
import asyncio, sys
from pathlib import Path
from tidegate_lifecycle.runtimes.base import StartSpec
from tidegate_lifecycle.runtimes.process import ProcessRuntime
async def main():
    runtime = ProcessRuntime(Path(sys.argv[1]))
    await runtime.open()
    spec = StartSpec("n/m/1", "m", "sig", (sys.executable, "-c", sys.argv[2]), {}, Path(sys.argv[1]).parent,
                     "127.0.0.1", 9123, ("a", "b"), 512)
    server = await runtime.start(spec)
    await runtime.mark_ready(server)
    print(server.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def start_and_kill(data_dir: Path, program: str) -> int:
    """Starts a server in another process, kills that with -9, and gives the server's pid."""
    first = subprocess.Popen([sys.executable, "-c", FIRST, str(data_dir), program], stdout=subprocess.PIPE)
    assert first.stdout
    pid = int(next(line for line in first.stdout if line.strip().isdigit()))
    first.kill()
    first.wait()
    first.stdout.close()
    return pid


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Where both processes keep their records."""
    return tmp_path / "data"


def write_record(data_dir: Path, spec: StartSpec, log: Path, **changed: Any) -> None:
    """Writes an intent, or with a pid a whole record."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    record = Record(spec.instance_id, spec.model, "s", spec.host, spec.port, [], 0, str(log), boot)
    Records(data_dir / "instances").write(replace(record, **changed))


def run_aside(
    program: Sequence[str], log: Path, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a process that no runtime knows, as leader of a session."""
    with open(log, "ab") as output:
        return subprocess.Popen(program, stdout=output, start_new_session=True, env=env)


async def test_a_server_survives_kill_9_and_is_adopted(data_dir: Path, runtime: ProcessRuntime) -> None:
    """A server whose starter was killed writes on; the next process finds it, watches it and ends it."""
    pid = await asyncio.to_thread(start_and_kill, data_dir, CHATTY)
    (server,) = await runtime.list()
    assert (server.pid, server.instance_id, server.model, server.signature) == (pid, "n/m/1", "m", "sig")
    assert (server.address, server.device_ids) == ("http://127.0.0.1:9123", ("a", "b"))
    assert server.was_ready
    assert server.age < 60
    _, offset = await runtime.log_since("m", None)
    assert await runtime.list() == [server]
    for _ in range(500):
        lines, _ = await runtime.log_since("m", offset)
        if lines:
            break
        await asyncio.sleep(0.01)
    assert lines[0] == "still here"
    await runtime.stop(server, 5)
    assert not runs(pid)
    assert await runtime.list() == []


async def test_the_end_of_an_adopted_server_is_seen_within_a_second(
    data_dir: Path, runtime: ProcessRuntime
) -> None:
    """It is no child, so its status is unknown, but its end is seen at once."""
    pid = await asyncio.to_thread(start_and_kill, data_dir, CHATTY)
    (server,) = await runtime.list()
    waiting = asyncio.create_task(server.exited())
    os.kill(pid, signal.SIGKILL)
    assert await in_time(waiting, 1) == "ended"
    assert await runtime.list() == []
    assert records_in(data_dir) == []


async def test_children_of_a_server_that_died_meanwhile_are_swept(
    data_dir: Path, runtime: ProcessRuntime, tmp_path: Path
) -> None:
    """When nobody watched, list kills what a dead server left, and removes its record."""
    program = textwrap.dedent("""
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path("child").write_text(str(child.pid) + ".")
        time.sleep(600)
    """)
    pid = await asyncio.to_thread(start_and_kill, data_dir, program)
    note = tmp_path / "child"
    await eventually(lambda: note.exists() and note.read_text().endswith("."))
    child = int(note.read_text().rstrip("."))
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not runs(pid))
    assert runs(child)
    assert await runtime.list() == []
    assert not runs(child)
    assert records_in(data_dir) == []


@pytest.mark.parametrize("clue", ["environment", "log"])
async def test_an_intent_without_pid_finds_its_process(
    runtime: ProcessRuntime, spec: Spec, tmp_path: Path, clue: str
) -> None:
    """Killed between start and noting the pid: the process is found by its environment or by its log."""
    wanted, log = spec(CHATTY, port=9124), tmp_path / "x.log"
    await asyncio.to_thread(write_record, runtime._data_dir, wanted, log)
    if clue == "log":  # a program that writes its own title has overwritten its environment
        process = await asyncio.to_thread(run_aside, wanted.argv, log, {})
    else:
        marked = {VARIABLE: wanted.instance_id}
        process = await asyncio.to_thread(run_aside, wanted.argv, tmp_path / "other.log", marked)
    (server,) = await runtime.list()
    assert server.pid == process.pid
    (record,), damaged = await asyncio.to_thread(Records(runtime._data_dir / "instances").read)
    assert (record.pid, record.started, damaged) == (process.pid, stat_of(process.pid)[1], [])
    await runtime.stop(server, 0)
    assert process.wait() == -9


async def test_an_intent_that_was_never_carried_out_is_swept(
    runtime: ProcessRuntime, spec: Spec, tmp_path: Path
) -> None:
    """An intent without a process means that nothing was started."""
    await asyncio.to_thread(write_record, runtime._data_dir, spec(CHATTY), tmp_path / "x.log")
    assert await runtime.list() == []
    assert records_in(runtime._data_dir) == []


@pytest.mark.parametrize("difference", ["start time", "boot"])
async def test_a_stranger_with_the_same_pid_is_left_alone(
    runtime: ProcessRuntime, spec: Spec, tmp_path: Path, difference: str
) -> None:
    """A pid that was given away, or is of another boot, is neither adopted nor killed."""
    program = [sys.executable, "-c", CHATTY]
    stranger = await asyncio.to_thread(run_aside, program, tmp_path / "other.log")
    try:
        _, started = stat_of(stranger.pid)
        changed: dict[str, Any] = {"pid": stranger.pid, "started": started}
        changed |= {"boot": "another"} if difference == "boot" else {"started": started - 1}
        await asyncio.to_thread(write_record, runtime._data_dir, spec(CHATTY), tmp_path / "x.log", **changed)
        assert await runtime.list() == []
        assert stranger.poll() is None
        assert records_in(runtime._data_dir) == []
    finally:
        stranger.kill()
        stranger.wait()


async def test_a_damaged_record_is_kept_aside_and_harms_no_other(
    data_dir: Path, runtime: ProcessRuntime
) -> None:
    """A record that can't be read is said and put aside; the others are adopted."""
    await asyncio.to_thread(start_and_kill, data_dir, CHATTY)
    (data_dir / "instances" / "bad.json").write_text("{")
    (data_dir / "instances" / "other.json").write_text(json.dumps({"instance_id": "x", "later": 1}))
    assert len(await runtime.list()) == 1
    left = set(records_in(data_dir))
    assert {"bad.json.damaged", "other.json.damaged"} < left
    assert len(left) == 3


async def test_two_lists_at_once_adopt_a_server_once(data_dir: Path, runtime: ProcessRuntime) -> None:
    """Concurrent lists give the same handle."""
    await asyncio.to_thread(start_and_kill, data_dir, CHATTY)
    first, second = await asyncio.gather(runtime.list(), runtime.list())
    assert len(first) == 1
    assert first[0] is second[0]
