"""How deep randomised tests look: as deep as a minute allows, and ten times as deep with `--slow`."""

from __future__ import annotations

import os

SLOW = "TIDEGATE_TEST_SLOW"
"""Set by the option --slow before any test is imported; reaches the workers of a parallel run too."""


def examples(count: int) -> int:
    """How many examples to try, when `count` are enough for every day."""
    return count * 10 if os.environ.get(SLOW) else count
