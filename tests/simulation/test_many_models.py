"""Twenty models of which three fit, asked for by Zipf's law, through the services' code on virtual clocks.

What the models and requests are is drawn from the seed; after every step the rules of `invariants.py` are
looked at. `tests/lifecycle/test_many_models.py` shows hours of it with the planner alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from tests.simulation import faults as f
from tests.simulation.edge import Client
from tests.simulation.faults import Faults
from tests.simulation.invariants import LATE
from tests.simulation.test_world import COMMAND, DRAINED, seeds
from tests.simulation.world import Setting, World, card, simulated
from tidegate_admission.limits import Limits
from tidegate_edge.ticket import Band
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.world import Policy

POLICY = Policy(min_residency=8.0, max_swap_wait=12.0, drain_timeout=20.0)
QUEUE_TIMEOUT, START_TIMEOUT = 120.0, 30.0
SLOW_SEEDS = range(200, 206)
FAULTS = (
    f.lifecycle_killed, f.admission_killed, f.server_crashes, f.server_hangs, f.loads_fail, f.operator_orders,
    f.coordinate_cut,
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    slow = metafunc.definition.get_closest_marker("slow") is not None
    metafunc.parametrize("seed", seeds(metafunc.config, SLOW_SEEDS if slow else range(1)))


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
    """Three cards with room for one model each, or for two of the smaller ones at best; one model is spread
    over two of them, and one is always on."""
    models = [
        Model(
            f"m{number:02}",
            command=COMMAND,
            vram_mib=dice.randint(12, 20),
            idle_timeout=dice.choice([0.0, 30.0, 300.0]),
            instances=dice.choice([1, 1, 1, 2]),
            max_concurrent=dice.randint(1, 6),
            start_timeout=START_TIMEOUT,
        )
        for number in range(18)
    ]
    wide = Model("wide", command=COMMAND, vram_mib=15, tensor_parallel_size=2, start_timeout=START_TIMEOUT)
    always = Model("always", command=COMMAND, vram_mib=4, always_on=True, start_timeout=START_TIMEOUT)
    models.insert(dice.randint(1, 5), wide)
    limits = Limits(max_concurrent=4, max_queue=50, queue_timeout=QUEUE_TIMEOUT)
    devices = tuple(card(f"gpu{number}", 24) for number in range(3))
    return Setting((*models, always), devices, edges=2, limits=limits, policy=POLICY)


def live(seed: int, seconds: float, every: float = 0.0) -> World:
    """A run: traffic for so long, with a fault every so many seconds on average (0 = none), then neither,
    until nothing is left."""
    with simulated(seed, twenty(random.Random(seed))) as world:
        world.start_all()
        world.run(2.0)
        traffic = Zipf(world, rate=0.4)
        traffic.begin()
        faults = Faults(world, every or 1.0, FAULTS)
        if every:
            faults.begin()
        world.run(seconds)
        traffic.on = False
        faults.stop()
        world.drain(DRAINED)
    return world


def kept_within_their_bounds(world: World) -> None:
    """Everybody was granted or refused by his own deadline, or by the queue's timeout and one load."""
    for client in world.clients:
        ((answered, _),) = client.answers
        waited = (client.granted or answered) - client.came
        bound = client.deadline or QUEUE_TIMEOUT + START_TIMEOUT
        assert waited <= bound + LATE, f"{client} waited for {waited:.1f} s of at most {bound:.1f} s"


def test_twenty_models_of_which_three_fit(seed: int) -> None:
    """When nothing breaks everybody is served, but for callers whose own deadline can't be met; and fewer
    servers are started than requests come."""
    world = live(seed, 300.0)
    kept_within_their_bounds(world)
    patient = [client for client in world.clients if not client.deadline]
    assert len(patient) > 60, "it must have been worth looking"
    assert {client.answers[0][1] for client in patient} == {"ok"}
    assert len(world.machine.ended) < sum(client.granted > 0 for client in world.clients)


def test_twenty_models_while_much_breaks(seed: int) -> None:
    """Starts fail, servers die and hang, services are killed, an operator loads, unloads and pins: the rules
    hold, and everybody is answered."""
    world = live(seed, 240.0, every=10.0)
    assert sum(client.granted > 0 for client in world.clients) > 30, "it must have been worth looking"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_models_for_an_hour(seed: int) -> None:
    """The same for longer: an hour of each."""
    kept_within_their_bounds(live(seed, 3600.0))
    live(seed, 3600.0, every=30.0)
