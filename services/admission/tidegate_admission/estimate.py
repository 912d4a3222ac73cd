"""What callers are told about the time to come: formulas. Pure: chance comes in as a number."""

from __future__ import annotations

SOONEST, LATEST = 1.0, 120.0
"""Bounds of Retry-After in seconds."""
UNKNOWN = 5.0
"""Retry-After in seconds when nothing has been measured yet."""
JITTER = 0.2
"""Share by which Retry-After is longer at random, so that those refused together don't come back so. Never
shorter: who comes before the model is ready would be refused again."""
INTEREST_AFTER, INTEREST_LEAST = 60.0, 180.0
"""Seconds for which a refused caller is expected back, after the model is ready and at least."""

_MEMORY = 0.97
"""What a second's count of releases weighs in the next one: about the last half minute counts."""
_ENOUGH = 3.0
"""Releases after which a measured pace is believed."""
_TOO_LONG = 2.0
"""Seconds between two samples beyond which the loop was away, and what it saw says nothing."""


def retry_after(eta: float, chance: float) -> float:
    """Seconds after which to come back: when `eta` (0 = unknown) is over, or later by chance (0 to 1)."""
    return min(LATEST, max(SOONEST, (eta or UNKNOWN) * (1.0 + JITTER * chance)))


def until_slot(position: float, turnaround: float, slots: float, share: float = 1.0) -> float:
    """Expected seconds until the ticket at `position` (from 1) has a slot.

    Little's law: `slots` that each take a new request every `turnaround` seconds come free at a rate of
    slots ÷ turnaround, and of these a tenant gets its `share` (0 to 1) while the others want theirs.
    """
    return max(1.0, position) * turnaround / (slots * share)


def turnaround(own: float, mean: float, measured: float) -> float:
    """Seconds that a slot is taken by a request of a tenant: its mean service time `own`, drawn out as slots
    were measured to take longer than the `mean` of all (a slot isn't taken again at once). 0 = unknown."""
    return own * measured / mean if measured and mean else own


def interest(ready_in: float) -> float:
    """Seconds for which a caller that was refused for its deadline is expected back."""
    return max(INTEREST_LEAST, ready_in + INTEREST_AFTER)


class Drain:
    """How fast a queue is served: the slot-seconds per release, measured while somebody waited.

    By slot, so that it stays true when instances come or go.
    """

    __slots__ = ("_at", "_counted", "_releases", "_slot_seconds", "_waited", "released")

    def __init__(self) -> None:
        self.released = 0
        """Slots that were used and given back so far."""
        self._at = 0.0
        self._counted = 0
        self._waited = False
        self._releases = self._slot_seconds = 0.0

    @property
    def turnaround(self) -> float:
        """Seconds from one release of a slot to its next; 0 = unknown."""
        return self._slot_seconds / self._releases if self._releases >= _ENOUGH else 0.0

    def sample(self, now: float, slots: float, waiting: bool) -> None:
        """About once a second: counts the time since the last sample, if somebody waited before and after."""
        seconds, released = now - self._at, self.released - self._counted
        if waiting and self._waited and slots and seconds <= _TOO_LONG:
            self._releases = self._releases * _MEMORY + released
            self._slot_seconds = self._slot_seconds * _MEMORY + slots * seconds
        self._at, self._counted, self._waited = now, self.released, waiting
