"""A card, with what is known of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_UUID = re.compile(r"(GPU|MIG)-[0-9A-Za-z-]+")


@dataclass(frozen=True)
class Device:
    """A card, or a part of one (MIG). Memory in MiB."""

    id: str
    pool: str
    total_mib: int
    """0 = unknown, and then nothing can be placed there; see `problem`."""
    budget_mib: int
    """What may be used of it: total times budget."""
    index: int | None
    """The driver's index; None = declared. Changes when another card vanishes."""
    uuid: str
    """The driver's name for it, which never changes; empty = declared, or not told."""
    name: str
    """The product; of a part of a card also which part."""
    used_mib: int | None
    """What the driver says is used now, by anybody; None = unknown."""
    problem: str = ""
    """Why it can't be read now; empty = it can, or it is declared."""
    since: float | None = None
    """Since when there is that problem, monotonic seconds; None = there is none, or since the start."""
    missing: bool = False
    """The driver answers, and doesn't show it: nothing is placed there."""

    @property
    def key(self) -> str:
        """What outlasts this process knows it by this: an index may be another card's after a restart."""
        return self.uuid or self.id

    @property
    def visible_as(self) -> str:
        """How CUDA_VISIBLE_DEVICES names it.

        A declared one is a card of the driver if its id is a UUID; else it has no such name.
        """
        if self.index is None:
            return self.id if _UUID.fullmatch(self.id) else ""
        return self.uuid or str(self.index)


def find(devices: Iterable[Device], name: str) -> Device | None:
    """The one of that UUID, or of that id."""
    known = list(devices)
    by_key = (device for device in known if device.key == name)
    return next(by_key, next((device for device in known if device.id == name), None))
