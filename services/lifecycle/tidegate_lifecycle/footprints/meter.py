"""Takes the samples: asks the driver and the runtime, off the event loop, and changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tidegate_chassis.process import monotonic
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.devices import Device, Devices, Smi, Unreadable
from tidegate_lifecycle.footprints.apps import App, apps, own_use
from tidegate_lifecycle.footprints.need import needed
from tidegate_lifecycle.footprints.record import FILLS, MEASURED, Footprint, reserve, signature
from tidegate_lifecycle.footprints.scene import Base, check, others
from tidegate_lifecycle.footprints.settings import FootprintSettings
from tidegate_lifecycle.footprints.verdict import Discarded, Sample, Taken, verdict
from tidegate_lifecycle.instance import Instance
from tidegate_lifecycle.messages import DevicesRead
from tidegate_lifecycle.runtimes.base import Runtime, Server

LOG_LINES = 10_000
"""Of a server's log, from its end: what it says of its memory is from its start."""


@dataclass(frozen=True)
class Subject:
    """Who is measured, and what else there is; all of it live."""

    instance: Instance
    model: Model
    """As it was when the server was started."""
    server: Server
    asked: bool
    """It was given an amount, not a whole card for want of any."""
    base: Base | None
    instances: Callable[[], Iterable[Instance]]
    freed: Mapping[str, float]
    post: Callable[[DevicesRead], None]
    """Each reading is told: it may be the base of the next start."""


class Meter:
    """Measures one server at a time."""

    def __init__(self, devices: Devices, smi: Smi, runtime: Runtime, settings: FootprintSettings) -> None:
        self.settings = settings
        self._devices, self._smi, self._runtime = devices, smi, runtime
        self._one = asyncio.Lock()

    async def measure(self, subject: Subject) -> Footprint:
        """Its footprint, some seconds later. Discarded when it can't be told now."""
        instance = subject.instance
        pause = (instance.ready_at or instance.since) + self.settings.settle - monotonic()
        await asyncio.sleep(max(0.0, pause))
        async with self._one:
            devices, taken = await self._take(subject)
        log = await self._runtime.tail(subject.model.name, LOG_LINES) if subject.model.engine in FILLS else []
        mib = needed(subject.model, taken.mib, log, subject.asked)
        fills = subject.model.engine in FILLS
        limit = instance.reserved_mib if fills else min(device.budget_mib for device in devices)
        kind, count = devices[0].name, len(devices)
        return Footprint(
            model=subject.model.name,
            signature=signature(subject.model, kind, count),
            kind=kind,
            count=count,
            mib=mib,
            reserve_mib=reserve(mib, limit),
            confidence=taken.confidence,
            samples=taken.samples,
            source=MEASURED,
            at=time.time(),
        )

    async def _take(self, subject: Subject) -> tuple[list[Device], Taken]:
        instance, since = subject.instance, monotonic()
        around = others(instance.devices, subject.instances(), instance.id)
        samples: dict[str, list[Sample]] = {card: [] for card in instance.devices}
        devices: list[Device] = []
        for n in range(self.settings.samples):
            await asyncio.sleep(self.settings.spacing if n else 0)
            look = await self._look(subject)
            check(instance, subject.instances(), subject.freed, since, around)
            for device, own in look:
                samples[device.id].append(Sample(device.total_mib, device.used_mib or 0, own))
            devices = [device for device, _ in look] or devices
        taken = min(len(of) for of in samples.values())
        if taken * 2 <= self.settings.samples:
            raise Discarded("unreadable", f"{taken} of {self.settings.samples} samples could be read")
        base = subject.base
        if base is not None and not base.holds(around, subject.freed):
            base = None
        return devices, verdict(samples, base.used if base else None, self.settings.min_confidence)

    async def _look(self, subject: Subject) -> list[tuple[Device, int | None]]:
        """One sample of all its cards, each with what its own processes use; empty = they can't be read."""
        began = monotonic()
        shown = await self._devices.read()
        subject.post(DevicesRead(tuple(shown), began))
        found = [device for device in shown if device.id in subject.instance.devices]
        if any(device.problem or device.used_mib is None for device in found):
            return []
        listed: list[App] = []
        try:
            listed = await apps(self._smi)
        except Unreadable:  # then the difference to the base has to do
            return [(device, None) for device in found]
        pids = await self._runtime.processes(subject.server)
        return [(device, own_use(listed, device.uuid, pids)) for device in found]
