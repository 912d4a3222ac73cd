"""How long a model's turn takes at the latest. Pure; part of the planner."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tidegate_lifecycle.budget import Intent
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.victims import Victims
from tidegate_lifecycle.world import STOP_TIME, Start, World

_LEAVING = (InstanceState.DRAINING, InstanceState.STOPPING)


def bound(
    world: World,
    victims: Victims,
    intent: Intent,
    begins: float,
    ahead: Iterable[float | None],
    starts: Iterable[Start],
) -> float | None:
    """Seconds until the intent's model serves at the latest; None = unknown.

    It is the sum of: the longest of the bounds `ahead` of it on its cards; the time until its victims are
    told, at `begins`; a start in progress there, or ordered by this plan (`starts`); the drain and the stop
    of its victims and of those that leave there anyway; until their memory is shown free; its load.
    """
    load, now = world.load_times.get(intent.model), victims.now
    if load is None or math.isinf(begins):
        return None
    cards = set(intent.devices)
    there = [item for item in world.instances if not cards.isdisjoint(item.devices)]
    starting = [_load_left(world, item, now) for item in there if item.state is InstanceState.STARTING]
    starting += [world.load_times.get(one.model) for one in starts if not cards.isdisjoint(one.devices)]
    going = [item for item in world.instances if item.id in intent.victims]
    going += [item for item in there if item.state in _LEAVING and item.id not in intent.victims]
    drains = [_drain_left(victims, item) for item in going]
    on = [card for card in world.cards if card.id in cards]
    settle = max((card.settles for card in on if going or card.settling_mib), default=0.0)
    before, loading, drain = _longest(ahead), _longest(starting), _longest(drains)
    if before is None or loading is None or drain is None:
        return None
    wait = max(0.0, begins - now) + loading + drain
    return before + wait + (STOP_TIME if going else 0.0) + settle + load


def _drain_left(victims: Victims, victim: Instance) -> float | None:
    """Seconds until a victim is empty at the latest, once it may be told to drain; None = unknown."""
    if victim.state is InstanceState.READY:
        limit = victims.world.policy.drain_timeout
        return 0.0 if victims.idle(victim) else limit or None
    if victim.drain is None or not (victim.leases or victim.running):
        return 0.0
    return None if victim.drain.deadline is None else max(0.0, victim.drain.deadline - victims.now)


def _load_left(world: World, item: Instance, now: float) -> float | None:
    """Seconds that a start should still take; None = unknown, as when it takes longer than usual."""
    left = world.load_times.get(item.model, 0.0) - (now - item.loads_since)
    return left if left > 0.0 else None


def _longest(seconds: Iterable[float | None]) -> float | None:
    """The longest of some times, 0 without any; None when one of them is unknown."""
    longest = 0.0
    for one in seconds:
        if one is None:
            return None
        longest = max(longest, one)
    return longest
