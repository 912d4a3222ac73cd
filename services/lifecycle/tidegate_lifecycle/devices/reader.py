"""Reads the cards: those of the configuration, or all that nvidia-smi shows.

A card is known by its UUID: the driver's order and indexes change when another card vanishes. Every field is
a value or a reason: what can't be read is a problem that status shows, never silently a card without memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from tidegate_chassis.config import ConfigError, Problem
from tidegate_chassis.process import monotonic
from tidegate_lifecycle.catalog import DeviceSpec
from tidegate_lifecycle.devices.device import Device
from tidegate_lifecycle.devices.parsing import QUERY, WITHOUT_MIG, Seen, parse, with_parts
from tidegate_lifecycle.devices.smi import DEADLINE, HostSmi, Smi, Unreadable

log = structlog.get_logger("tidegate.devices")

BACKOFF = (0.5, 1.0)
"""Seconds before the second and the third try at the start."""
_HELP = (
    "declare the cards under lifecycle.devices, each with id and memory (such as {id: gpu0, memory: 24GiB}),"
    " or make nvidia-smi work here"
)
_MEMINFO = Path("/proc/meminfo")


class Devices:
    """Reads the cards; without specs all that nvidia-smi shows. For declared memory alone it isn't run."""

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        smi: Smi | None = None,
        deadline: float = DEADLINE,
        backoff: Sequence[float] = BACKOFF,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._specs = tuple(specs)
        self._smi = smi or HostSmi()
        self._deadline = deadline
        self._backoff = tuple(backoff)
        self._clock = clock
        self._last: list[Device] = []
        self._fields = QUERY
        self._reading: asyncio.Task[list[Seen]] | None = None

    @property
    def every(self) -> float:
        """Seconds that should pass between two readings at least."""
        return self._smi.every

    @property
    def asks_driver(self) -> bool:
        """At least one card's memory isn't declared."""
        return not self._specs or any(spec.memory_mib is None for spec in self._specs)

    async def open(self) -> list[Device]:
        """Reads them, with retries. ConfigError, saying what to do, when one that is needed can't be read."""
        cards: list[Seen] = []
        if self.asks_driver:
            for pause in (*self._backoff, None):
                try:
                    cards = await self._cards()
                    break
                except Unreadable as error:
                    if pause is None:
                        reason = f"no device can be read: {error}; {_HELP}"
                        raise ConfigError([Problem("lifecycle.devices", reason)]) from error
                    log.warning("devices.unreadable", error=str(error), again_in=pause)
                    await asyncio.sleep(pause)
        problems: list[Problem] = []
        self._last = self._match(cards, problems)
        if problems:
            raise ConfigError(problems)
        if not any(device.total_mib for device in self._last):
            words = "; ".join(device.problem for device in self._last)
            text = f"no device can be read: {words}; {_HELP}{await _hint()}"
            raise ConfigError([Problem("lifecycle.devices", text)])
        for device in self._last:
            if device.problem:
                log.warning("device.problem", device=device.id, uuid=device.uuid, why=device.problem)
        return self._last

    async def read(self) -> list[Device]:
        """The cards as they are now.

        1. nvidia-smi gives nothing: as they were, with the problem and since when.
        2. One that it doesn't show any more is missing.
        3. One whose memory it doesn't tell any more keeps what it had, with the problem.
        """
        if not self.asks_driver:
            return self._last
        try:
            seen = await self._cards()
        except Unreadable as error:  # 1
            now = self._clock()
            self._last = [_stale(device, str(error), now) for device in self._last]
            return self._last
        now = self._clock()
        self._last = [self._updated(device, seen, now) for device in self._last]
        return self._last

    def _updated(self, device: Device, seen: Sequence[Seen], now: float) -> Device:
        if device.index is None:
            return device
        card = next((one for one in seen if _same(device, one)), None)
        if card is None:  # 2
            gone = "nvidia-smi doesn't show it any more; what runs on it is kept while it answers"
            return replace(_stale(device, gone, now), missing=True)
        if not card.total:  # 3
            return replace(_stale(device, card.problem, now), missing=False, index=card.index)
        budget = device.budget_mib
        if card.total != device.total_mib:
            budget = int(card.total * self._share(device))
        return replace(
            device,
            index=card.index,
            total_mib=card.total,
            budget_mib=budget,
            used_mib=card.used,
            problem=card.problem,
            since=_since(device, now) if card.problem else None,
            missing=False,
        )

    def _share(self, device: Device) -> float:
        spec = next((spec for spec in self._specs if spec.id == device.id), DeviceSpec(device.id))
        return spec.budget

    async def close(self) -> None:
        """Leaves nothing behind."""
        if self._reading is not None:
            self._reading.cancel()
        await self._smi.close()

    async def _cards(self) -> list[Seen]:
        """One nvidia-smi at a time: a driver that hangs must not collect a heap of them."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._query())
        return await asyncio.shield(self._reading)

    async def _query(self) -> list[Seen]:
        cards = parse(await self._table())
        if not any(card.parted for card in cards):
            return cards
        listing = await self._smi.ask("-L", deadline=self._deadline)
        return with_parts(cards, listing, await self._smi.ask("-q", "-x", deadline=self._deadline))

    async def _table(self) -> str:
        try:
            return await self._smi.ask(*self._fields, deadline=self._deadline)
        except Unreadable as error:
            if self._fields is WITHOUT_MIG or "mig.mode" not in str(error):
                raise
        self._fields = WITHOUT_MIG  # a driver from before there was MIG
        return await self._smi.ask(*self._fields, deadline=self._deadline)

    def _match(self, cards: Sequence[Seen], problems: list[Problem]) -> list[Device]:
        if not self._specs:
            return [_device(DeviceSpec(card.number), card) for card in cards]
        devices: list[Device] = []
        taken: set[str] = set()
        for i, spec in enumerate(self._specs):
            path = f"lifecycle.devices.{i}"
            if spec.memory_mib is not None:
                devices.append(_device(spec, None))
                continue
            wanted = spec.id.strip().lower()
            card = next((one for one in cards if wanted in (one.number, one.uuid.lower())), None)
            if card is None:
                there = ", ".join(f"{one.number} ({one.uuid})" for one in cards)
                text = f"no card has the index or UUID {spec.id!r}; there are {there}. Or give memory"
                problems.append(Problem(path, text))
            elif card.number in taken:
                problems.append(Problem(path, f"the card {card.number} ({card.uuid}) is listed twice"))
            elif not card.total:
                problems.append(Problem(path, f"{card.problem}; give its memory"))
            else:
                taken.add(card.number)
                devices.append(_device(spec, card))
        return devices


def _stale(device: Device, problem: str, now: float) -> Device:
    return device if device.index is None else replace(device, problem=problem, since=_since(device, now))


def _since(device: Device, now: float) -> float | None:
    return device.since if device.problem else now


def _same(device: Device, card: Seen) -> bool:
    return device.uuid == card.uuid if device.uuid else device.index == card.index


async def _hint() -> str:
    """For cards that share the machine's memory, whose driver tells none: how to declare it, and how much."""
    total = await asyncio.to_thread(machine_mib)
    return (
        f". A card that shares the machine's memory ({total} MiB) is declared with a part of that, and"
        " with its UUID as id: by that its servers find it"
    )


def machine_mib(meminfo: Path = _MEMINFO) -> int:
    """The machine's memory in MiB; 0 = unknown."""
    try:
        words = meminfo.read_text().split()
        return int(words[words.index("MemTotal:") + 1]) // 1024
    except (OSError, ValueError, IndexError):
        return 0


def _device(spec: DeviceSpec, card: Seen | None) -> Device:
    total = spec.memory_mib or 0 if card is None else card.total or 0
    return Device(
        id=spec.id,
        pool=spec.pool,
        total_mib=total,
        budget_mib=int(total * spec.budget),
        index=card.index if card else None,
        uuid=card.uuid if card else "",
        name=card.name if card else "",
        used_mib=card.used if card else None,
        problem=card.problem if card else "",
    )
