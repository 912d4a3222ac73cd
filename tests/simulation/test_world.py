"""Hours of traffic in a simulated world in which everything breaks; `world.py` tells how it works."""

from __future__ import annotations

import pytest

from tests.simulation.faults import Faults
from tests.simulation.traffic import Habit, Traffic
from tests.simulation.world import Setting, World, simulated
from tidegate_admission.fairness import TenantRule, Tenants
from tidegate_admission.limits import Limits
from tidegate_edge.ticket import Band
from tidegate_lifecycle.catalog import Model

TENANTS = Tenants(named={"gold": TenantRule(4, int(Band.HIGH.value)), "bulk": TenantRule(1)})
LIMITS = Limits(max_concurrent=4, max_queue=30, queue_timeout=40.0, aging=15.0, tenants=TENANTS)
COMMAND = ("serve", "{port}")
MODELS = (
    Model("ash", command=COMMAND, vram_mib=20, max_concurrent=2, idle_timeout=60.0, start_timeout=20.0),
    Model("birch", command=COMMAND, vram_mib=18, max_concurrent=4, max_queue=12, start_timeout=20.0),
    Model("cedar", command=COMMAND, vram_mib=9, instances=2, max_concurrent=3, idle_timeout=30.0, start_timeout=20.0),
    Model("dogwood", command=COMMAND, vram_mib=4, max_concurrent=1, idle_timeout=20.0, start_timeout=20.0),
    Model("elm", command=COMMAND, vram_mib=12, tensor_parallel_size=2, idle_timeout=45.0, start_timeout=20.0),
)
HABITS = (
    Habit("gold", Band.HIGH, 0.5),
    Habit("gold", Band.NORMAL, 0.3),
    Habit("", Band.NORMAL, 0.8),
    Habit("bulk", Band.LOW, 1.0),
    Habit("other", Band.NORMAL, 0.3, (0.05, 0.5)),
)
SETTING = Setting(MODELS, limits=LIMITS)
QUIET = 300.0
"""Seconds in which everything must have drained once the faults are over: the longest of the times."""


def live(seed: int, seconds: float, every: float = 6.0) -> World:
    """A run: traffic and faults for so long, then neither, until nothing is left."""
    with simulated(seed, SETTING) as world:
        world.start_all()
        world.run(world.random.uniform(0.0, 3.0))
        traffic, faults = Traffic(world, HABITS, vanishing=0.01), Faults(world, every)
        traffic.begin()
        faults.begin()
        world.run(seconds)
        traffic.on = False
        faults.stop()
        world.run(QUIET)
        world.drain(QUIET)
        return world


@pytest.mark.parametrize("seed", range(3))
def test_the_rules_hold_whatever_breaks(seed: int) -> None:
    """With every fault there is, at any time: the rules hold after every step, and in the end nothing is left."""
    world = live(seed, 900.0)
    assert len(world.clients) > 300
