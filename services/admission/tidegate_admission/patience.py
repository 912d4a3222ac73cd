"""The clock by which a gate's queue timeouts run: it counts only the seconds in which a slot was waited for.

Every ticket of a gate has the same queue timeout on this clock, so the order of arrival is the order of their
ends, and a model that begins or ends to load costs nothing however many tickets wait.
"""

from __future__ import annotations

import math

from tidegate_admission.supply import InstanceState, ModelSupply

START_GRACE = 1.0
"""Seconds after the start deadline in which lifecycle may still say what became of the start."""


class QueueClock:
    """Stands still while a model loads (until its start deadline), and while nothing is known of it."""

    __slots__ = ("_base", "_said", "_since", "loads_until")

    def __init__(self, now: float) -> None:
        self._base = 0.0
        self._since = now
        self.loads_until = math.inf
        """The start deadline; infinite = nothing is known yet; minus infinite = it isn't loading."""
        self._said = True

    def read(self, now: float) -> float:
        """Seconds counted so far."""
        return self._base + max(0.0, now - max(self._since, self.loads_until))

    def run(self, now: float, loads_until: float) -> None:
        """From now on it stands still until `loads_until`."""
        self._base, self._since = self.read(now), now
        self.loads_until = loads_until
        self._said = not math.isfinite(loads_until)

    def overdue(self, now: float) -> bool:
        """True once, when the start deadline has passed and lifecycle said nothing about it."""
        if self._said or now < self.loads_until + START_GRACE:
            return False
        self._said = True
        return True

    def shift(self, gap: float) -> None:
        """Takes `gap` seconds, in which the process stood still, out of the count."""
        self._since += gap
        self.loads_until += gap


def loads_until(item: ModelSupply | None, complete: bool, now: float) -> float:
    """Until when the model loads, with no server up; infinite while nothing is known of it."""
    if item is None:
        return -math.inf if complete else math.inf
    up = any(instance.state == InstanceState.READY for instance in item.instances)
    return now + item.start_deadline if item.start_deadline > 0 and not up else -math.inf
