"""Failed starts and what follows from them, per model: back-off, one try, and closed again. Pure.

A circuit is opened by a failed start: until its `retry_at` callers are refused with the reason. Then it is
half-open: whoever wants the model makes one start begin, and everybody who wants it waits for that one, as
for any other load; it evicts idle models only. Its failure opens the circuit again for twice as long, its
success closes it.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from tidegate_lifecycle.world import Circuit

BACK_OFF = (1.0, 60.0)
"""Seconds: after the first failed start, and at most."""
FORGIVEN = 600.0
"""Seconds after the back-off in which nobody tried: then failed starts are forgotten."""
STABLE = 60.0
"""A server that lived so long, in seconds, isn't held against its model when it dies."""
DISTURBANCES = 3
"""Starts in a row that may fail for a neighbour's sake before one counts as the model's own failure."""


class Circuits:
    """The circuits that aren't closed, and what is counted towards one. Only the reconciler changes them."""

    def __init__(self) -> None:
        self.known: dict[str, Circuit] = {}
        """By model; without one its circuit is closed."""
        self._crashes: dict[str, int] = {}
        """Servers of a model that died soon after they were ready, one after the other."""
        self._disturbed: dict[str, int] = {}
        """Starts of a model that failed for a neighbour's sake, one after the other."""

    def failed(self, model: str, text: str, now: float, missed: bool = False) -> None:
        """A start failed: the circuit opens, for twice as long as before. `missed`: by its deadline."""
        before = self.known.get(model) or Circuit(0, now)
        self._open(model, before.failures + 1, before.missed + missed, text, now)

    def disturbed(self, model: str) -> bool:
        """A start failed because a neighbour's memory changed; True: it is tried again at once, and this one
        doesn't count."""
        self._disturbed[model] = self._disturbed.get(model, 0) + 1
        if self._disturbed[model] <= DISTURBANCES:
            return True
        del self._disturbed[model]
        return False

    def crashed(self, model: str, lived: float, text: str, now: float) -> bool:
        """A server that was ready died after so many seconds. True: it may be started again at once.

        The second one in a row that died soon opens the circuit, and each further one for twice as long.
        """
        crashes = self._crashes.get(model, 0) + 1 if lived < STABLE else 1
        self._crashes[model] = crashes
        if crashes == 1:
            return True
        self._open(model, crashes - 1, 0, text, now)
        return False

    def succeeded(self, model: str) -> None:
        """A server became ready: the circuit closes."""
        self.known.pop(model, None)
        self._disturbed.pop(model, None)

    def forget(self, model: str) -> None:
        """Its configuration is another one now: nothing is held against it."""
        self.known.pop(model, None)
        self._crashes.pop(model, None)
        self._disturbed.pop(model, None)

    def half_open(self, model: str, now: float) -> None:
        """An operator wants a try now, back-off or not; what has failed so far still counts."""
        circuit = self.known.get(model)
        if circuit is not None and circuit.is_open(now):
            self.known[model] = Circuit(circuit.failures, now, circuit.message, circuit.missed)

    def forgive(self, now: float, tried: Collection[str]) -> float:
        """Forgets old failures, but of models that are being `tried`; returns when the next back-off ends."""
        for model, circuit in list(self.known.items()):
            if now - circuit.retry_at > FORGIVEN and model not in tried:
                del self.known[model]
        ends = (circuit.retry_at for circuit in self.known.values() if circuit.is_open(now))
        return min(ends, default=math.inf)

    def _open(self, model: str, failures: int, missed: int, text: str, now: float) -> None:
        self._disturbed.pop(model, None)
        delay = min(BACK_OFF[1], BACK_OFF[0] * 2 ** min(failures - 1, 10))
        self.known[model] = Circuit(failures, now + delay, text, missed)
