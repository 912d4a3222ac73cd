"""A toy runtime and a toy admission for the planner, on a clock that is owned by the test."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tidegate_lifecycle.budget import Card, Intent, Ledger
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.instance import Drain, DrainCause, Instance, InstanceState
from tidegate_lifecycle.needs import Need, need_of
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.world import (
    Circuit,
    Demand,
    Policy,
    Start,
    StartDrain,
    Stop,
    Undrain,
    Wait,
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
    crashes: float = 0.0
    """Of each server a second, and how often lifecycle itself is started again, and a pin changes."""
    slots: int = 4
    strict: bool = False
    """The bounds of turns are held against it: where all want the same room, and nothing breaks."""
    patience: float = math.inf
    """Seconds after which a ticket leaves: admission's `queue_timeout`."""
    needs: dict[str, Need] = field(default_factory=dict)
    takes: dict[str, int] = field(default_factory=dict)
    """What the servers of models take in truth: measured once one is ready."""
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
    pinned: set[str] = field(default_factory=set)
    promised: dict[str, float] = field(default_factory=dict)
    """By model that waits, when it must serve by the bound that was told, the earliest that was."""
    starts: int = 0
    started: list[str] = field(default_factory=list)
    granted: int = 0
    refused: int = 0
    gave_up: int = 0
    asked: int = 0
    evictions: int = 0
    longest_wait: float = 0.0

    @property
    def settled(self) -> bool:
        return self.now >= self.away_until

    def run(self, seconds: float) -> None:
        while self.now < seconds:
            self.now += STEP
            self._admission()
            self._runtime()
            if self.crashes:
                self._break()
            self._plan()

    def _admission(self) -> None:
        for name, rate in self.arrivals.items():
            if self.random.random() < rate * STEP:
                self.tickets.setdefault(name, []).append(self.now)
                self.asked += 1
        for waiting in self.tickets.values():
            stay = [since for since in waiting if since + self.patience > self.now]
            self.gave_up += len(waiting) - len(stay)
            waiting[:] = stay
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
                late = self.now - self.promised.pop(item.model, math.inf) - STEP
                assert late <= 0 or not self.strict, f"{item} is {late} s late"
                if item.model in self.takes:
                    need = self.needs.get(item.model) or need_of(self.models[item.model])
                    measured = {("", len(item.devices)): self.takes[item.model]}
                    self.needs[item.model] = replace(need, measured=measured)

    def _break(self) -> None:
        """Servers die, lifecycle is killed and comes back, an operator pins and unpins."""
        self.promised.clear()
        for item in list(self.instances.values()):
            running = item.state in (InstanceState.READY, InstanceState.DRAINING)
            if running and self.random.random() < self.crashes * STEP:
                self.leases.pop(item.id, None)
                self._stop(item)
        if self.random.random() < self.crashes * STEP:
            self.intents, self.circuits = (), {}
            for item in self.instances.values():  # adopted: what drained is ready again, and new
                if item.state is InstanceState.DRAINING:
                    self._change(item, InstanceState.READY)
                if item.state is InstanceState.READY:
                    item.ready_at = item.last_used = self.now
        if self.random.random() < self.crashes * STEP:
            name = self.random.choice(sorted(self.models))
            self.pinned = set() if self.pinned else {name}

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
            needs=dict(self.needs),
            settled=self.settled,
            seen=self.seen if self.settled else 0,
            pinned=frozenset(self.pinned),
            policy=POLICY,
        )

    def _plan(self) -> None:
        world = self._world()
        decided = plan(world, self.now)
        if self.random.random() < 0.05:
            assert decided == plan(world, self.now), "the same world gives the same plan"
        self.intents = decided.intents
        self._tell(decided.waits)
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

    def _tell(self, waits: Mapping[str, Wait]) -> None:
        """Admission refuses what can't be had; the bounds of turns are promises."""
        open_ = {name for name, circuit in self.circuits.items() if circuit.retry_at > self.now}
        for name in open_ | {name for name, wait in waits.items() if wait.refuses}:
            self.refused += len(self.tickets.get(name, ()))
            self.tickets.pop(name, None)
        self.promised = {name: at for name, at in self.promised.items() if self.tickets.get(name)}
        for name, wait in waits.items():
            if wait.ready_in is not None and self.tickets.get(name):
                self.promised[name] = min(self.promised.get(name, math.inf), self.now + wait.ready_in)

    def _start(self, action: Start) -> None:
        self.starts += 1
        self.started.append(action.model)
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
        if action.cause is DrainCause.EVICTION:
            self.evictions += 1
            assert not self.models[item.model].always_on, "always_on is never a victim"
            assert item.model not in self.pinned, "nor is a pinned one"
            unknown = action.beneficiary in self.takes and action.beneficiary not in self.needs
            assert not unknown or not item.leases, "a busy one goes for a model of which nothing is known"
        if action.cause is DrainCause.EVICTION and (self.tickets.get(item.model) or item.leases):
            older = [
                one
                for one in self.instances.values()
                if one.model == item.model
                and (one.ordered_at, one.id) < (item.ordered_at, item.id)
                and (one.state is InstanceState.READY or (one.drain and one.drain.since == self.now))
            ]
            shield = min(POLICY.max_swap_wait, max(POLICY.min_residency, 2 * LOAD))
            # A second server has no shield of its own: its model's turn goes on with the first.
            assert older or self.now - (item.ready_at or 0.0) >= shield, f"thrash: {item}"

    def _check_stop(self, item: Instance, action: Stop) -> None:
        assert self.settled, "only adds while admission is away"
        if action.cut:
            assert item.drain is not None
            assert item.drain.deadline is not None
            assert self.now >= item.drain.deadline
        else:
            assert self.seen >= item.generation, "admission hasn't seen the drain"
            assert not self.leases.get(item.id), "a planned stop of a server in use"
