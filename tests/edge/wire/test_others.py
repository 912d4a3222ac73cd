"""What everybody else notices of an attack, in figures. Slow: each phase takes a quarter of a minute."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from tests.edge.wire.attacked import GROWTH, Attacked
from tests.edge.wire.attackers import IDLE
from tests.edge.wire.raw import Wire, post
from tests.support.figures import say

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow, pytest.mark.timeout(300)]

CLIENTS = 8
REQUESTS = 400
"""Of each client, in one phase."""
PACE = 0.03
"""Seconds between two requests of a client."""
ROOT = Path(__file__).parents[3]


async def latencies(port: int) -> list[float]:
    """Of chat requests at a steady pace, in seconds, sorted."""

    async def one() -> list[float]:
        wire = await Wire.to(port)
        took = []
        for _ in range(REQUESTS):
            begun = time.perf_counter()
            await wire.say(post())
            assert (await wire.answer()).status == 200
            took.append(time.perf_counter() - begun)
            await asyncio.sleep(PACE)
        await wire.closed()
        return took

    phases = await asyncio.gather(*(one() for _ in range(CLIENTS)))
    return sorted(took for phase in phases for took in phase)


async def test_others_hardly_notice_an_attack(edge: Attacked) -> None:
    """Five hundred dripping and six thousand idle clients: p99 of others + 20 % at most, memory + 50 MB."""
    await latencies(edge.port)
    quiet, before = [await latencies(edge.port)], edge.memory()
    attackers = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.edge.wire.attackers", str(edge.port)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert attackers.stdout is not None
    try:
        assert str(IDLE).encode() in await asyncio.wait_for(attackers.stdout.readline(), 60)
        attacked = await latencies(edge.port)
        grown = edge.memory() - before
    finally:
        attackers.kill()
        await attackers.wait()
    quiet.append(await latencies(edge.port))
    at = [[one[int(len(one) * share)] * 1000 for share in (0.5, 0.99)] for one in (*quiet, attacked)]
    say(
        *(f"{what}: p50 {p50:.2f} ms, p99 {p99:.2f} ms" for what, (p50, p99) in zip(
            ("before", "after", "under attack"), at, strict=True)),
        f"memory + {grown:.1f} MiB",
    )  # fmt: skip
    assert grown <= GROWTH
    assert at[2][1] <= 1.2 * max(at[0][1], at[1][1]) + 2
