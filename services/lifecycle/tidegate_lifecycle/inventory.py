"""The devices as the fleet knows them: last readings, memory, and what an operator has taken back.

Pure: the reconciler calls it with what it was told; what it returns are events for people.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from tidegate_lifecycle.budget import Card
from tidegate_lifecycle.devices.device import Device, find
from tidegate_lifecycle.devices.memory import SETTLE, CardMemory, Ours
from tidegate_lifecycle.instance import Instance, InstanceState

Events = list[tuple[str, str]]
"""Kind and words of each."""


class Inventory:
    """One `CardMemory` for each device that the driver can read; declared ones have what was declared."""

    def __init__(self, devices: Iterable[Device], taken: Collection[str] = ()) -> None:
        self.devices = {device.id: device for device in devices}
        self.taken = set(taken)
        """Keys of devices that an operator has taken back, those that aren't there now included."""
        self.freed: dict[str, float] = {}
        """When a server of ours last left a device."""
        self._memory = {device.id: CardMemory() for device in self.devices.values()}

    def cards(self) -> tuple[Card, ...]:
        """The devices as the planner sees them."""
        return tuple(self._card(device) for device in self.devices.values())

    def find(self, name: str) -> Device | None:
        """By id, or by UUID."""
        return find(self.devices.values(), name)

    def take_back(self, device: Device, taken: bool) -> Events:
        """An operator takes it, or gives it back."""
        if (device.key in self.taken) == taken:
            return []
        if taken:
            self.taken.add(device.key)
            return [("device_taken", f"{device.id} was taken back by an operator")]
        self.taken.discard(device.key)
        return [("device_given", f"{device.id} was given back by an operator")]

    def read(self, devices: Iterable[Device], began: float, instances: Collection[Instance]) -> Events:
        """Takes in readings that were begun then."""
        events: Events = []
        for device in devices:
            before = self.devices[device.id]
            self.devices[device.id] = device
            if device.problem != before.problem:
                words = device.problem or "it can be read again"
                events.append(("device_problem" if device.problem else "device_readable", _of(device, words)))
            if device.total_mib != before.total_mib:
                words = f"its memory is {device.total_mib} MiB now, not {before.total_mib}"
                events.append(("device_changed", _of(device, words)))
            if device.used_mib is not None and not device.problem:
                self._memory[device.id].read(device.used_mib, began, _ours(device.id, instances))
        return events

    def gone(self, instance: Instance, now: float) -> None:
        """A server has gone. Where the driver tells what is used, it must show that memory free first."""
        for name in instance.devices:
            device = self.devices.get(name)
            self.freed[name] = now
            if device is not None and device.used_mib is not None:
                self._memory[name].gone(instance.reserved_mib, now)

    def settle(self, instances: Collection[Instance], now: float) -> Events:
        """Ends what has settled for too long."""
        events: Events = []
        for name, memory in self._memory.items():
            overdue = memory.settle(_ours(name, instances), now)
            if overdue is None:
                continue
            words = f"{overdue.mib} MiB of servers that ended on {name} "
            words += (
                f"are still in use after {SETTLE:g} s: they count as others'"
                if overdue.seen
                else f"can't be verified: no reading within {SETTLE:g} s; they are taken as free"
            )
            events.append(("unsettled", words))
        return events

    @property
    def settling(self) -> bool:
        """Something waits for the driver's word."""
        return any(memory.settling for memory in self._memory.values())

    @property
    def bound(self) -> float:
        """When something settles no longer, though nothing is heard; inf = nothing settles."""
        return min((memory.bound for memory in self._memory.values()), default=math.inf)

    def _card(self, device: Device) -> Card:
        memory = self._memory[device.id]
        return Card(
            device.id,
            device.pool,
            device.total_mib,
            device.budget_mib,
            memory.foreign,
            device.name,
            settling_mib=memory.settling,
            settles=0.0 if device.used_mib is None else SETTLE,
            draining=device.key in self.taken,
            missing=device.missing,
            part=device.visible_as.startswith("MIG-"),
        )


def _ours(device: str, instances: Iterable[Instance]) -> Ours:
    loading = (InstanceState.STARTING, InstanceState.WAKING)
    here = [item for item in instances if device in item.devices]
    return Ours(
        sum(item.reserved_mib for item in here if item.state not in loading),
        sum(item.reserved_mib for item in here if item.state in loading),
    )


def _of(device: Device, words: str) -> str:
    return f"{device.id}: {words}"


def names(devices: Sequence[Device]) -> str:
    """For people: which there are."""
    return ", ".join(f"{one.id} ({one.uuid})" if one.uuid else one.id for one in devices) or "none"
