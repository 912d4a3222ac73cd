"""Many models for few cards: hours of a clock that is owned by the test, for the planner alone.

`tests/simulation/test_many_models.py` shows shorter stretches through the services' real code.
"""

from __future__ import annotations

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chance" in metafunc.fixturenames:
        given = metafunc.config.getoption("--seed")
        metafunc.parametrize("chance", [given] if given is not None else range(examples(1)))


def test_an_hour_of_zipf_traffic(chance: int) -> None:
    """Nothing that was promised is broken (`Simulation` looks), nearly everybody is served, and fewer servers
    are swapped than requests come."""
    made = twenty(chance, rate=0.3)
    made.run(HOUR)
    _accounted(made)
    assert made.granted >= 0.97 * made.asked
    assert not made.refused
    assert made.starts <= 0.7 * made.granted


def test_zipf_traffic_when_more_is_wanted_than_can_be(chance: int) -> None:
    """When every model is wanted all the time servers keep their turns: who waits too long is refused by the
    queue's timeout, and swaps are bounded by time, not by requests."""
    made = twenty(chance, rate=4.0)
    made.run(HOUR / 2)
    _accounted(made)
    shield = min(POLICY.max_swap_wait, max(POLICY.min_residency, 2 * LOAD))
    assert made.starts <= 3 * (HOUR / 2 / (shield + LOAD + STOPS) + 1)
    assert len({item.model for item in made.instances.values()}) <= 3
    assert made.granted >= 0.25 * made.asked


def test_half_an_hour_in_which_much_breaks(chance: int) -> None:
    """Starts fail, servers die, lifecycle is killed and comes back, an operator pins: the promises hold."""
    made = twenty(chance, rate=0.5, crashes=0.01, failures=0.1)
    made.outages = True
    made.run(HOUR / 2)
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


def test_a_wide_model_is_not_starved_by_small_ones(chance: int) -> None:
    """Four cards full of small models that are always wanted: the one that needs all four gets its turn."""
    small = [f"s{number}" for number in range(8)]
    models = {name: Model(name, vram_mib=10) for name in small}
    models["wide"] = Model("wide", vram_mib=20, tensor_parallel_size=4)
    cards = tuple(Card(f"gpu{number}", "default", 24, 24) for number in range(4))
    rates = {**dict.fromkeys(small, 0.5), "wide": 0.05}
    made = Simulation(random.Random(chance), models, cards, rates, slots=1000)
    made.run(600)
    turn = POLICY.max_swap_wait + POLICY.drain_timeout + STOP_TIME + LOAD
    assert made.started.count("wide") >= 600 / (6 * turn)
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


# --- a need that isn't known -------------------------------------------------------------------------


@settings(max_examples=examples(15), deadline=None)
@given(seed=st.integers(0, 10**9), failures=st.sampled_from([0.0, 0.2]))
def test_models_that_cannot_be_estimated(seed: int, failures: float) -> None:
    """One gets a whole card for which idle ones alone are evicted; once it was measured it is packed by that,
    and the busy ones may be drained for it as for any other. Nothing else is stopped for it."""
    dice = random.Random(seed)
    cards = tuple(Card(f"gpu{number}", "default", 24, 24) for number in range(dice.randint(1, 3)))
    models = {f"k{number}": Model(f"k{number}", vram_mib=dice.randint(3, 20)) for number in range(4)}
    takes = {f"u{number}": dice.randint(3, 20) for number in range(3)}
    models |= {name: Model(name, idle_timeout=dice.choice([0.0, 20.0])) for name in takes}
    rates = {name: dice.choice([0.02, 0.2, 1.0]) for name in models}
    made = Simulation(dice, models, cards, rates, patience=QUEUE_TIMEOUT, takes=takes)
    made.failures = failures
    made.run(300)
    _accounted(made)


def test_an_unknown_model_is_packed_by_what_it_took() -> None:
    """First it has a card for itself; after its first stop it is beside another one on the same card."""
    models = {"u": Model("u", idle_timeout=5.0), "k": Model("k", vram_mib=10)}
    made = Simulation(
        random.Random(1),
        models,
        (Card("gpu0", "default", 24, 24),),
        {},
        takes={"u": 8},
        patience=QUEUE_TIMEOUT,
    )
    made.tickets["u"] = [0.0]
    made.run(10)
    assert [(item.model, item.reserved_mib) for item in made.instances.values()] == [("u", 24)]
    made.run(60)
    assert not made.instances, "idle"
    made.tickets |= {"u": [made.now], "k": [made.now]}
    made.run(80)
    assert {item.model: item.reserved_mib for item in made.instances.values()} == {"u": 8, "k": 10}
