"""A hundred thousand waiting tickets: what one costs in memory, and what they do to the time of a grant.

Twice: in ten full queues, as edges fill them; and all in one, as an edge restates what it waited for. Queues
of that length come only from a Hello; here supply allows it too, so that new tickets may follow.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.admission import Session, admission, fill
from bench.client import quantile
from bench.machine import cpu, rss
from bench.table import Table, ms
from tidegate.admission.v1 import admission_pb2 as pb

FEW, MANY = 100, 100_000
MODELS = [f"m{i}" for i in range(10)]
TENANTS = [f"tenant-{i}" for i in range(10)]
BATCH = 64
"""Slots of each model, and grants in a message of the second pace."""
MEMORY = 1024
"""Bytes of a waiting ticket."""
SLOWER = 2.0
"""Time of a grant with many waiting, of that with few."""


@dataclass
class Pace:
    """Grants one after another on one model."""

    latencies: list[float]
    """Seconds from a done to the grant that follows, one in a message."""
    used: float
    """Seconds of admission's processor by grant, one in a message."""
    used_in_batches: float
    """The same with `BATCH` in a message."""


def run(seconds: float) -> None:
    """Prints the table; each pace takes `seconds`."""
    table = Table(f"{MANY:,} waiting tickets", "queues", "what", "measured", f"with {FEW}", f"with {MANY:,}")
    for words, measure in ((f"{len(MODELS)}", _in_ten), ("1, restated", _in_one)):
        with tempfile.TemporaryDirectory() as folder:
            grown, few, many = asyncio.run(measure(Path(folder), seconds))
        table.row(
            words, "memory of a ticket", f"{grown:.0f} bytes", target=f"< {MEMORY} bytes", met=grown < MEMORY
        )
        times = {
            "round trip, p50": (quantile(few.latencies, 0.5), quantile(many.latencies, 0.5)),
            "round trip, p99": (quantile(few.latencies, 0.99), quantile(many.latencies, 0.99)),
            "processor, batch 1": (few.used, many.used),
            f"processor, batch {BATCH}": (few.used_in_batches, many.used_in_batches),
        }
        for name, (first, second) in times.items():
            ratio = second / first
            judged = "p99" not in name
            table.row(
                words,
                f"{name}, of a grant",
                f"ratio {ratio:.2f}",
                ms(first),
                ms(second),
                target=f"≤ {SLOWER}" if judged else "",
                met=ratio <= SLOWER if judged else None,
            )


async def _in_ten(folder: Path, seconds: float) -> tuple[float, Pace, Pace]:
    """Ten queues of 10,000, filled ticket by ticket."""
    async with admission(folder, dict.fromkeys(MODELS, (BATCH, MANY // len(MODELS)))) as (stub, pid):
        session = Session(stub, "edge")
        await session.open()
        held = await _fill(session, MODELS[0], FEW + BATCH)
        few, held = await _pace(session, pid, held, seconds)
        before = rss(pid)
        for model in MODELS:
            rest = MANY // len(MODELS)
            await _fill(session, model, rest - FEW if model == MODELS[0] else rest + BATCH)
        await session.acknowledged()
        session.granted.clear()
        grown = (rss(pid) - before) / (MANY - FEW)
        many, _ = await _pace(session, pid, held, seconds)
        session.close()
        return grown, few, many


async def _in_one(folder: Path, seconds: float) -> tuple[float, Pace, Pace]:
    """One queue of 100,000, restated."""
    async with admission(folder, {MODELS[0]: (BATCH, 2 * MANY)}) as (stub, pid):
        grown, paces = 0.0, []
        for count in (FEW, MANY):
            before = rss(pid)
            session = Session(stub, f"edge-{count}")
            await session.open(_tickets(count + BATCH))
            held = await session.grants(BATCH)
            await session.acknowledged()
            grown = (rss(pid) - before) / count
            pace, _ = await _pace(session, pid, held, seconds)
            paces.append(pace)
            await session.leave()
        return grown, paces[0], paces[1]


def _tickets(count: int) -> list[pb.WaitingTicket]:
    tickets = []
    for n in range(1, count + 1):
        ticket = pb.WaitingTicket(age_ms=count - n)
        fill(ticket.acquire, n, MODELS[0], TENANTS[n % len(TENANTS)])
        tickets.append(ticket)
    return tickets


async def _fill(session: Session, model: str, count: int) -> list[int]:
    """So many tickets, a message of `BATCH` at a time; those that were granted at once."""
    for i in range(count):
        session.acquire(model, TENANTS[i % len(TENANTS)])
        if i % BATCH == BATCH - 1:
            await session.send()
    await session.send()
    await session.acknowledged()
    taken, session.granted = session.granted, []
    return taken


async def _pace(session: Session, pid: int, held: list[int], seconds: float) -> tuple[Pace, list[int]]:
    """Ends leases and takes a new ticket for each, so that as many wait as before; gives the leases it has
    then."""
    _, one = await _rounds(session, held[:1], seconds / 5)  # what is new to admission isn't looked at
    used = cpu(pid)
    latencies, one = await _rounds(session, one, seconds)
    single = (cpu(pid) - used) / len(latencies)
    used, held = cpu(pid), [*one, *held[1:]]
    batches, held = await _rounds(session, held, seconds)
    return Pace(latencies, single, (cpu(pid) - used) / len(batches) / len(held)), held


async def _rounds(session: Session, held: list[int], seconds: float) -> tuple[list[float], list[int]]:
    """Rounds of done and grant with all of `held` in one message; the time of each."""
    latencies: list[float] = []
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        for n in held:
            session.done(n)
            session.acquire(MODELS[0], TENANTS[n % len(TENANTS)])
        await session.send()
        held = await session.grants(len(held))
        latencies.append(time.monotonic() - began)
    return latencies, held
