"""Hours of traffic in a simulated world in which everything breaks; `world.py` tells how it works."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.simulation.edge import Client
from tests.simulation.faults import Faults
from tests.simulation.traffic import Habit, Traffic
from tests.simulation.world import Setting, World, simulated
from tidegate_admission.fairness import TenantRule, Tenants
from tidegate_admission.limits import Limits
from tidegate_edge.ticket import Band
from tidegate_lifecycle.catalog import Model

COMMAND = ("serve", "{port}")
TENANTS = Tenants(named={"gold": TenantRule(4, int(Band.HIGH.value)), "bulk": TenantRule(1)})
SETTING = Setting(
    # On two cards of 24 MiB. None of them has room for all, and elm needs both cards.
    models=(
        Model("ash", command=COMMAND, vram_mib=20, max_concurrent=2, idle_timeout=60.0, start_timeout=20.0),
        Model("birch", command=COMMAND, vram_mib=18, max_concurrent=4, max_queue=12, start_timeout=20.0),
        Model("cedar", command=COMMAND, vram_mib=9, instances=2, max_concurrent=3, idle_timeout=30.0),
        Model(
            "dogwood", command=COMMAND, vram_mib=4, max_concurrent=1, idle_timeout=20.0, start_timeout=20.0
        ),
        Model("elm", command=COMMAND, vram_mib=12, tensor_parallel_size=2, idle_timeout=45.0),
    ),
    limits=Limits(max_concurrent=4, max_queue=30, queue_timeout=40.0, aging=15.0, tenants=TENANTS),
)
HABITS = (
    Habit("gold", Band.HIGH, 0.5),
    Habit("gold", Band.NORMAL, 0.3),
    Habit("", Band.NORMAL, 0.8),
    Habit("bulk", Band.LOW, 1.0),
    Habit("other", Band.NORMAL, 0.3, (0.05, 0.5)),
)
SEEDS = range(4)
SLOW_SEEDS = range(100, 160)
FAIR_SEEDS = range(2)
DRAINED = 900.0
"""Seconds in which everything must have ended once the faults are over: start and queue timeouts, turns."""


def live(seed: int, seconds: float) -> World:
    """A run: traffic and faults for so long, then neither, until nothing is left."""
    with simulated(seed, SETTING) as world:
        often = world.random.choice([5.0, 10.0, 30.0])
        world.start_all()
        world.run(world.random.uniform(0.0, 3.0))
        traffic, faults = Traffic(world, HABITS, vanishing=0.01), Faults(world, often)
        traffic.begin()
        faults.begin()
        world.run(seconds)
        traffic.on = False
        faults.stop()
        world.drain(DRAINED)
    return world


def seeds(config: pytest.Config, by_default: range) -> list[int]:
    """The one that was given, or the default ones."""
    given = config.getoption("--seed")
    return [given] if given is not None else list(by_default)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        slow = metafunc.definition.get_closest_marker("slow") is not None
        metafunc.parametrize("seed", seeds(metafunc.config, SLOW_SEEDS if slow else SEEDS))
    if "fair_seed" in metafunc.fixturenames:
        metafunc.parametrize("fair_seed", seeds(metafunc.config, FAIR_SEEDS))


def test_the_rules_hold_whatever_breaks(seed: int) -> None:
    """With every fault there is: the rules hold after every step, and in the end all has ended."""
    world = live(seed, 900.0)
    assert sum(client.granted > 0 for client in world.clients) > 300, "it must have been worth looking"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_rules_hold_for_an_hour(seed: int) -> None:
    """The same for longer, with more seeds."""
    live(seed, 3600.0)


def test_a_seed_is_a_run() -> None:
    """What happens depends on the seed alone, so that a failure can be looked at again."""
    first, again = live(3, 120.0), live(3, 120.0)
    assert first.tale() == again.tale()
    assert first.tale() != live(4, 120.0).tale()


# --- fairness, when nothing breaks -------------------------------------------------------------------

ALONE = Model("oak", command=COMMAND, vram_mib=20, max_concurrent=4, max_queue=100)
LENGTH = 1.0
"""Seconds of each request: four slots serve four of them a second."""


@dataclass
class Crowd:
    """A world with one model, whose tenants' waits are measured."""

    world: World

    def begin(self, seconds: float, *habits: Habit) -> None:
        """Lets the tenants ask for so long, each at its own pace."""
        for habit in habits:
            self._ask(habit, self.world.now + seconds)

    def _ask(self, habit: Habit, until: float) -> None:
        world = self.world
        edge = world.random.choice(world.living_edges())
        client = Client(
            world.count(),
            "oak",
            habit.tenant,
            habit.band,
            length=world.random.uniform(*habit.length),
            came=world.now,
        )
        world.clients.append(client)
        edge.arrive(client)
        if world.now < until:
            world.after(world.random.expovariate(habit.rate), lambda: self._ask(habit, until))

    def waits(self, tenant: str) -> list[float]:
        """How long its requests waited for a slot; none may have been refused."""
        mine = [client for client in self.world.clients if client.tenant == tenant]
        assert all(client.granted for client in mine), "somebody was refused"
        return [client.granted - client.came for client in mine]


def test_a_flood_passes_nobody_within_its_share(fair_seed: int) -> None:
    """While one tenant asks for ten times what there is, those who ask for less than their shares wait for
    the next slots, not for the flood."""
    setting = Setting((ALONE,), edges=2, limits=Limits(queue_timeout=3600.0, max_queue=100, aging=3600.0))
    with simulated(fair_seed, setting) as world:
        world.start_all()
        world.run(1.0)
        crowd, length = Crowd(world), (0.5 * LENGTH, 1.5 * LENGTH)
        modest = [Habit(f"modest{number}", rate=0.4, length=length) for number in range(3)]
        crowd.begin(120.0, Habit("flood", rate=10.0, length=length))
        world.run(20.0)
        crowd.begin(90.0, *modest)
        world.run(160.0)
        world.drain(DRAINED)
        for habit in modest:
            waits = crowd.waits(habit.tenant)
            # Four tenants have a slot each: its own may be busy with the one before.
            assert max(waits) <= 6 * LENGTH
            assert sum(waits) / len(waits) <= LENGTH


def test_aging_bounds_the_wait_of_a_band(fair_seed: int) -> None:
    """A low band under a steady overload of the high one waits until its head has aged, and not for ever."""
    aging = 20.0
    tenants = Tenants(default=TenantRule(1, int(Band.HIGH.value)))
    limits = Limits(queue_timeout=3600.0, max_queue=100, aging=aging, tenants=tenants)
    setting = Setting((ALONE,), edges=2, limits=limits)
    with simulated(fair_seed, setting) as world:
        world.start_all()
        world.run(1.0)
        crowd, length = Crowd(world), (0.5 * LENGTH, 1.5 * LENGTH)
        crowd.begin(200.0, Habit("urgent", Band.HIGH, rate=8.0, length=length))
        world.run(30.0)
        crowd.begin(120.0, Habit("patient", Band.LOW, rate=0.1, length=length))
        world.run(250.0)
        waits = crowd.waits("patient")
        assert max(waits) > aging, "it must have been passed over at all"
        assert max(waits) <= 3 * aging, "two bands up, and a turn"
