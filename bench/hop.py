"""The gateway against a direct call to the same model server: latency, requests, streams, cold start."""

from __future__ import annotations

import asyncio
import json
import re
import time

from bench.client import Result, closed_loop, first_byte, quantile, streams
from bench.machine import address, cpu, gateway, model
from bench.table import Table, ms
from tests.support.gateway import Gateway

BODY = json.dumps(
    {
        "model": "bench",
        "messages": [{"role": "user", "content": "x" * 200}],
        "max_tokens": 10,
        "stream": False,
    }
).encode()

ADDED = 0.001
"""Seconds that the hop may add at one connection, p50."""
COLD = 0.05
"""Seconds from a model server's readiness to the first byte relayed."""


def run(seconds: float) -> None:
    """Prints the table; each closed loop takes `seconds`."""
    cold = {f"cold{i}": model("--load-time", str(0.5 + i / 10)) for i in range(3)}
    with gateway({"bench": model(), **cold}) as one:
        table = Table("The hop", "what", "rate", "p50", "p99", "")
        for name in cold:
            _cold(table, one, name)
        server = address(one, "bench")
        for connections in (1, 32):
            _latency(table, one, server, connections, seconds)
        _streams(table, one, server, 200, 100)


def run_cost(seconds: float) -> None:
    """Prints what a request costs by load: verbs said in the same turn of the loop share a message."""
    with gateway({"bench": model()}) as one:
        address(one, "bench")
        table = Table(
            "Cost of a request by load",
            "connections",
            "requests/s",
            "admission, s per 10,000",
            "edge, s per 10,000",
            "admission, of 1 connection",
        )
        first = before = 0.0
        for connections in (1, 8, 32, 128):
            asyncio.run(closed_loop(one.url, BODY, connections, 1))
            used = {name: cpu(one.pid(name)) for name in ("admission", "edge")}
            result = asyncio.run(closed_loop(one.url, BODY, connections, seconds))
            cost = {
                name: (cpu(one.pid(name)) - at) / len(result.latencies) * 10_000 for name, at in used.items()
            }
            share = cost["admission"] / (first or cost["admission"])
            table.row(
                connections,
                f"{result.rate:.0f}",
                f"{cost['admission']:.2f}",
                f"{cost['edge']:.2f}",
                f"{share:.2f}",
                target="falls with load" if first else "",
                met=cost["admission"] < before if first else None,
            )
            first, before = first or cost["admission"], cost["admission"]


def _latency(table: Table, one: Gateway, server: str, connections: int, seconds: float) -> None:
    """Added latency and requests per second."""
    asyncio.run(closed_loop(one.url, BODY, connections, 1))
    before, began = {name: cpu(one.pid(name)) for name in ("edge", "admission")}, time.monotonic()
    through = asyncio.run(closed_loop(one.url, BODY, connections, seconds))
    used = {name: (cpu(one.pid(name)) - before[name]) / (time.monotonic() - began) for name in before}
    direct = asyncio.run(closed_loop(server, BODY, connections, seconds))
    words = f"{connections} connections" if connections > 1 else "1 connection"
    for name, run in (("direct", direct), ("tidegate", through)):
        table.row(f"{name}, {words}", f"{run.rate:.0f}/s", *_quantiles(run), f"{run.failures} failed")
    added = [quantile(through.latencies, q) - quantile(direct.latencies, q) for q in (0.5, 0.99)]
    table.row(
        f"added, {words}",
        f"ratio {through.rate / direct.rate:.2f}",
        ms(added[0]),
        ms(added[1]),
        f"edge {used['edge']:.2f}, admission {used['admission']:.2f} cores",
        target=f"p50 ≤ {ms(ADDED)}" if connections == 1 else "",
        met=added[0] <= ADDED if connections == 1 else None,
    )


def _streams(table: Table, one: Gateway, server: str, count: int, chunks: int) -> None:
    """Processor time per 10,000 chunks, and their delay."""
    body = BODY.replace(b'"stream": false', b'"stream": true').replace(
        b'"max_tokens": 10', b'"max_tokens": %d' % chunks
    )
    direct = asyncio.run(streams(server, body, count))
    before = cpu(one.pid("edge"))
    through = asyncio.run(streams(one.url, body, count))
    used = (cpu(one.pid("edge")) - before) / len(through.latencies) * 10_000
    for name, run in (("direct", direct), ("tidegate", through)):
        table.row(
            f"{name}, {count} streams of {chunks} chunks",
            f"{len(run.latencies)} chunks",
            *_quantiles(run),
            f"{used:.2f} s per 10,000" if run is through else "",
        )


def _cold(table: Table, one: Gateway, name: str) -> None:
    """From the model server's readiness to the first relayed byte."""
    body = BODY.replace(b'"bench"', json.dumps(name).encode())
    at, head = asyncio.run(first_byte(one.url, body))
    ready = re.search(rb"x-ready-at: ([0-9.]+)", head)
    assert ready is not None, head
    took = at - float(ready[1])
    table.row("ready to first byte", "", ms(took), target=f"≤ {ms(COLD)}", met=took <= COLD)


def _quantiles(run: Result) -> tuple[str, str]:
    return ms(quantile(run.latencies, 0.5)), ms(quantile(run.latencies, 0.99))
