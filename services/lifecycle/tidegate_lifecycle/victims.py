"""Who may be made to go for another model, from when on, and who goes first. Pure; part of the planner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.world import Demand, World

AGE_STEP = 10.0
"""Seconds without use up to which idle ones count as equally long unused; each further step is twice as
long."""
RELOAD_RATE = 1024.0
"""MiB a second: how fast a model is reckoned to load that never was."""
GRANT_TIME = 1.0
"""Seconds that a server which has just become ready keeps at least, so that who waited for it is granted."""

Cost = tuple[bool, float, bool, float]
"""Compared in this order: in use or not, when it may be told to go, its model's only server or not, how
recently it was used, in steps. What is equal here is decided by `Detail`."""

Detail = tuple[float, float, float, str]
"""Its model's arrivals a second × reload, seconds of a reload, last use, id: the lower goes first."""


class Candidate(NamedTuple):
    """An instance that could go."""

    item: Instance
    busy: bool
    free_at: float
    """When it may be told to drain (monotonic seconds); -inf = at once, inf = unknown."""
    cost: Cost
    detail: Detail


class Victims:
    """The instances of a world, judged at one time.

    Idle ones go first, busy ones (that is, drained while they are in use) only where those don't make room:
    1. A second server of a model before anybody's only one.
    2. The longer unused before the shorter, in steps: up to 10 s, 30 s, 70 s, 150 s and so on.
    3. Within a step what will be missed less: its model's arrivals a second × the seconds of its next load;
       then what loads sooner, then what was used earlier.
    Busy ones go by the time when they may be told to drain, then as above. `always_on` and pinned ones never.
    """

    def __init__(self, world: World, now: float) -> None:
        self.world, self.now = world, now
        self._fresh: dict[str, bool] = {}
        self._idle: dict[str, Candidate | None] = {}
        self._shields: dict[str, tuple[float, float, float]] = {}
        self._details: dict[str, tuple[bool, float, Detail]] = {}
        first: dict[str, tuple[float, str]] = {}
        for item in world.instances:
            if item.state is InstanceState.READY:
                key = (item.ordered_at, item.id)
                first[item.model] = min(first.get(item.model, key), key)
        self._first = {key[1] for key in first.values()}

    def demand(self, model: str) -> Demand:
        """What is wanted of a model."""
        return self.world.demand.get(model) or _NOTHING

    def keeps_room(self, item: Instance) -> bool:
        """Never evicted, never idle-stopped."""
        entry = self.world.catalog.get(item.model)
        return item.model in self.world.pinned or (entry is not None and entry.always_on)

    def idle(self, item: Instance) -> bool:
        """Ready, seen so by admission, and used by nobody: waiting for nothing would only add to the other's
        wait."""
        demand = self.demand(item.model)
        used = item.leases or item.running or demand.waiting or demand.interest_until > self.now
        return item.state is InstanceState.READY and self.world.seen >= item.generation and not used

    def fresh(self, item: Instance) -> bool:
        """It has just become ready, and tickets that waited for it haven't been granted and aren't gone.

        Without this the other model's waiter evicts it before its own were served, over and over.
        """
        known = self._fresh.get(item.id)
        if known is None:
            unseen = item.ready_at is None or self.world.seen < item.generation
            known = unseen or self.demand(item.model).oldest_since <= (item.ready_at or 0.0)
            self._fresh[item.id] = known
        return known

    def surplus(self, item: Instance) -> bool:
        """An older server of its model is ready, which goes on serving it."""
        return item.state is InstanceState.READY and item.id not in self._first

    def unused(self, item: Instance) -> Candidate | None:
        """It as a victim that may go at once; None = it may not."""
        if item.id not in self._idle:
            free = self.idle(item) and not self.fresh(item) and not self.keeps_room(item)
            self._idle[item.id] = self._candidate(item, False, -math.inf) if free else None
        return self._idle[item.id]

    def used(self, items: Sequence[Instance], since: float | None) -> list[Candidate]:
        """Those that are in use as victims of a model whose oldest ticket waits since then.

        None = not before they are idle.
        """
        shields = [math.inf if since is None else self.shield(item, since) for item in items]
        return sorted(
            (self._candidate(item, True, at) for item, at in zip(items, shields, strict=True)), key=order
        )

    def shield(self, item: Instance, oldest: float) -> float:
        """When a busy instance may be told to drain for a model whose oldest ticket waits since `oldest`.

        The wait counts from the ticket, or from the resident's readiness (the start of its turn) if later.
        A fresh one, or one within its residency, is shielded until then and no longer; a surplus one only
        while it is fresh.
        """
        shield = self._shields.get(item.id)
        if shield is None:
            shield = self._shields[item.id] = self._shield(item)
        begins, wait, end = shield
        return min(max(oldest, begins) + wait, end)

    def _shield(self, item: Instance) -> tuple[float, float, float]:
        """The beginning of its turn, how long others wait from then on, and when its turn is over anyway."""
        if item.ready_at is None or item.state is not InstanceState.READY:
            return math.inf, 0.0, math.inf
        policy = self.world.policy
        if self.fresh(item):
            return item.ready_at, max(policy.max_swap_wait, GRANT_TIME), math.inf
        if self.surplus(item):
            return item.ready_at, policy.max_swap_wait, item.ready_at
        residency = max(policy.min_residency, 2 * self.world.load_times.get(item.model, 0.0))
        return item.ready_at, policy.max_swap_wait, item.ready_at + residency

    def _candidate(self, item: Instance, busy: bool, free_at: float) -> Candidate:
        known = self._details.get(item.id)
        if known is None:
            size = item.reserved_mib * len(item.devices)
            reload = self.world.load_times.get(item.model) or size / RELOAD_RATE
            missed = self.demand(item.model).arrival_rate * reload
            step = float(math.floor(math.log2(1.0 + max(0.0, self.now - item.last_used) / AGE_STEP)))
            known = not self.surplus(item), -step, (missed, reload, item.last_used, item.id)
            self._details[item.id] = known
        only, step, detail = known
        return Candidate(item, busy, free_at, (busy, free_at, only, step), detail)


def order(one: Candidate) -> tuple[Cost, Detail]:
    """The key by which victims are sorted: who goes first."""
    return one.cost, one.detail


_NOTHING = Demand()
