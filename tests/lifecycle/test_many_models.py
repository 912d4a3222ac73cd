"""Many models for few cards: hours of a clock that is owned by the test, for the planner alone.

`tests/simulation/test_many_models.py` shows shorter stretches through the services' real code.
"""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lifecycle.toy import LOAD, POLICY, STOPS, Simulation
from tests.support.depth import examples
from tidegate_lifecycle.budget import Card
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.world import STOP_TIME

QUEUE_TIMEOUT = 120.0
HOUR = 3600.0


def zipf(names: list[str], rate: float) -> dict[str, float]:
    """Requests a second by Zipf's law: the k-th is asked for 1/k as often as the first; `rate` in all."""
    whole = sum(1 / rank for rank in range(1, len(names) + 1))
    return {name: rate / rank / whole for rank, name in enumerate(names, 1)}


def twenty(seed: int, rate: float, **keys: float) -> Simulation:
    """Twenty models, of which three fit at once: three cards, each with room for one."""
    dice = random.Random(seed)
    names = [f"m{number:02}" for number in range(20)]
    models = {
        name: Model(name, vram_mib=dice.randint(13, 22), idle_timeout=dice.choice([0.0, 60.0, 600.0]))
        for name in names
    }
    cards = tuple(Card(f"gpu{number}", "default", 24, 24) for number in range(3))
    made = Simulation(dice, models, cards, zipf(names, rate), patience=QUEUE_TIMEOUT)
    made.crashes, made.failures = keys.get("crashes", 0.0), keys.get("failures", 0.0)
    return made


def _accounted(made: Simulation) -> None:
    waiting = sum(map(len, made.tickets.values()))
    assert made.asked == made.granted + made.refused + made.gave_up + waiting
    assert made.longest_wait <= QUEUE_TIMEOUT


@pytest.mark.parametrize("seed", range(2))
def test_hours_of_zipf_traffic(seed: int) -> None:
    """Nothing that was promised is broken (`Simulation` looks), nearly everybody is served, and servers are
    swapped far less often than requests come."""
    made = twenty(seed, rate=0.3)
    made.run(2 * HOUR)
    _accounted(made)
    assert made.granted >= 0.97 * made.asked
    assert not made.refused
    assert made.starts <= 0.6 * made.granted
    # Three cards, each of which can't be swapped faster than a server stops and the next one loads.
    assert made.starts <= 3 * 2 * HOUR / (LOAD + STOPS) / 2


@pytest.mark.parametrize("seed", range(2))
def test_hours_of_zipf_traffic_when_more_is_wanted_than_can_be(seed: int) -> None:
    """Under a load at which every model is wanted all the time servers keep their turns: who waits too long is
    refused by the queue's timeout, and swaps are bounded by time, not by requests."""
    made = twenty(seed, rate=4.0)
    made.run(HOUR)
    _accounted(made)
    shield = min(POLICY.max_swap_wait, max(POLICY.min_residency, 2 * LOAD))
    assert made.starts <= 3 * (HOUR / (shield + LOAD + STOPS) + 1)
    assert len({item.model for item in made.instances.values()}) <= 3
    assert made.granted >= 0.3 * made.asked


@pytest.mark.parametrize("seed", range(2))
def test_an_hour_in_which_much_breaks(seed: int) -> None:
    """Starts fail, servers die, lifecycle is killed and comes back, an operator pins: the promises hold."""
    made = twenty(seed, rate=0.5, crashes=0.01, failures=0.1)
    made.outages = True
    made.run(HOUR)
    _accounted(made)
    assert made.granted >= 0.5 * made.asked


def mixed(seed: int) -> Simulation:
    """Random sizes, pools, numbers of cards, tensor parallel models among small ones, `always_on`, pins."""
    dice = random.Random(seed)
    cards = [
        Card(f"gpu{number}", dice.choice(["default", "default", "other"]), total, dice.randint(18, total))
        for number, total in enumerate(dice.choices([24, 48], k=dice.randint(1, 8)))
    ]
    cards[0] = Card("gpu0", "default", 24, 24)
    models = {
        name: Model(
            name,
            vram_mib=dice.randint(3, 30),
            pool=dice.choice(["default", "default", "other"]),
            tensor_parallel_size=dice.choice([None, None, None, 2, 4]),
            idle_timeout=dice.choice([0.0, 5.0, 60.0]),
            instances=dice.choice([1, 1, 2, 3]),
        )
        for name in [f"m{number:02}" for number in range(dice.randint(1, 20))]
    }
    if dice.random() < 0.4:
        models["on"] = Model("on", vram_mib=dice.randint(1, 8), always_on=True)
    rates = {name: dice.choice([0.0, 0.02, 0.2, 1.0]) for name in models}
    return Simulation(dice, models, tuple(cards), rates, patience=QUEUE_TIMEOUT)


@settings(max_examples=examples(20), deadline=None)
@given(
    seed=st.integers(0, 10**9),
    outages=st.booleans(),
    failures=st.sampled_from([0.0, 0.2]),
    crashes=st.sampled_from([0.0, 0.01]),
)
def test_promises_hold_on_any_machine(seed: int, outages: bool, failures: float, crashes: float) -> None:
    """Budgets, drains, stops, pins, `always_on` and shields, whatever the machine and the models are like."""
    made = mixed(seed)
    made.outages, made.failures, made.crashes = outages, failures, crashes
    made.run(240)
    _accounted(made)


@pytest.mark.parametrize("seed", range(2))
def test_a_wide_model_is_not_starved_by_small_ones(seed: int) -> None:
    """Four cards full of small models that are always wanted: the one that needs all four gets its turn."""
    small = [f"s{number}" for number in range(8)]
    models = {name: Model(name, vram_mib=10) for name in small}
    models["wide"] = Model("wide", vram_mib=20, tensor_parallel_size=4)
    cards = tuple(Card(f"gpu{number}", "default", 24, 24) for number in range(4))
    rates = {**dict.fromkeys(small, 0.5), "wide": 0.05}
    made = Simulation(random.Random(seed), models, cards, rates, slots=1000)
    starts = []
    begin = made._start
    made._start = lambda action: (starts.append(action.model), begin(action))[1]  # type: ignore[method-assign]
    made.run(900)
    turn = POLICY.max_swap_wait + POLICY.drain_timeout + STOP_TIME + LOAD
    assert starts.count("wide") >= 900 / (6 * turn)
    assert made.longest_wait <= 4 * turn


def test_a_second_server_makes_room_before_an_only_one() -> None:
    """A model that has grown to two servers gives one back to whoever has none, and grows again later."""
    models = {name: Model(name, vram_mib=10, instances=2 if name == "a" else 1) for name in "abc"}
    made = Simulation(random.Random(3), models, (Card("gpu0", "default", 24, 24),), {"a": 2.0}, slots=2)
    made.run(60)
    assert [item.model for item in made.instances.values()] == ["a", "a"]
    made.tickets["b"] = [made.now]
    made.run(60 + POLICY.drain_timeout + STOPS + LOAD + 2)
    assert sorted(item.model for item in made.instances.values()) == ["a", "b"]
    assert not math.isinf(made.longest_wait)
