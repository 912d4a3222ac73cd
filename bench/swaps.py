"""Two models that can't share a card, both asked for all the time: how often they swap, how long it takes.

Once with turns, once with plain LRU (`max_swap_wait` and `min_residency` 0: whoever is asked for evicts the
other at once), beside the optimum: all requests of the one, then all of the other, with one load each.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from bench.client import request
from bench.machine import gateway
from bench.table import Table
from tests.support.gateway import Gateway, simulated, wait_for

MODELS = ("a", "b")
COUNT = 100
"""Requests for each model."""
CLIENTS = 8
"""For each model, where each sends its next request when it has the answer to the last one."""
SLOTS = 50
SERVICE = 0.5
"""Seconds of each request."""
LOAD = 1.0
"""Seconds that a model server sleeps before it answers; its own start comes to that."""
TURN = 3.0
"""`max_swap_wait` in seconds: how long a model waits at most before the other begins to drain."""
STOP = 1.0
"""Seconds from a server's last request to the next one's start at most."""
EVERY = 0.1
"""Seconds between two requests where they come one after another, each for the other model than the last."""
TARGET = 2.0
"""Total time, of the optimum's."""


@dataclass
class _Run:
    """What one policy made of the requests."""

    began: float
    waits: list[float] = field(default_factory=list)
    """Seconds from the request to its answer, less what the server took."""
    refused: int = 0
    seconds: float = 0.0
    loads: int = 0
    load: float = 0.0
    """Seconds of a load, as it was learned."""


_Ask = Callable[[str, _Run], Awaitable[None]]


def run(seconds: float) -> None:
    """Prints the table; a run ends after `seconds` at the latest, whatever was served by then."""
    table = Table(
        f"Two models that can't share a card, {COUNT} requests each",
        "requests come",
        "policy",
        "loads",
        "time",
        "longest wait",
        "served",
    )
    for words, ask, least in (
        (f"from {CLIENTS} clients for each model", _clients, _least_of_clients),
        (f"every {EVERY:g} s, in turn", _alternating, _least_of_alternating),
    ):
        turns, plain = _measure(ask, TURN, seconds), _measure(ask, 0.0, seconds)
        best, bound = least(turns.load), TURN + 2 * (SERVICE + STOP + turns.load)
        table.row(words, "optimum: each once", len(MODELS), f"{best:.1f} s")
        table.row(
            words,
            f"turns of {TURN:g} s",
            *_columns(turns),
            target=f"≤ {TARGET:g} × {best:.1f} s, waits ≤ {bound:.1f} s",
            met=turns.seconds <= TARGET * best and max(turns.waits) <= bound and not turns.refused,
        )
        table.row(words, "plain LRU", *_columns(plain))


def _columns(one: _Run) -> tuple[str, ...]:
    served = f"{len(one.waits)} of {len(MODELS) * COUNT}, {one.refused} refused"
    return f"{one.loads}", f"{one.seconds:.1f} s", f"{max(one.waits, default=math.nan):.1f} s", served


def _least_of_clients(load: float) -> float:
    """The optimum when all the requests of one model come before those of the other."""
    return len(MODELS) * (load + math.ceil(COUNT / CLIENTS) * SERVICE)


def _least_of_alternating(load: float) -> float:
    """The optimum when the last request for the first model comes at its time; the other's wait by then."""
    last = max(load, (2 * COUNT - 2) * EVERY) + SERVICE
    return last + load + math.ceil(COUNT / SLOTS) * SERVICE


def _measure(ask: _Ask, turn: float, seconds: float) -> _Run:
    models = {
        name: simulated(
            "--load-time",
            str(LOAD),
            "--ttft",
            str(SERVICE),
            vram="20GiB",
            max_concurrent=SLOTS,
            max_queue=1000,
        )
        for name in MODELS
    }
    with gateway(models, lifecycle={"max_swap_wait": f"{turn:g}s", "min_residency": "0s"}) as one:
        made = _Run(time.monotonic())
        asyncio.run(_until_done(ask, one.url, made, seconds))
        made.seconds = time.monotonic() - made.began
        states = wait_for(lambda: _loaded(one), "a load was learned")
        made.loads = sum(int(model.get("loads", 0)) for model in states)
        made.load = max(int(model.get("load_time_ms", 0)) for model in states) / 1000
    return made


def _loaded(one: Gateway) -> list[dict[str, object]]:
    models = list(one.status()["models"].values())
    return models if any("load_time_ms" in model for model in models) else []


async def _until_done(ask: _Ask, url: str, made: _Run, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await ask(url, made)
    except TimeoutError:
        pass


async def _clients(url: str, made: _Run) -> None:
    """Each client sends its next request when it has the answer to the last one."""
    left = dict.fromkeys(MODELS, COUNT)

    async def client(model: str) -> None:
        while left[model]:
            left[model] -= 1
            await _one(url, model, made)

    await asyncio.gather(*(client(model) for model in MODELS for _ in range(CLIENTS)))


async def _alternating(url: str, made: _Run) -> None:
    """An open loop: requests come when they come."""
    async with asyncio.TaskGroup() as group:
        for number in range(2 * COUNT):
            await asyncio.sleep(max(0.0, made.began + number * EVERY - time.monotonic()))
            group.create_task(_one(url, MODELS[number % 2], made))


async def _one(url: str, model: str, made: _Run) -> None:
    """One request over a connection of its own."""
    began, parts = time.monotonic(), urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        writer.write(request(url, json.dumps(body).encode()))
        head = await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()
    if b" 200 " in head[:20]:
        made.waits.append(time.monotonic() - began - SERVICE)
    else:
        made.refused += 1
