"""What is the process runtime's own, beside what all runtimes do (test_conformance.py)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tidegate_chassis.config import ConfigError
from tidegate_lifecycle.runtimes import logfiles
from tidegate_lifecycle.runtimes.base import StartFailed, StartSpec
from tidegate_lifecycle.runtimes.process import ProcessRuntime
from tidegate_lifecycle.runtimes.records import VARIABLE

from .conftest import eventually, in_time, records_in, runs

Spec = Callable[..., StartSpec]

SLEEP = "import time; print('up'); time.sleep(600)"
# Ignores SIGTERM, with a child that ignores it too and one that left the session.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
inside = subprocess.Popen([sys.executable, "-c", code])
outside = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.DEVNULL)
print("pids", inside.pid, outside.pid, flush=True)
time.sleep(600)
"""


def environments_with(mark: str) -> list[Path]:
    """The processes, by their folder in /proc, that have it in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [file.parent] if mark in file.read_text(errors="replace") else []
    return found


async def lines_of(runtime: ProcessRuntime, model: str, wanted: int) -> list[str]:
    for _ in range(1000):
        lines = await runtime.tail(model, 100)
        if len(lines) >= wanted:
            return lines
        await asyncio.sleep(0.01)
    raise AssertionError("the server said too little")


async def test_a_server_is_a_session_of_its_own_with_a_clean_environment(tmp_path: Path, spec: Spec) -> None:
    """A server leads its own session, and gets neither input nor variables but those that programs need."""
    environ = {"PATH": os.environ["PATH"], "SECRET_TOKEN": "x", "CUDA_HOME": "c"}
    runtime = ProcessRuntime(tmp_path / "data", environ)
    await runtime.open()
    program = """
import os, sys, time
print(os.getpid() == os.getsid(0), repr(sys.stdin.read()), os.getcwd())
print(*sorted(os.environ))
time.sleep(600)
"""
    server = await runtime.start(spec(program))
    first, second = (await lines_of(runtime, server.model, 2))[:2]
    assert first == f"True '' {tmp_path}"
    assert set(second.split()) - {"LC_CTYPE"} == {"PATH", "CUDA_HOME", "MODEL_SETTING", VARIABLE}
    assert server.address.startswith("http://127.0.0.1:")
    assert (server.device_ids, server.reserved_mib, server.was_ready) == (("gpu0",), 1024, False)
    await runtime.stop(server, 0)
    await runtime.close()


async def test_what_a_crashed_server_leaves_behind_is_ended(runtime: ProcessRuntime, spec: Spec) -> None:
    """Children of a server that died by itself are ended by stop."""
    server = await runtime.start(spec(STUBBORN))
    pids = [int(pid) for pid in (await lines_of(runtime, server.model, 1))[0].split()[1:]]
    os.kill(server.pid, signal.SIGKILL)
    assert await in_time(server.exited(), 1) == "signal 9"
    await runtime.stop(server, 0)
    assert not any(runs(pid) for pid in pids)


@pytest.mark.parametrize(
    ("argv", "cwd", "words"),
    [
        ((sys.executable,), Path("/nowhere/secret"), "the working directory was not found"),
        (("/etc/passwd",), None, "the program passwd may not be run"),
        (("python3", "a\0b"), None, "the program python3 can't be started: invalid command"),
    ],
)
async def test_a_start_that_cannot_begin_says_why_without_paths(
    runtime: ProcessRuntime, spec: Spec, argv: tuple[str, ...], cwd: Path | None, words: str
) -> None:
    """StartFailed has words for callers, and no record stays."""
    wanted = replace(spec(SLEEP), argv=argv)
    with pytest.raises(StartFailed) as failure:
        await runtime.start(replace(wanted, cwd=cwd) if cwd else wanted)
    assert str(failure.value) == words
    assert records_in(runtime._data_dir) == []


async def test_a_log_stays_bounded_while_its_server_writes_without_end(
    runtime: ProcessRuntime, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chatty server runs on while its log is cut; the last lines are there, in order."""
    monkeypatch.setattr(logfiles.bound, "__defaults__", (200_000, 50_000))
    program = """
import time
i = 0
while True:
    print(f"line {i:09d} " + "x" * 100)
    i += 1
    if i % 200 == 0: time.sleep(0.01)
"""
    server = await runtime.start(spec(program))
    path = Path(runtime._servers[server.instance_id].record.log)
    cuts = path.with_suffix(".old")
    await eventually(cuts.exists)
    mark = cuts.stat().st_mtime_ns
    await eventually(lambda: cuts.stat().st_mtime_ns > mark)
    assert cuts.stat().st_size <= 50_000
    assert await asyncio.to_thread(logfiles.size, path) < 8_000_000
    os.kill(server.pid, signal.SIGSTOP)
    numbers = [int(line.split()[1]) for line in (await runtime.tail(server.model, 50))[1:]]
    assert numbers == sorted(numbers)
    assert len(numbers) == 49
    assert runs(server.pid)


async def test_old_logs_are_dropped_but_the_newest_few(runtime: ProcessRuntime, spec: Spec) -> None:
    """Each model keeps the logs of its last instances, and those of running ones."""
    for _ in range(logfiles.KEPT_PER_MODEL + 2):
        server = await runtime.start(spec("pass"))
        await in_time(server.exited(), 10)
        await runtime.stop(server, 0)
    running = await runtime.start(spec(SLEEP))
    await runtime.maintain()
    kept = list((runtime._data_dir / "logs").glob("*/*.log"))
    assert len(kept) == logfiles.KEPT_PER_MODEL + 1
    assert Path(runtime._servers[running.instance_id].record.log) in kept


async def test_ports_are_free_and_not_promised_twice(runtime: ProcessRuntime, spec: Spec) -> None:
    """No port is given twice within its promise, nor one that a server has."""
    given = [await runtime.endpoint() for _ in range(200)]
    assert {host for host, _ in given} == {"127.0.0.1"}
    assert len({port for _, port in given}) == 200


async def test_a_data_directory_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    """The error names the key and what is wrong."""
    (tmp_path / "file").write_text("")
    runtime = ProcessRuntime(tmp_path / "file" / "data")
    with pytest.raises(ConfigError, match=r"lifecycle.data_dir: .*Not a directory"):
        await runtime.open()
    await runtime.close()
