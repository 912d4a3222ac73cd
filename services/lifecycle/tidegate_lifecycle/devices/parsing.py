"""What nvidia-smi prints, as values or reasons. Pure.

A field that it can't tell is `[N/A]`, `[Not Supported]`, `[Insufficient Permissions]` (of a card in MIG mode,
inside a container), `[Unknown Error]` or `[GPU is lost]`; cards that share the machine's memory (GB10,
Jetson) have `[N/A]` for all of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from tidegate_lifecycle.devices.smi import Unreadable, printable

_FIELDS = "--query-gpu=index,uuid,name,memory.total,memory.used,memory.free"
_FORM = "--format=csv,noheader,nounits"
QUERY = (f"{_FIELDS},mig.mode.current", _FORM)
WITHOUT_MIG = (_FIELDS, _FORM)
"""For drivers that don't know the last field, and say so."""

_MIG_MODES = ("Enabled", "Disabled", "[N/A]", "N/A", "[Not Supported]")
_CARD = re.compile(r"GPU \d+: .*\(UUID: (?P<uuid>[^)\s]+)\)")
_PART = re.compile(r"\s+MIG (?P<profile>\S+)\s+Device\s+(?P<index>\d+):\s+\(UUID: (?P<uuid>MIG-[^)\s]+)\)")


@dataclass(frozen=True)
class Seen:
    """A card, or a part of one, as the driver shows it. MiB; a number, or None: `problem` says why."""

    number: str
    """The driver's index, such as 0; of a part with its own behind it, such as 0:1."""
    uuid: str
    name: str
    total: int | None
    used: int | None
    problem: str = ""
    parted: bool = False
    """In MIG mode: it has no memory of its own that could be used, its parts have."""

    @property
    def index(self) -> int:
        """The card's."""
        return int(self.number.partition(":")[0])


def parse(output: str) -> list[Seen]:
    """The lines of the query; Unreadable when there is none of the right form."""
    cards = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        mig = cells.pop() if cells[-1] in _MIG_MODES and len(cells) > 6 else ""
        if len(cells) < 6 or not _decimal(cells[0]) or not cells[1].isprintable() or not cells[1]:
            continue
        index, uuid, *name, total, used, free = cells
        cards.append(_card(index, uuid, ", ".join(name), (total, used, free), mig == "Enabled"))
    if not cards:
        shown = printable("".join(output.strip().splitlines()[:1]), 80)
        raise Unreadable(f"nvidia-smi shows no card, but {shown!r}" if shown else "nvidia-smi shows no card")
    for what, values in (("an index", [card.number for card in cards]), ("a UUID", _uuids(cards))):
        if len(set(values)) < len(values):
            raise Unreadable(f"nvidia-smi shows {what} twice")
    return cards


def _uuids(cards: Sequence[Seen]) -> list[str]:
    """Those that are names: a card whose UUID can't be told is known by its index."""
    return [card.uuid for card in cards if card.uuid]


def _card(index: str, uuid: str, name: str, cells: tuple[str, str, str], parted: bool) -> Seen:
    """What the numbers are worth: 1. a total; 2. a use within it; else the use by what is free."""
    uuid = "" if uuid.startswith("[") else uuid
    total, used, free = map(_number, cells)
    if parted:
        return Seen(index, uuid, name, None, None, f"card {index} is in MIG mode", True)
    if not total:  # 1
        why = f"the driver doesn't tell the memory of card {index} ({printable(name, 40)}: {_why(cells[0])})"
        return Seen(index, uuid, name, None, None, why)
    if used is None and free is not None:
        used = total - free
    if used is None or not 0 <= used <= total or (free is not None and free > total):  # 2
        why = f"the driver doesn't tell the use of card {index} ({_why(cells[1])})"
        return Seen(index, uuid, name, total, None, why)
    return Seen(index, uuid, name, total, used)


def _why(cell: str) -> str:
    return printable(cell, 40) or "nothing"


def _number(cell: str) -> int | None:
    number = cell.removesuffix(" MiB")
    return int(number) if _decimal(number) else None


def _decimal(text: str) -> bool:
    return text.isascii() and text.isdecimal()


@dataclass(frozen=True)
class _Memory:
    """Of a part: what the driver tells."""

    total: int | None
    used: int | None
    shared: bool
    """Other parts (compute instances) have the very same memory."""


def with_parts(cards: Sequence[Seen], listing: str, report: str) -> list[Seen]:
    """Cards in MIG mode replaced by their parts: names from `nvidia-smi -L`, memory from `nvidia-smi -q -x`,
    which has no UUIDs of parts: both number the parts of a card in the same way."""
    memories = _memories(report)
    seen: list[Seen] = []
    for card in cards:
        parts = _parts(card, listing) if card.parted else []
        for part in parts:
            own = part.number.partition(":")[2]
            seen.append(_with_memory(part, memories.get((card.uuid, own))))
        if not card.parted:
            seen.append(card)
        elif not parts:
            why = f"card {card.number} is in MIG mode and has no instances; make some, or turn the mode off"
            seen.append(Seen(card.number, card.uuid, card.name, None, None, why, True))
    return seen


def _parts(card: Seen, listing: str) -> list[Seen]:
    owner, parts = "", []
    for line in listing.splitlines():
        if found := _CARD.match(line):
            owner = found["uuid"]
        elif (found := _PART.match(line)) and owner == card.uuid:
            name = f"{card.name} MIG {found['profile']}"
            parts.append(Seen(f"{card.number}:{found['index']}", found["uuid"], name, None, None))
    return parts


def _with_memory(part: Seen, memory: _Memory | None) -> Seen:
    known = memory is not None and memory.total is not None and memory.used is not None
    if memory is None or not known:
        why = f"the driver doesn't tell the memory of the MIG instance {part.number}"
    elif memory.shared:
        why = f"the MIG instance {part.number} shares its memory with another one"
    else:
        return Seen(part.number, part.uuid, part.name, memory.total, memory.used)
    why += f"; declare it: {{id: {part.uuid}, memory: ...}}"
    return Seen(part.number, part.uuid, part.name, None, None, why)


def _memories(report: str) -> Mapping[tuple[str, str], _Memory]:
    """By the card's UUID and the part's own index."""
    try:
        root = ElementTree.fromstring(report)  # noqa: S314 - a local program's, and expat bounds expansions
    except ElementTree.ParseError as error:
        raise Unreadable(f"nvidia-smi -q -x prints no XML ({error})") from error
    found = {}
    for gpu in root.iter("gpu"):
        parts = list(gpu.iter("mig_device"))
        owners = Counter(part.findtext("gpu_instance_id", "").strip() for part in parts)
        for part in parts:
            total = _number(part.findtext("fb_memory_usage/total", "").strip())
            used = _number(part.findtext("fb_memory_usage/used", "").strip())
            shared = owners[part.findtext("gpu_instance_id", "").strip()] > 1
            key = gpu.findtext("uuid", "").strip(), part.findtext("index", "").strip()
            found[key] = _Memory(total or None, used, shared)
    return found
