"""What callers are told about the time to come. Pure: chance comes in as a number."""

from __future__ import annotations

SOONEST, LATEST = 1.0, 120.0
"""Bounds of Retry-After in seconds."""
UNKNOWN = 5.0
"""Retry-After in seconds when nothing has been measured yet."""
JITTER = 0.2
"""Share by which Retry-After is more or less at random, so that those refused together don't come back so."""


def retry_after(eta: float, chance: float) -> float:
    """Seconds after which to come back: when `eta` (0 = unknown) is over, give or take; `chance` in 0–1."""
    return min(LATEST, max(SOONEST, (eta or UNKNOWN) * (1.0 + JITTER * (2.0 * chance - 1.0))))
