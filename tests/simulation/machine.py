"""The machine on which lifecycle starts model servers, and its disk: both outlive the processes.

`FakeRuntime`, `FakeProbe` and `FakeStore` stand for lifecycle's process runtime, HTTP probe and SQLite file.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.simulation.process import Process
from tidegate_lifecycle.probes import Health, Load
from tidegate_lifecycle.runtimes.base import StartSpec

if TYPE_CHECKING:
    from tests.simulation.edge import Relay
    from tests.simulation.world import World


@dataclass(eq=False)
class ModelServer:
    """A model server: the truth about it, which only the invariants see as a whole."""

    spec: StartSpec
    pid: int
    began: float
    ready_at: float
    """When it will answer; infinite = never."""
    ends_at: float
    """When it dies by itself before it is ready; infinite = it doesn't."""
    alive: bool = True
    hung: bool = False
    """It runs and answers nothing."""
    was_ready: bool = False
    stopping: bool = False
    end: str = ""
    requests: set[Relay] = field(default_factory=set)
    """The requests that it is serving."""
    watchers: list[tuple[Process, asyncio.Future[None]]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.spec.instance_id

    @property
    def model(self) -> str:
        return self.spec.model


class Machine:
    """Runs model servers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.servers: dict[str, ModelServer] = {}
        """By instance, those that run."""
        self.ended: dict[str, float] = {}
        """By instance, when those that ran ended."""
        self.load_time = (2.0, 8.0)
        """Seconds that a start takes, at least and at most."""
        self.failing = 0.0
        """Share of the starts that fail."""
        self.hanging = 0.0
        """Share of the starts that never end."""
        self._by_address: dict[str, ModelServer] = {}
        self._port = 9000

    def endpoint(self) -> tuple[str, int]:
        """A free port."""
        self._port += 1
        return "127.0.0.1", self._port

    def begin(self, spec: StartSpec) -> ModelServer:
        """A server is started."""
        dice, now = self.world.random, self.world.now
        ready, ends = now + dice.uniform(*self.load_time), float("inf")
        if dice.random() < self.failing:
            ready, ends = float("inf"), now + dice.uniform(0.1, 5.0)
        elif dice.random() < self.hanging:
            ready = float("inf")
        server = ModelServer(spec, self.world.count(), now, ready, ends)
        self.servers[server.id] = self._by_address[spec.address] = server
        self.world.note("server", f"{server.id} starts on {','.join(spec.device_ids)}")
        if ends < float("inf"):
            self.world.at(ends, functools.partial(self.end, server, "exit status 1"))
        return server

    def at(self, address: str) -> ModelServer | None:
        """The server that answers there."""
        server = self._by_address.get(address)
        if server is None or not server.alive or server.stopping or server.hung:
            return None
        return server if self.world.now >= server.ready_at else None

    def stop(self, server: ModelServer) -> None:
        """SIGTERM: it breaks its requests off, and is gone a little later."""
        if not server.alive or server.stopping:
            return
        self.world.invariants.nobody_is_stopped_in_use(server)
        server.stopping = True
        self.world.note("server", f"{server.id} is told to end, with {len(server.requests)} requests")
        self._break(server)
        ends = self.world.now + self.world.random.uniform(0.1, 2.0)
        self.world.at(ends, functools.partial(self.end, server, "signal 15"))

    def end(self, server: ModelServer, how: str) -> None:
        """It is gone."""
        if not server.alive:
            return
        server.alive, server.end = False, how
        self.ended[server.id] = self.world.now
        self.world.note("server", f"{server.id} is gone ({how})")
        del self.servers[server.id]
        self._break(server)
        for process, future in server.watchers:
            process.post(lambda future=future: None if future.done() else future.set_result(None))

    def _break(self, server: ModelServer) -> None:
        for relay in sorted(server.requests, key=lambda relay: relay.number):
            relay.broke()
        server.requests.clear()


class Handle:
    """A server as lifecycle's runtime hands it out (`runtimes.base.Server`)."""

    def __init__(self, process: Process, server: ModelServer) -> None:
        spec = server.spec
        self.truth, self._process = server, process
        self.instance_id, self.model, self.signature = spec.instance_id, spec.model, spec.signature
        self.address, self.device_ids, self.reserved_mib = spec.address, spec.device_ids, spec.reserved_mib
        self.pid, self.was_ready = server.pid, server.was_ready
        self.age = process.world.now - server.began

    async def exited(self) -> str:
        """Waits until it has ended."""
        if self.truth.alive:
            future = asyncio.get_running_loop().create_future()
            self.truth.watchers.append((self._process, future))
            await future
        return self.truth.end


class FakeRuntime:
    """`runtimes.base.Runtime` on the simulated machine, for one lifecycle process."""

    def __init__(self, process: Process, machine: Machine) -> None:
        self._process, self._machine = process, machine

    async def endpoint(self) -> tuple[str, int]:
        return self._machine.endpoint()

    async def start(self, spec: StartSpec) -> Handle:
        """A kill in the middle leaves either no server, or one that `list` finds."""
        await self._pause()
        server = self._machine.begin(spec)
        await self._pause()
        return Handle(self._process, server)

    async def mark_ready(self, server: Handle) -> None:
        await self._pause()
        if self._process.alive:
            server.truth.was_ready = True

    async def stop(self, server: Handle, grace: float) -> None:
        if self._process.alive:
            self._machine.stop(server.truth)
        await server.exited()

    async def list(self) -> list[Handle]:
        return [Handle(self._process, server) for server in self._machine.servers.values()]

    async def tail(self, model: str, lines: int) -> Sequence[str]:
        return []

    async def _pause(self) -> None:
        await asyncio.sleep(self._machine.world.random.uniform(0.001, 0.05))


class FakeProbe:
    """`probes.Probe`: asks the simulated servers."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def get(self, address: str, path: str, timeout: float) -> Health:
        await asyncio.sleep(0.005)
        answers = self._machine.at(address) is not None
        return Health(answers, "" if answers else "no connection")

    async def load(self, address: str, timeout: float) -> Load:
        await asyncio.sleep(0.005)
        server = self._machine.at(address)
        return Load(len(server.requests), 0) if server is not None else Load(None, None)


class Disk:
    """What lifecycle has written down."""

    def __init__(self) -> None:
        self.boot = 0
        self.roster: list[str] | None = []
        """As in the store: of a first boot, empty."""
        self.loads: dict[str, float] = {}


class FakeStore:
    """`store.Store` on the simulated disk. A write takes time; what a killed process wrote last is lost."""

    def __init__(self, process: Process, disk: Disk) -> None:
        self._process, self._disk = process, disk

    async def set_roster(self, roster: Sequence[str]) -> None:
        if await self._written():
            self._disk.roster = list(roster)

    async def record_load(self, model: str, seconds: float) -> float:
        mean = self._disk.loads.get(model, seconds) * 0.7 + seconds * 0.3
        if await self._written():
            self._disk.loads[model] = mean
        return mean

    async def _written(self) -> bool:
        await asyncio.sleep(self._process.world.random.uniform(0.001, 0.03))
        return self._process.alive
