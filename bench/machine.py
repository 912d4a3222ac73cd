"""A gateway whose processes are kept apart, and what they use of the machine."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.support.gateway import Gateway, wait_for

PATIENCE = 90.0
"""Seconds until a gateway must be ready: machines with better things to do are measured too."""


def model(*flags: str, **keys: Any) -> dict[str, Any]:
    """The bench's model server as a model of the configuration; `keys` are keys of the model."""
    command = [sys.executable, "-m", "bench.upstream", "--port", "{port}", *flags]
    return {
        "engine": "command",
        "command": command,
        "vram": "1GiB",
        "max_concurrent": 1000,
        "max_queue": 1000,
        "env": {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        **keys,
    }


@contextmanager
def gateway(models: dict[str, Any], **sections: Any) -> Iterator[Gateway]:
    """A running gateway. The edge has one core to itself where there are two; all else shares the other."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"models": models, "telemetry": {"log_level": "warning"}, **sections}
        one = Gateway(Path(folder), config)
        one.environ.pop("PYTHONPATH", None)
        cores = sorted(os.sched_getaffinity(0))
        try:
            one.start(ready=False)
            wait_for(one.is_ready, "/ready answers 200", PATIENCE)
            if len(cores) > 1:
                for name in ("admission", "lifecycle"):
                    pin(one.pid(name), set(cores[1:]))
                pin(one.pid("edge"), {cores[0]})
                os.sched_setaffinity(0, set(cores[1:]))
            yield one
        finally:
            os.sched_setaffinity(0, set(cores))
            one.close()


def address(one: Gateway, name: str) -> str:
    """Where the server of a model listens; it is started if need be."""
    one.chat(name).raise_for_status()
    servers = one.instances()
    found: str = next(server["address"] for server in servers if server["model"] == name)
    return found


def peak(server: str) -> int:
    """The most completions that a model server of the bench ever worked on at once."""
    return int(httpx.get(server, trust_env=False).headers["x-peak"])


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid: int) -> int:
    """Bytes of memory that a process has now."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def pin(pid: int, cores: set[int]) -> None:
    """Keeps a running process, with all its threads, on these cores."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)
