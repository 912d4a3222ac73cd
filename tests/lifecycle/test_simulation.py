"""The planner against a toy runtime and a toy admission, for hours of a clock that is owned by the test."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lifecycle.toy import LOAD, POLICY, Simulation
from tests.support.depth import examples
from tidegate_lifecycle.budget import Card
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.world import STOP_TIME


def make(seed: int, outages: bool, failures: float) -> Simulation:
    rng = random.Random(seed)
    cards = tuple(Card(f"gpu{i}", "default", 24, rng.choice([20, 24])) for i in range(rng.randint(1, 3)))
    smallest = min(card.budget_mib for card in cards)
    models = {
        name: Model(
            name,
            vram_mib=rng.randint(3, smallest),
            idle_timeout=rng.choice([0.0, 5.0, 60.0]),
            instances=rng.choice([1, 1, 2]),
        )
        for name in "abcdefg"[: rng.randint(1, 7)]
    }
    if rng.random() < 0.4:
        models["on"] = Model("on", vram_mib=rng.randint(1, smallest // 3), always_on=True)
    return Simulation(
        rng, models, cards, {name: rng.choice([0.0, 0.02, 0.2, 1.0]) for name in models}, outages, failures
    )


@settings(max_examples=examples(25), deadline=None)
@given(seed=st.integers(0, 10**9), outages=st.booleans(), failures=st.sampled_from([0.0, 0.2]))
def test_promises_hold(seed: int, outages: bool, failures: float) -> None:
    """Whatever comes: budgets hold, nothing in use is stopped, always_on stays, nobody thrashes."""
    make(seed, outages, failures).run(240)


@pytest.mark.parametrize("seed", range(4))
def test_everything_wanted_gets_its_turn(seed: int) -> None:
    """Models that all want the same card and never stop being wanted each wait no longer than their turn."""
    names = "abcd"
    models = {name: Model(name, vram_mib=15) for name in names}
    simulation = Simulation(
        random.Random(seed),
        models,
        (Card("gpu0", "default", 24, 24),),
        dict.fromkeys(names, 0.3),
        slots=1000,
        strict=True,
    )
    simulation.run(1800)
    turn = POLICY.max_swap_wait + POLICY.drain_timeout + STOP_TIME + LOAD
    # One turn for each model, its own included, and one start in progress; slots are no limit here.
    assert 0 < simulation.longest_wait <= len(names) * turn + LOAD
    assert simulation.granted > 1800 * 0.3 * len(names) * 0.8
    # A turn lasts at least its shield: there can't be more loads than turns.
    assert simulation.starts <= 1800 / POLICY.max_swap_wait


def test_alternating_requests_are_batched() -> None:
    """Two models that can't share a card and are both wanted: loads are bounded by time, not by requests."""
    models = {name: Model(name, vram_mib=20) for name in "ab"}
    simulation = Simulation(
        random.Random(1),
        models,
        (Card("gpu0", "default", 24, 24),),
        {"a": 1.5, "b": 1.5},
        slots=1000,
        strict=True,
    )
    simulation.run(600)
    assert simulation.granted > 600
    assert simulation.starts <= 600 / (POLICY.max_swap_wait + LOAD) + 1


def test_idle_models_stop_and_nothing_runs_for_nothing() -> None:
    """When nobody wants anything any more, everything but always_on ends after its idle_timeout."""
    models = {
        "a": Model("a", vram_mib=5, idle_timeout=10.0),
        "on": Model("on", vram_mib=5, always_on=True, idle_timeout=10.0),
    }
    simulation = Simulation(random.Random(2), models, (Card("gpu0", "default", 24, 24),), {"a": 0.5})
    simulation.run(60)
    simulation.arrivals.clear()
    simulation.run(120)
    assert [item.model for item in simulation.instances.values()] == ["on"]
