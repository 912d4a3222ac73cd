"""Processor time of one plan for 100 models on 64 cards: the service makes one after every message.

The planner alone; worlds are drawn at random from a fixed seed and each is planned many times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

from bench.client import quantile
from bench.table import Table, ms
from tidegate_lifecycle.budget import Card, Ledger
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.world import Demand, World

MODELS, CARDS = 100, 64
TOTAL = 80 * 1024
"""MiB of each card."""
NOW = 10_000.0
TARGET = 0.01
"""Seconds of a plan at most."""


def run(seconds: float) -> None:
    """Prints the table; all of it takes about `seconds`."""
    table = Table(
        f"A plan for {MODELS} models on {CARDS} cards", "world", "plans", "least", "p50", "p99", "actions"
    )
    for words, make in WORLDS.items():
        world = make(random.Random(words))
        times, actions = list(_plans(world, seconds / len(WORLDS))), len(plan(world, NOW).actions)
        half = quantile(times, 0.5)
        table.row(
            words,
            len(times),
            ms(min(times)),
            ms(half),
            ms(quantile(times, 0.99)),
            actions,
            target=f"p50 ≤ {ms(TARGET)}",
            met=half <= TARGET,
        )


def _plans(world: World, seconds: float) -> Iterator[float]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.thread_time()
        plan(world, NOW)
        yield time.thread_time() - began


def _models(dice: random.Random, tensor_parallel: tuple[int, ...] = (1, 1, 1, 2, 4)) -> dict[str, Model]:
    return {
        f"m{number}": Model(
            f"m{number}",
            vram_mib=dice.randint(4, 70) * 1024,
            tensor_parallel_size=dice.choice(tensor_parallel),
            instances=dice.choice((1, 1, 2)),
        )
        for number in range(MODELS)
    }


def _filled(dice: random.Random, models: dict[str, Model], busy: float) -> tuple[Instance, ...]:
    """Servers of as many models as have room, in random order; `busy` is the share with leases."""
    ledger = Ledger(_cards(), ())
    instances = []
    for name in dice.sample(sorted(models), len(models)):
        model = models[name]
        need, count = model.vram_mib or 0, model.tensor_parallel_size or 1
        cards = [card for card in ledger.cards if ledger.free(card, name) >= need][:count]
        if len(cards) < count:
            continue
        item = Instance(f"{name}-1", name, tuple(cards), need, 0.0, state=InstanceState.READY)
        item.ready_at, item.generation = NOW - dice.uniform(1, 600), 1
        item.last_used = NOW - dice.uniform(0, 600)
        item.leases = dice.randint(1, 8) if dice.random() < busy else 0
        instances.append(item)
        for card in cards:
            ledger.on[card].append(item)
    return tuple(instances)


def _cards() -> tuple[Card, ...]:
    return tuple(Card(f"gpu{number:02}", "default", TOTAL, TOTAL * 92 // 100) for number in range(CARDS))


def _world(
    dice: random.Random, models: dict[str, Model], instances: tuple[Instance, ...], wanted: float
) -> World:
    demand = {
        name: Demand(dice.randint(1, 50), NOW - dice.uniform(0, 90))
        for name in models
        if dice.random() < wanted
    }
    return World(
        models,
        _cards(),
        instances,
        demand,
        load_times=dict.fromkeys(models, 60.0),
        settled=True,
        seen=9,
    )


def _everyday(dice: random.Random) -> World:
    models = _models(dice)
    return _world(dice, models, _filled(dice, models, 0.3), 0.2)


def _cold(dice: random.Random) -> World:
    return _world(dice, _models(dice), (), 1.0)


def _crowded(dice: random.Random) -> World:
    models = _models(dice)
    return _world(dice, models, _filled(dice, models, 1.0), 1.0)


def _pinned(dice: random.Random) -> World:
    models = _models(dice)
    world = _world(dice, models, _filled(dice, models, 1.0), 1.0)
    return World(**{**vars(world), "pinned": frozenset(item.model for item in world.instances)})


def _wide(dice: random.Random) -> World:
    models = _models(dice, (CARDS,))
    return _world(dice, models, _filled(dice, models, 1.0), 1.0)


WORLDS: dict[str, Callable[[random.Random], World]] = {
    "a third of the servers busy, a fifth of the models wanted": _everyday,
    "nothing runs, all wanted": _cold,
    "every server busy, all wanted": _crowded,
    "every server pinned, all wanted": _pinned,
    f"each model needs {CARDS} cards, all wanted": _wide,
}
