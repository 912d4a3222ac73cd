"""Twenty models of which three fit, for hours, through the services' real code on virtual clocks.

What the cards, models and habits are is drawn from the seed. After every step the rules of `invariants.py`
are looked at; here it is counted besides who was served when, and how often servers were swapped.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tests.simulation import faults as f
from tests.simulation.edge import Client
from tests.simulation.faults import Faults
from tests.simulation.test_world import COMMAND, DRAINED
from tests.simulation.world import Setting, World, _card, simulated
from tidegate_admission.limits import Limits
from tidegate_edge.ticket import Band
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.world import Policy

MODELS = 20
POLICY = Policy(min_residency=8.0, max_swap_wait=12.0, drain_timeout=20.0)
QUEUE_TIMEOUT, START_TIMEOUT = 120.0, 30.0
SEEDS = range(2)
SLOW_SEEDS = range(200, 230)
FAULTS = (
    f.lifecycle_killed, f.admission_killed, f.server_crashes, f.server_hangs, f.loads_fail, f.operator_orders,
    f.coordinate_cut,
)  # fmt: skip


def seeds(config: pytest.Config, by_default: range) -> list[int]:
    """The one that was given, or the default ones."""
    given = config.getoption("--seed")
    return [given] if given is not None else list(by_default)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    slow = metafunc.definition.get_closest_marker("slow") is not None
    metafunc.parametrize("seed", seeds(metafunc.config, SLOW_SEEDS if slow else SEEDS))


@dataclass
class Zipf:
    """Requests for models by Zipf's law: the k-th is asked for 1/k as often as the first."""

    world: World
    rate: float
    """Requests a second, at random (Poisson)."""
    length: tuple[float, float] = (0.2, 6.0)
    deadlines: float = 0.1
    """Share of the callers with a deadline of their own."""
    on: bool = True
    weights: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.weights = [1 / rank for rank in range(1, len(self.world.models) + 1)]

    def begin(self) -> None:
        """Begins."""
        self.world.after(self.world.random.expovariate(self.rate), self._next)

    def _next(self) -> None:
        world, dice = self.world, self.world.random
        edges = world.living_edges()
        if not self.on:
            return
        if edges:
            client = Client(
                world.count(),
                dice.choices(list(world.models), self.weights)[0],
                "",
                Band.NORMAL,
                deadline=dice.uniform(5.0, 60.0) if dice.random() < self.deadlines else 0.0,
                length=dice.uniform(*self.length),
                came=world.now,
            )
            world.clients.append(client)
            dice.choice(edges).arrive(client)
        self.begin()


def twenty(dice: random.Random) -> Setting:
    """Three cards, each with room for one of the models, or for two of the smaller ones at best."""
    models = [
        Model(
            f"m{number:02}",
            command=COMMAND,
            vram_mib=dice.randint(12, 22),
            idle_timeout=dice.choice([0.0, 30.0, 300.0]),
            instances=dice.choice([1, 1, 1, 2]),
            max_concurrent=dice.randint(1, 6),
            start_timeout=START_TIMEOUT,
        )
        for number in range(MODELS)
    ]
    limits = Limits(max_concurrent=4, max_queue=50, queue_timeout=QUEUE_TIMEOUT)
    devices = tuple(_card(f"gpu{number}", 24) for number in range(3))
    return Setting(tuple(models), devices, edges=2, limits=limits, policy=POLICY)


def live(seed: int, seconds: float, breaking: float = 0.0) -> World:
    with simulated(seed, twenty(random.Random(seed))) as world:
        world.start_all()
        world.run(2.0)
        traffic = Zipf(world, rate=0.5)
        traffic.begin()
        faults = Faults(world, breaking or 1.0, FAULTS)
        if breaking:
            faults.begin()
        world.run(seconds)
        traffic.on = False
        faults.stop()
        world.drain(DRAINED)
    return world


def test_hours(seed: int) -> None:
    world = live(seed, 3600.0)
    ends = Counter(
        client.answers[0][1].split(":")[-1] if client.answers else "left" for client in world.clients
    )
    waits = [c.granted - c.came for c in world.clients if c.granted]
    print(
        len(world.clients), ends, max(waits), sum(waits) / len(waits), len(world.machine.ended), world.steps
    )
