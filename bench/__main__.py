"""`make bench`: the gateway against a direct call to the same model server, in one run.

The edge has one core to itself where there are two; everything else shares the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import admission_session
from bench.client import Result, closed_loop, first_byte, quantile, streams
from tests.support.gateway import Gateway

BODY = json.dumps(
    {
        "model": "bench",
        "messages": [{"role": "user", "content": "x" * 200}],
        "max_tokens": 10,
        "stream": False,
    }
).encode()


def model(*flags: str) -> dict[str, object]:
    """The bench's model server as a model of the configuration."""
    command = [sys.executable, "-m", "bench.upstream", "--port", "{port}", *flags]
    return {
        "engine": "command",
        "command": command,
        "vram": "1GiB",
        "max_concurrent": 1000,
        "max_queue": 1000,
        "env": {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    }


@contextmanager
def gateway(models: dict[str, object]) -> Iterator[Gateway]:
    """A running gateway, the edge pinned to the first core."""
    with tempfile.TemporaryDirectory() as folder:
        one = Gateway(Path(folder), {"models": models, "telemetry": {"log_level": "warning"}})
        one.environ.pop("PYTHONPATH", None)
        one.start()
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            for name in ("admission", "lifecycle"):
                pin(one.pid(name), set(cores[1:]))
            pin(one.pid("edge"), {cores[0]})
            os.sched_setaffinity(0, set(cores[1:]))
        try:
            yield one
        finally:
            os.sched_setaffinity(0, set(cores))
            one.close()


def pin(pid: int, cores: set[int]) -> None:
    """Keeps all threads of a process on some cores."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def line(name: str, *values: object) -> None:
    """One row of the table."""
    print(f"| {name} | " + " | ".join(str(value) for value in values) + " |", flush=True)


def milliseconds(result: Result, share: float) -> str:
    """A quantile of a run's latencies."""
    return f"{quantile(result.latencies, share) * 1000:.2f} ms"


def measure_latency(one: Gateway, address: str, seconds: float) -> None:
    """Added latency and requests per second at 1 and 32 connections."""
    for connections in (1, 32):
        asyncio.run(closed_loop(one.url, BODY, connections, 1))
        before, began = {name: cpu(one.pid(name)) for name in ("edge", "admission")}, time.monotonic()
        through = asyncio.run(closed_loop(one.url, BODY, connections, seconds))
        used = {name: (cpu(one.pid(name)) - before[name]) / (time.monotonic() - began) for name in before}
        direct = asyncio.run(closed_loop(address, BODY, connections, seconds))
        for name, run in (("direct", direct), ("tidegate", through)):
            line(
                f"{name}, {connections} connections",
                f"{run.rate:.0f}/s",
                milliseconds(run, 0.5),
                milliseconds(run, 0.99),
                f"{run.failures} failed",
            )
        added = [
            quantile(through.latencies, share) * 1000 - quantile(direct.latencies, share) * 1000
            for share in (0.5, 0.99)
        ]
        line(
            f"added, {connections} connections",
            f"ratio {through.rate / direct.rate:.2f}",
            f"{added[0]:.2f} ms",
            f"{added[1]:.2f} ms",
            f"edge {used['edge']:.2f}, admission {used['admission']:.2f} cores",
        )


def measure_streams(one: Gateway, address: str, count: int, chunks: int) -> None:
    """Processor time per 10,000 chunks, and their delay."""
    body = BODY.replace(b'"stream": false', b'"stream": true').replace(
        b'"max_tokens": 10', b'"max_tokens": %d' % chunks
    )
    direct = asyncio.run(streams(address, body, count))
    before = cpu(one.pid("edge"))
    through = asyncio.run(streams(one.url, body, count))
    used = (cpu(one.pid("edge")) - before) / len(through.latencies) * 10_000
    for name, run in (("direct", direct), ("tidegate", through)):
        line(
            f"{name}, {count} streams of {chunks} chunks",
            f"{len(run.latencies)} chunks",
            milliseconds(run, 0.5),
            milliseconds(run, 0.99),
            f"{used:.2f} s per 10,000" if run is through else "",
        )


def measure_cold(one: Gateway, name: str) -> None:
    """From the model server's readiness to the first relayed byte."""
    body = BODY.replace(b'"bench"', json.dumps(name).encode())
    at, head = asyncio.run(first_byte(one.url, body))
    ready = re.search(rb"x-ready-at: ([0-9.]+)", head)
    assert ready is not None, head
    line("ready to first byte", f"{(at - float(ready[1])) * 1000:.1f} ms", "target 50 ms", "", "")


def main() -> None:
    """Runs everything and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each closed loop")
    seconds = parser.parse_args().seconds
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}\n")
    line("what", "rate", "p50", "p99", "")
    line("---", "---", "---", "---", "---")
    cold = {f"cold{i}": model("--load-time", str(0.5 + i / 10)) for i in range(3)}
    with gateway({"bench": model(), **cold}) as one:
        for name in cold:
            measure_cold(one, name)
        one.chat("bench").raise_for_status()
        servers = one.instances()
        address = next(server["address"] for server in servers if server["model"] == "bench")
        measure_latency(one, address, seconds)
        measure_streams(one, address, 200, 100)
    admission_session.run()


if __name__ == "__main__":
    main()
