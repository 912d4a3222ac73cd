"""From samples of the cards to a number, or to why there is none. Pure; MiB per card."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOLERANCE_MIB = 64
"""Samples that differ by no more agree fully: a driver's own small allocations come and go."""
FOREIGN_MIB = 256
"""By so much others' use of a card may move during a measurement."""


class Discarded(Exception):
    """A measurement that is thrown away. `kind` is a label of metrics, `again` says whether a later one of
    the same server may do better."""

    def __init__(self, kind: str, text: str, again: bool = True) -> None:
        super().__init__(text)
        self.kind, self.again = kind, again


@dataclass(frozen=True)
class Sample:
    """One look at one card."""

    total: int
    """All memory of the card."""
    used: int
    """By anybody."""
    own: int | None
    """By the server's own processes; None = the driver doesn't tell."""


@dataclass(frozen=True)
class Taken:
    """What a server took of each of its cards; of several the most."""

    mib: int
    confidence: float
    """1 = all samples agree; 0 = they differ by as much as their median or more. Of several cards the
    least."""
    samples: int
    """On each card."""
    attributed: bool
    """The driver told it per process; else it is the difference to what was used before the start."""


def verdict(cards: Mapping[str, Sequence[Sample]], base: Mapping[str, int] | None, threshold: float) -> Taken:
    """The median on each card. Discarded when that would be no footprint:

    1. no attribution, and no base from before the start; 2. nothing taken, less than nothing, or more than
    the card has; 3. others' use moved meanwhile; 4. samples that agree less than `threshold` (0 to 1).
    """
    attributed = all(sample.own is not None for samples in cards.values() for sample in samples)
    if not attributed and base is None:  # 1
        text = "the driver names no processes, and what was used before its start is not known"
        raise Discarded("no_base", text, again=False)
    found = [
        _card(
            name,
            samples,
            [
                (sample.own or 0) if attributed else sample.used - (base or {}).get(name, 0)
                for sample in samples
            ],
            threshold,
        )
        for name, samples in cards.items()
    ]
    return Taken(
        max(mib for mib, _ in found),
        min(confidence for _, confidence in found),
        min(len(samples) for samples in cards.values()),
        attributed,
    )


def _card(name: str, samples: Sequence[Sample], taken: list[int], threshold: float) -> tuple[int, float]:
    total = min(sample.total for sample in samples)
    if min(taken) <= 0 or max(taken) > total:  # 2
        odd = min(taken) if min(taken) <= 0 else max(taken)
        raise Discarded("implausible", f"{odd} MiB of {name} ({total} MiB) can't be what it took")
    foreign = [sample.used - sample.own for sample in samples if sample.own is not None]
    if foreign and max(foreign) - min(foreign) > FOREIGN_MIB:  # 3
        text = f"others' use of {name} moved from {min(foreign)} to {max(foreign)} MiB meanwhile"
        raise Discarded("changed", text)
    median = round(statistics.median(taken))
    confidence = agreement(taken)
    if confidence < threshold:  # 4
        text = f"samples of {name} from {min(taken)} to {max(taken)} MiB agree by {confidence:.2f}"
        raise Discarded("spread", f"{text}; at least {threshold:g} is wanted")
    return median, confidence


def agreement(values: Sequence[int]) -> float:
    """How far samples agree, 0 to 1: one less their range, beyond a tolerance, as a share of their median."""
    spread = max(0, max(values) - min(values) - TOLERANCE_MIB)
    return round(max(0.0, 1 - spread / max(1.0, statistics.median(values))), 4)
