"""Admission and lifecycle as processes: composed as their `__main__` does it, with a network and a machine
that are simulated. Everything between is the services' own code."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from tests.simulation.machine import FakeProbe, FakeRuntime, FakeStore
from tests.simulation.network import Server
from tests.simulation.process import Process
from tidegate.admission.v1 import admission_pb2_grpc
from tidegate.lifecycle.v1 import lifecycle_pb2_grpc
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.link import Link as LifecycleLink
from tidegate_admission.link import SupersededError
from tidegate_admission.metrics import Gaps
from tidegate_admission.service import Service
from tidegate_admission.timer import Timer
from tidegate_lifecycle.adoption import judge
from tidegate_lifecycle.catalog import Catalog
from tidegate_lifecycle.fleet import Fleet
from tidegate_lifecycle.keeper import Tools
from tidegate_lifecycle.link import Link as AdmissionLink
from tidegate_lifecycle.reconciler import Reconciler
from tidegate_lifecycle.service import LifecycleServicer

if TYPE_CHECKING:
    from tests.simulation.world import World


class Admission(Process):
    """One life of the admission service."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "admission")
        self.incarnation = world.random.getrandbits(62) | 1
        setting = world.setting
        self.dispatcher = Dispatcher(setting.limits, setting.lease_ttl, self.loop.time(), world.random.random)

    def fatal(self, error: Exception) -> None:
        """An exception came out of the core."""
        self.failure = error

    async def main(self) -> None:
        """As `tidegate_admission.__main__.serve`."""
        clock = self.loop.time
        service = Service(self.dispatcher, self.incarnation, clock, self.fatal)
        admission_pb2_grpc.add_AdmissionServiceServicer_to_server(service, Server(self))  # type: ignore[arg-type]
        link = LifecycleLink("lifecycle", self.incarnation, self.dispatcher, clock)
        timer = asyncio.create_task(Timer(self.dispatcher, Gaps(), clock).run())
        timer.add_done_callback(self._ended)
        try:
            await link.run()
        except SupersededError:
            self.world.note("admission", "is superseded, and ends")
            self.world.at(self.world.now, self.kill)
            self.world.after(1.0, functools.partial(self.world.start, self.name))


class Lifecycle(Process):
    """One life of the lifecycle service."""

    def __init__(self, world: World) -> None:
        super().__init__(world, "lifecycle")
        self.reconciler: Reconciler | None = None

    @property
    def fleet(self) -> Fleet | None:
        """Its state, once it has one."""
        return self.reconciler.fleet if self.reconciler is not None else None

    async def main(self) -> None:
        """As `tidegate_lifecycle.__main__.serve`."""
        disk, setting = self.world.disk, self.world.setting
        disk.boot += 1
        boot, devices = disk.boot, setting.devices
        store = FakeStore(self, disk)
        await asyncio.sleep(self.world.random.uniform(0.01, 0.3))
        runtime, probe = FakeRuntime(self, self.world.machine), FakeProbe(self.world.machine)
        catalog = Catalog(dict(self.world.models))
        link = AdmissionLink(boot, disk.roster)
        fleet = Fleet(catalog, setting.policy, Path(), boot, link, store, devices, dict(disk.loads))  # type: ignore[arg-type]
        self.reconciler = Reconciler(fleet)
        servicer = LifecycleServicer(self.reconciler, runtime)  # type: ignore[arg-type]
        lifecycle_pb2_grpc.add_LifecycleServiceServicer_to_server(servicer, Server(self))  # type: ignore[arg-type]
        await asyncio.sleep(self.world.random.uniform(0.01, 0.5))
        found = await judge(await runtime.list(), catalog, devices, probe)  # type: ignore[arg-type]
        await self.reconciler.run(Tools(runtime, probe, self.reconciler.post), found)  # type: ignore[arg-type]
