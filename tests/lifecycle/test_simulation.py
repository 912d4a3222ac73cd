"""The planner against a toy runtime and a toy admission, for hours of a clock that is owned by the test."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.depth import examples
from tidegate_lifecycle.budget import Card, Intent, Ledger
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.instance import Drain, DrainCause, Instance, InstanceState
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.world import (
    STOP_TIME,
    Circuit,
    Demand,
    Policy,
    Start,
    StartDrain,
    Stop,
    Undrain,
    World,
)

STEP = 0.5
POLICY = Policy(min_residency=8.0, max_swap_wait=12.0, drain_timeout=20.0)
LOAD = 6.0
STOPS = 2.0


@dataclass
class Simulation:
    """Moves on in steps; what must never happen is asserted as it would happen."""

    random: random.Random
    models: dict[str, Model]
    cards: tuple[Card, ...]
    arrivals: dict[str, float]
    """Tickets per second."""
    outages: bool = False
    failures: float = 0.0
    """Share of the starts that fail."""
    slots: int = 4
    now: float = 0.0
    instances: dict[str, Instance] = field(default_factory=dict)
    due: dict[str, float] = field(default_factory=dict)
    """When a starting one is ready, and a stopping one gone."""
    tickets: dict[str, list[float]] = field(default_factory=dict)
    leases: dict[str, list[float]] = field(default_factory=dict)
    """Per instance, when each ends."""
    circuits: dict[str, Circuit] = field(default_factory=dict)
    intents: tuple[Intent, ...] = ()
    generation: int = 1
    seen: int = 0
    """By admission: it acts one step behind."""
    visible: set[str] = field(default_factory=set)
    """Instances that admission may grant on."""
    away_until: float = 0.0
    starts: int = 0
    granted: int = 0
    longest_wait: float = 0.0

    @property
    def settled(self) -> bool:
        return self.now >= self.away_until

    def run(self, seconds: float) -> None:
        while self.now < seconds:
            self.now += STEP
            self._admission()
            self._runtime()
            self._plan()

    def _admission(self) -> None:
        for name, rate in self.arrivals.items():
            if self.random.random() < rate * STEP:
                self.tickets.setdefault(name, []).append(self.now)
        for leases in self.leases.values():
            leases[:] = [end for end in leases if end > self.now]
        if self.outages and self.settled and self.random.random() < 0.01:
            self.away_until = self.now + self.random.uniform(1, 30)
        if self.settled:
            self.seen = self.generation
            states = self.instances.values()
            self.visible = {i.id for i in states if i.state is InstanceState.READY}
        for instance_id in sorted(self.visible & set(self.instances)):
            item, leases = self.instances[instance_id], self.leases.setdefault(instance_id, [])
            waiting = self.tickets.get(item.model, [])
            while waiting and len(leases) < self.slots and item.state is not InstanceState.STOPPING:
                self.longest_wait = max(self.longest_wait, self.now - waiting.pop(0))
                leases.append(self.now + self.random.uniform(0.5, 10))
                item.grants += 1
                self.granted += 1
        if not self.settled:
            return
        for item in self.instances.values():
            count = len(self.leases.get(item.id, ()))
            if count or item.leases:
                item.last_used = self.now
            item.leases = count

    def _runtime(self) -> None:
        for item in list(self.instances.values()):
            if self.now < self.due.get(item.id, float("inf")):
                continue
            del self.due[item.id]
            if item.state is InstanceState.STOPPING:
                item.to(InstanceState.GONE, self.now)
                del self.instances[item.id]
            elif self.random.random() < self.failures:
                failures = self.circuits[item.model].failures if item.model in self.circuits else 0
                self.circuits[item.model] = Circuit(failures + 1, self.now + min(60, 2**failures))
                self._stop(item)
            else:
                self._change(item, InstanceState.READY)
                self.circuits.pop(item.model, None)

    def _change(self, item: Instance, state: InstanceState) -> None:
        item.to(state, self.now)
        self.generation += 1
        item.generation = self.generation

    def _stop(self, item: Instance) -> None:
        self._change(item, InstanceState.STOPPING)
        self.due[item.id] = self.now + STOPS

    def _world(self) -> World:
        demand = {
            name: Demand(len(waiting), waiting[0])
            for name, waiting in self.tickets.items()
            if waiting and self.settled
        }
        return World(
            self.models,
            self.cards,
            tuple(self.instances.values()),
            demand,
            circuits=dict(self.circuits),
            load_times=dict.fromkeys(self.models, LOAD),
            intents=self.intents,
            settled=self.settled,
            seen=self.seen if self.settled else 0,
            policy=POLICY,
        )

    def _plan(self) -> None:
        world = self._world()
        decided = plan(world, self.now)
        assert decided == plan(world, self.now), "the same world gives the same plan"
        self.intents = decided.intents
        for action in decided.actions:
            if isinstance(action, Start):
                self._start(action)
                continue
            item = self.instances[action.instance_id]
            if isinstance(action, Undrain):
                self._change(item, InstanceState.READY)
            elif isinstance(action, StartDrain):
                self._check_drain(item, action)
                deadline = self.now + POLICY.drain_timeout
                item.start_drain(Drain(action.cause, self.now, deadline, action.beneficiary), action.reason)
                self.generation += 1
                item.generation = self.generation
            else:
                self._check_stop(item, action)
                self.leases.pop(item.id, None)
                self._stop(item)
        assert not Ledger(self.cards, self.instances.values()).violation(), "a card's budget is exceeded"

    def _start(self, action: Start) -> None:
        self.starts += 1
        for other in self.instances.values():
            beside = set(other.devices) & set(action.devices)
            resting = (InstanceState.READY, InstanceState.DRAINING)
            assert not beside or other.state in resting, f"{action} beside {other}"
        item = Instance(
            f"{action.model}-{self.starts}", action.model, action.devices, action.reserved_mib, self.now
        )
        self.generation += 1
        item.generation = self.generation
        self.instances[item.id] = item
        self.due[item.id] = self.now + LOAD

    def _check_drain(self, item: Instance, action: StartDrain) -> None:
        assert self.settled, "only adds while admission is away"
        assert not self.models[item.model].always_on, "always_on is never a victim"
        if action.cause is DrainCause.EVICTION and (self.tickets.get(item.model) or item.leases):
            mine = [one.ready_at for one in self.instances.values() if one.model == item.model]
            began = min(at for at in mine if at is not None)  # the turn is the model's, not its youngest server's
            shield = min(POLICY.max_swap_wait, max(POLICY.min_residency, 2 * LOAD))
            assert self.now - began >= shield, f"thrash: {item}"

    def _check_stop(self, item: Instance, action: Stop) -> None:
        assert self.settled, "only adds while admission is away"
        if action.cut:
            assert item.drain is not None
            assert item.drain.deadline is not None
            assert self.now >= item.drain.deadline
        else:
            assert self.seen >= item.generation, "admission hasn't seen the drain"
            assert not self.leases.get(item.id), "a planned stop of a server in use"


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
        random.Random(seed), models, (Card("gpu0", "default", 24, 24),), dict.fromkeys(names, 0.3), slots=1000
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
        random.Random(1), models, (Card("gpu0", "default", 24, 24),), {"a": 1.5, "b": 1.5}, slots=1000
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
