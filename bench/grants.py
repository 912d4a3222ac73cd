"""Grants per second of one admission process through real sessions.

Each session keeps a batch of tickets going round: acquire, grant, done; the done of one round is in the next
message with acquires. Admission runs as its own process; this process is the edges.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from bench.admission import Session, admission
from bench.machine import cpu
from bench.table import Table
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc

SLOTS = 100_000
RATE = 20_000
"""Grants a second on one core, at batches of 16 and more."""


def run(seconds: float) -> None:
    """Prints the table; each line takes `seconds`."""
    table = Table(
        "Grants through real sessions",
        "sessions",
        "batch",
        "grants/s",
        "grants per second of its processor time",
    )
    for sessions in (1, 4):
        for batch in (1, 16, 64, 256):
            rate, of_processor = asyncio.run(_measure(sessions, batch, seconds))
            table.row(
                sessions,
                batch,
                f"{rate:,.0f}",
                f"{of_processor:,.0f}",
                target=f"≥ {RATE:,}" if batch >= 16 else "",
                met=of_processor >= RATE if batch >= 16 else None,
            )


async def _measure(sessions: int, batch: int, seconds: float) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        async with admission(Path(folder), {"m": (SLOTS, SLOTS)}) as (stub, pid):
            await _go_round(stub, "warm-up", batch, time.monotonic() + 1.0)
            used, began = cpu(pid), time.monotonic()
            rounds = [_go_round(stub, f"s{i}", batch, began + seconds) for i in range(sessions)]
            granted = sum(await asyncio.gather(*rounds))
            return granted / (time.monotonic() - began), granted / (cpu(pid) - used)


async def _go_round(stub: pb_grpc.AdmissionServiceAsyncStub, name: str, batch: int, until: float) -> int:
    session = Session(stub, name)
    granted = 0
    held: list[int] = []
    try:
        await session.open()
        while time.monotonic() < until:
            for n in held:
                session.done(n)
            for _ in range(batch):
                session.acquire("m")
            await session.send()
            held = await session.grants(batch)
            granted += batch
    finally:
        session.close()
    return granted
