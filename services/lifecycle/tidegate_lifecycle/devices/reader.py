"""The cards: declared in the configuration, or read from the driver through nvidia-smi.

Every field that is read is a value or a reason: a 0 or an unreadable number is a problem that status shows,
never silently a card without memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

import structlog

from tidegate_chassis.config import ConfigError, Problem
from tidegate_lifecycle.catalog import DeviceSpec
from tidegate_lifecycle.devices.device import Device
from tidegate_lifecycle.devices.smi import DEADLINE, HostSmi, Unreadable, printable

log = structlog.get_logger("tidegate.devices")

QUERY = (
    "--query-gpu=index,uuid,name,memory.total,memory.used,memory.free",
    "--format=csv,noheader,nounits",
)
BACKOFF = (0.5, 1.0)
"""Seconds before the second and the third try."""
_HELP = (
    "declare the cards under lifecycle.devices, each with id and memory (such as {id: gpu0, memory: 24GiB}),"
    " or make nvidia-smi work here"
)


@dataclass(frozen=True)
class _Card:
    """A line of nvidia-smi, each number or None; `problem` says what is wrong with them."""

    index: int
    uuid: str
    name: str
    total: int | None
    used: int | None
    problem: str


class Devices:
    """Reads the cards; without specs all that nvidia-smi shows. For declared memory alone it isn't run."""

    def __init__(
        self, specs: Sequence[DeviceSpec], deadline: float = DEADLINE, backoff: Sequence[float] = BACKOFF
    ) -> None:
        self._smi = HostSmi()
        self._specs = tuple(specs)
        self._deadline = deadline
        self._backoff = tuple(backoff)
        self._last: list[Device] = []
        self._reading: asyncio.Task[list[_Card]] | None = None

    async def open(self) -> list[Device]:
        """Reads them, with retries. ConfigError, saying what to do, when one that is needed can't be read."""
        cards: list[_Card] = []
        if self._asks_driver:
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
            words = "; ".join(f"{device.id}: {device.problem}" for device in self._last)
            raise ConfigError([Problem("lifecycle.devices", f"no device can be read: {words}; {_HELP}")])
        return self._last

    async def read(self) -> list[Device]:
        """The cards as they are now; when they can't be read, as they were, with the problem."""
        if not self._asks_driver:
            return self._last
        try:
            now = self._match(await self._cards(), [])
        except Unreadable as error:
            self._last = [self._stale(device, str(error)) for device in self._last]
            return self._last
        seen = {device.id: device for device in now if device.total_mib or device.index is None}
        gone = "nvidia-smi doesn't show it, or not its memory, any more"
        self._last = [seen.get(device.id) or self._stale(device, gone) for device in self._last]
        return self._last

    @property
    def _asks_driver(self) -> bool:
        return not self._specs or any(spec.memory_mib is None for spec in self._specs)

    def _stale(self, device: Device, problem: str) -> Device:
        return device if device.index is None else replace(device, problem=problem)

    async def _cards(self) -> list[_Card]:
        """One nvidia-smi at a time: a driver that hangs must not collect a heap of them."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._query())
        return await asyncio.shield(self._reading)

    async def _query(self) -> list[_Card]:
        return parse(await self._smi.ask(*QUERY, deadline=self._deadline))

    def _match(self, cards: Sequence[_Card], problems: list[Problem]) -> list[Device]:
        if not self._specs:
            return [_device(DeviceSpec(str(card.index)), card) for card in cards]
        devices, taken = [], set()
        for i, spec in enumerate(self._specs):
            path = f"lifecycle.devices.{i}"
            if spec.memory_mib is not None:
                devices.append(_device(spec, None))
                continue
            wanted = spec.id.strip().lower()
            card = next((one for one in cards if wanted in (str(one.index), one.uuid.lower())), None)
            if card is None:
                there = ", ".join(f"{one.index} ({one.uuid})" for one in cards)
                problems.append(
                    Problem(
                        path, f"no card has the index or UUID {spec.id!r}; there are {there}. Or give memory"
                    )
                )
            elif card.index in taken:
                problems.append(Problem(path, f"the card {card.index} ({card.uuid}) is listed twice"))
            elif not card.total:
                problems.append(Problem(path, f"{card.problem}; give its memory"))
            else:
                taken.add(card.index)
                devices.append(_device(spec, card))
        return devices


def parse(output: str) -> list[_Card]:
    """The lines of nvidia-smi; Unreadable when there is no line of the right form."""
    cards = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) < 6 or not cells[0].isdecimal() or not cells[1].isprintable() or not cells[1]:
            continue
        index, uuid, *name, total, used, free = cells
        cards.append(_card(int(index), uuid, ", ".join(name), _number(total), _number(used), _number(free)))
    if not cards:
        first = output.strip().splitlines()[:1]
        shown = printable("".join(first), 80)
        raise Unreadable(f"nvidia-smi shows no card, but {shown!r}" if shown else "nvidia-smi shows no card")
    if len({card.index for card in cards}) < len(cards):
        raise Unreadable("nvidia-smi shows an index twice")
    return cards


def _card(index: int, uuid: str, name: str, total: int | None, used: int | None, free: int | None) -> _Card:
    """What the numbers are worth: 1. a total; 2. a use within it; else the use by what is free."""
    if not total:  # 1
        return _Card(index, uuid, name, None, None, f"the driver doesn't tell the memory of card {index}")
    if used is None and free is not None:
        used = total - free
    if used is None or not 0 <= used <= total or (free is not None and free > total):  # 2
        return _Card(index, uuid, name, total, None, f"the driver doesn't tell the use of card {index}")
    return _Card(index, uuid, name, total, used, "")


def _number(cell: str) -> int | None:
    number = cell.removesuffix(" MiB")
    return int(number) if number.isascii() and number.isdecimal() else None


def _device(spec: DeviceSpec, card: _Card | None) -> Device:
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

