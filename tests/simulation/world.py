"""The simulated world: a virtual clock, a machine, a network, and the three services on it.

How it works, in ten lines:
1. `World` owns the clock and one heap of events: it takes the earliest and lets it happen.
2. A `Process` (process.py) is an event loop on that clock. Admission, lifecycle and edges (services.py,
   edge.py) run their real code on it: dispatcher, streams, links, timers, sessions, reconciler, keepers.
3. `Network` (network.py) carries their gRPC calls, as bytes, in queues with delays; links can be cut.
4. `Machine` (machine.py) has the model servers, which outlive lifecycle, and knows what they serve in truth.
5. `Traffic` (traffic.py) sends clients; `Faults` (faults.py) kills, freezes, cuts, revokes, and undoes it.
6. A step is one event that reaches a process, with all that its loop then does. After every step
   `Invariants` (invariants.py) looks at the books, at the truth, and at both; what is wrong raises.
7. All chance is the world's `random`, so a seed is a run. A failure prints the seed and the last events;
   `--seed N` runs that one alone. At the end faults stop, and everything must drain until nothing is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import structlog

from tests.simulation.edge import Client, Edge
from tests.simulation.invariants import Invariants
from tests.simulation.machine import Disk, Machine, ModelServer
from tests.simulation.network import Channel, Network
from tests.simulation.process import Process
from tests.simulation.services import Admission, Lifecycle
from tidegate_admission.limits import Limits
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.world import Policy

KEPT = 400
"""Events that a failure prints."""


class Violation(AssertionError):
    """A rule of the protocol was broken; the text has the seed and the last events."""


def card(name: str, mib: int) -> Device:
    """A declared device."""
    return Device(name, "default", mib, mib, None, "", "", None)


_POLICY = Policy(min_residency=8.0, max_swap_wait=12.0, drain_timeout=20.0)


@dataclass(frozen=True)
class Setting:
    """What is configured."""

    models: tuple[Model, ...]
    devices: tuple[Device, ...] = (card("gpu0", 24), card("gpu1", 24))
    edges: int = 3
    limits: Limits = field(default_factory=Limits)
    policy: Policy = _POLICY
    lease_ttl: float = 10.0
    control_grace: float = 60.0


class World:
    """See the module."""

    def __init__(self, seed: int, setting: Setting) -> None:
        self.seed, self.setting = seed, setting
        self.random = random.Random(seed)
        self.now = 0.0
        self.models = {model.name: model for model in setting.models}
        """The catalogue as configured now; limits may change while lifecycle runs."""
        self.network, self.machine, self.disk = Network(self), Machine(self), Disk()
        self.invariants = Invariants(self)
        self.edges = {f"edge{number}" for number in range(setting.edges)}
        """Their names; a killed one's successor has the same."""
        self.clients: list[Client] = []
        self.steps = 0
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count(1)
        self._trace: deque[tuple[float, str, str]] = deque(maxlen=KEPT)

    # --- time and chance ---------------------------------------------------------------------------------

    def at(self, when: float, event: Callable[[], object]) -> None:
        """Something will happen then, or now if that has passed."""
        heapq.heappush(self._heap, (max(when, self.now), next(self._numbers), event))

    def after(self, seconds: float, event: Callable[[], object]) -> None:
        """Something will happen so many seconds from now."""
        self.at(self.now + seconds, event)

    def count(self) -> int:
        """A number that rises."""
        return next(self._numbers)

    def run(self, seconds: float) -> None:
        """Lets so much time pass."""
        until = self.now + seconds
        try:
            while self._heap and self._heap[0][0] <= until:
                self.now, _, event = heapq.heappop(self._heap)
                event()
        except Exception as error:
            raise Violation(self.story(error)) from error
        self.now = until

    def drain(self, longest: float) -> None:
        """Lets everything end that is under way, which may take so many seconds: then nothing may be left."""
        until = self.now + longest
        while True:
            self.run(10.0)
            try:
                self.invariants.nothing_is_left()
            except AssertionError as error:
                if self.now >= until:
                    raise Violation(self.story(error)) from error
            else:
                return

    def stepped(self, process: Process) -> None:
        """A process has done something."""
        self.steps += 1
        self.invariants.look(process)

    # --- who is there ------------------------------------------------------------------------------------

    def start(self, name: str) -> None:
        """Starts a service, unless it runs."""
        if name in self.network.processes:
            return
        made: Process
        if name == "admission":
            made = Admission(self)
        elif name == "lifecycle":
            made = Lifecycle(self)
        else:
            made = Edge(self, name)
        self.note(name, "starts")
        self.network.processes[name] = made
        self.at(self.now, made.start)

    def start_all(self) -> None:
        """Starts what isn't there."""
        for name in ("lifecycle", "admission", *sorted(self.edges)):
            self.start(name)

    @property
    def admission(self) -> Admission | None:
        """The admission that runs."""
        found = self.network.processes.get("admission")
        return found if isinstance(found, Admission) else None

    @property
    def lifecycle(self) -> Lifecycle | None:
        """The lifecycle that runs."""
        found = self.network.processes.get("lifecycle")
        return found if isinstance(found, Lifecycle) else None

    def living_edges(self) -> list[Edge]:
        """The edges that take requests."""
        found = (self.network.processes.get(name) for name in sorted(self.edges))
        return [edge for edge in found if isinstance(edge, Edge) and edge.session and not edge.leaving]

    def set_limits(self, name: str, **limits: int) -> None:
        """Changes a model's limits while lifecycle runs."""
        self.models[name] = replace(self.models[name], **limits)  # type: ignore[arg-type]
        lifecycle = self.lifecycle
        if lifecycle is not None and lifecycle.fleet is not None:
            lifecycle.fleet.catalog = type(lifecycle.fleet.catalog)(dict(self.models))

    def servers(self) -> list[ModelServer]:
        """The model servers that run."""
        return list(self.machine.servers.values())

    # --- what is told ------------------------------------------------------------------------------------

    def note(self, who: str, what: str) -> None:
        """Keeps an event for the story of a failure."""
        self._trace.append((self.now, who, what))

    def tale(self) -> list[tuple[float, str, str]]:
        """The events that were kept, without what tells one process of the test from another."""
        return [event for event in self._trace if "session.open" not in event[2]]

    def story(self, error: Exception) -> str:
        """The failure, the seed, and what happened before."""
        lines = [f"{time:10.4f}  {who:10} {what}" for time, who, what in self._trace]
        words = f"{type(error).__name__}: {error}"
        head = f"{words}\nat {self.now:.4f} s; run it alone with: pytest tests/simulation --seed {self.seed}"
        return "\n".join([head, f"the last {len(lines)} events:", *lines, words])

    def _logged(self, _: object, level: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        words = event.pop("event")
        self.note(_process().name, f"log {level}: {words} {dict(event) or ''}")
        raise structlog.DropEvent


def _process() -> Process:
    """The process whose code runs."""
    loop: Any = asyncio.get_running_loop()
    process: Process = loop.process
    return process


class _Clock:
    """Stands for the module `time` in the chassis."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()


class _Tokens:
    """Stands for the module `secrets`: ids that a seed repeats."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    def token_hex(self, size: int) -> str:
        return self._dice.randbytes(size).hex()


@contextlib.contextmanager
def simulated(seed: int, setting: Setting) -> Iterator[World]:
    """A world. While it exists the services' clock, chance, network and logs are its own."""
    world = World(seed, setting)
    tokens = _Tokens(world.random)
    stand_ins = {
        "tidegate_chassis.process.time": _Clock,
        "tidegate_chassis.rpc.random": world.random,
        "tidegate_chassis.rpc.channel": lambda address: Channel(world.network, _process(), address),
        "tidegate_edge.session.secrets": tokens,
        "tidegate_lifecycle.fleet.secrets": tokens,
    }
    before = structlog.get_config()
    with contextlib.ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(name, stand_in))
        stack.callback(lambda: structlog.configure(**before))
        structlog.configure(
            processors=[world._logged], wrapper_class=structlog.make_filtering_bound_logger(logging.INFO)
        )
        try:
            yield world
        finally:
            for process in list(world.network.processes.values()):
                process.kill()
