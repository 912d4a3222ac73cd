"""What else happens on the cards of a server while it is measured, and what was used before it started.
Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tidegate_lifecycle.footprints.verdict import Discarded
from tidegate_lifecycle.instance import Instance, InstanceState

FRESH = 60.0
"""Seconds for which a reading of a card can be the base of a start."""
_AT_REST = (InstanceState.READY, InstanceState.DRAINING, InstanceState.SLEEPING)

Others = frozenset[tuple[str, bool]]
"""Other servers on some cards: each with whether it sleeps."""


@dataclass(frozen=True)
class Reading:
    """What the driver said of a card, when the memory of servers that had ended was settled."""

    used: int
    began: float
    """When it was asked, monotonic seconds."""


@dataclass(frozen=True)
class Base:
    """What was used of each card before a server started."""

    used: Mapping[str, int]
    others: Others
    began: float
    """Of the oldest of these readings."""

    def holds(self, around: Others, freed: Mapping[str, float]) -> bool:
        """Nothing of ours has come, gone, fallen asleep or woken up on its cards since, but the server
        itself."""
        return self.others == around and all(freed.get(card, -math.inf) < self.began for card in self.used)


def others(cards: Sequence[str], instances: Iterable[Instance], but: str) -> Others:
    """The servers on these cards, `but` aside. Discarded when one of them takes memory, or gives it back."""
    found = set()
    for instance in instances:
        if instance.id == but or not instance.exists or not set(instance.devices) & set(cards):
            continue
        if instance.state not in _AT_REST:
            text = f"{instance.id} is {instance.state.name.lower().replace('_', ' ')} on the same card"
            raise Discarded("changed", text)
        found.add((instance.id, instance.state is InstanceState.SLEEPING))
    return frozenset(found)


def base(
    instance: Instance,
    instances: Iterable[Instance],
    readings: Mapping[str, Reading],
    freed: Mapping[str, float],
    now: float,
) -> Base | None:
    """The base of a start that is ordered now; None when what is known of its cards is old, or before the
    last change there."""
    around = [other for other in instances if other.exists and other.id != instance.id]
    used: dict[str, int] = {}
    oldest = math.inf
    for card in instance.devices:
        reading = readings.get(card)
        if reading is None or now - reading.began > FRESH:
            return None
        came = (_at_rest_since(other) for other in around if card in other.devices)
        if reading.began <= max((freed.get(card, -math.inf), *came)):
            return None
        used[card], oldest = reading.used, min(oldest, reading.began)
    try:
        there = others(instance.devices, around, instance.id)
    except Discarded:
        return None
    return Base(used, there, oldest)


def _at_rest_since(other: Instance) -> float:
    """When it last took memory or gave some back."""
    taken = other.ready_at if other.ready_at is not None else other.since
    return other.since if other.state is InstanceState.SLEEPING else taken


def check(
    instance: Instance,
    instances: Iterable[Instance],
    freed: Mapping[str, float],
    since: float,
    before: Others,
) -> None:
    """Discarded when the server is gone, or another one began or ended on its cards after `since`."""
    if instance.state not in (InstanceState.READY, InstanceState.DRAINING):
        raise Discarded("gone", "the server doesn't run any more", again=False)
    left = [card for card in instance.devices if freed.get(card, -math.inf) >= since]
    if left:
        raise Discarded("changed", f"another server ended on {', '.join(left)} meanwhile")
    if others(instance.devices, instances, instance.id) != before:
        raise Discarded("changed", "the servers on the same card changed meanwhile")
