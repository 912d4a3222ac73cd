"""How long a server may take to be ready: from its size and from what loads of its model took. Pure.

A deadline that is too short fails a server that only needed longer; one that is too long keeps callers
waiting for a server that hangs. So it follows what is known, and what is learned of a miss lengthens it.
"""

from __future__ import annotations

SECONDS_PER_GIB = 6.0
"""What a load may take for each GiB that is reserved, on all cards together: 170 MiB/s, as from a slow disk
or a network share, with nothing in the cache. The reservation stands for the size: it holds the weights."""
FACTOR = 3.0
"""A load may take so many times as long as those before it: they may have found the files in memory."""
FLOOR = 60.0
"""Seconds beyond that, for what doesn't grow with the model: imports, compilation, graphs."""
DOUBLINGS = 2
"""How often a deadline that was missed again is doubled at most."""


def start_deadline(start_timeout: float, size_mib: int, load_time: float | None, missed: int) -> float:
    """Seconds from the launch of a server, downloads and image pulls not counted, until it must be ready.

    `start_timeout` is the setting, `size_mib` what is reserved on all its cards together (0 = unknown),
    `load_time` the learned seconds of a load (None = it was never loaded), `missed` the starts since the last
    success that weren't ready by their deadline.

    1. Never loaded: `start_timeout`. Loaded before: FACTOR × `load_time` + FLOOR.
    2. Never less than a load of that size takes from a slow disk: `size_mib` × SECONDS_PER_GIB.
    3. After a miss: never less than `start_timeout`; doubled for each further miss, DOUBLINGS times at most.
    """
    base = start_timeout if load_time is None else FACTOR * load_time + FLOOR  # 1
    base = max(base, size_mib / 1024 * SECONDS_PER_GIB)  # 2
    if not missed:
        return base
    return max(base, start_timeout) * 2.0 ** min(missed - 1, DOUBLINGS)  # 3
