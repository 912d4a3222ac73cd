"""Backpressure of one model server, as slots that shrink at once and come back one by one. Pure.

Additive increase and multiplicative decrease, as TCP's congestion avoidance (RFC 5681, section 3.1), with one
decrease for all that was sent before it (RFC 3168, section 6.1.2: at most once per window of data).
"""

from __future__ import annotations

import math

STEP = 10.0
"""Seconds after which one more slot is tried."""
CROWDED = 3
"""With more requests than that waiting in the server itself, by its own report, no further slot is tried."""


class Pressure:
    """What a server's 429 and 503 have left of its slots. Its slot's gate is its only writer."""

    __slots__ = ("_bound", "_eased", "_since", "halved_at", "held")

    def __init__(self) -> None:
        self.held = False
        """Its server reports that too many wait in it: no slot comes back meanwhile, and none is taken."""
        self.halved_at = -math.inf
        self._bound: int | None = None
        """Slots just after the last halving; None = there is no pressure."""
        self._eased = 0.0
        """Seconds from then until `_since` in which it wasn't held."""
        self._since = 0.0

    def bound(self, now: float, ceiling: int) -> int:
        """Slots in effect, of `ceiling`: halved at the last refusal, and one more for each STEP since."""
        if self._bound is None:
            return ceiling
        return min(ceiling, self._bound + int(self._recovery(now) / STEP))

    def halve(self, granted: float, now: float, ceiling: int) -> bool:
        """The server refused a request that was granted then. False: nothing has changed.

        What was granted before the last halving was refused by the crowd that has been answered already; a
        burst of refusals would otherwise leave one slot. The bound is never below 1, or nobody would ever
        learn that the server has recovered.
        """
        if granted < self.halved_at or not ceiling:
            return False
        self._bound = max(1, self.bound(now, ceiling) // 2)
        self._eased, self._since, self.halved_at = 0.0, now, now
        return True

    def hear(self, queued: int | None, now: float, ceiling: int) -> None:
        """Takes in how many requests wait in the server, as it reports; None = it says nothing."""
        if self.bound(now, ceiling) >= ceiling:  # recovered: a ceiling that is raised later holds at once
            self._bound = None
        self._eased, self._since = self._recovery(now), now
        self.held = queued is not None and queued > CROWDED

    def words(self, now: float, ceiling: int) -> str:
        """Why there are fewer slots, for people; empty = there aren't."""
        bound = self.bound(now, ceiling)
        if bound >= ceiling:
            return ""
        text = f"its server answered 429 or 503: {bound} of {ceiling} slots, one more each {STEP:g} s"
        return text + (f"; none while it reports more than {CROWDED} waiting" if self.held else "")

    def _recovery(self, now: float) -> float:
        return self._eased + (0.0 if self.held else max(0.0, now - self._since))
