"""What one server of a model needs of each of its cards, and from where that is known. Pure; MiB per card."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tidegate_lifecycle.catalog import Model

RAISE, RAISES = 1.25, 3
"""What an estimate is multiplied by when it was too low, and how often."""
_RAISED = "; raised by a quarter "


class Source(enum.Enum):
    """Where a need is from; the first one that there is counts. The values are the contract's words."""

    DECLARED = "declared"
    """The setting `vram`."""
    MEASURED = "measured"
    """A footprint of this configuration, on cards of this kind."""
    ESTIMATED = "estimated"
    """Reckoned from the model's files."""
    UNKNOWN = "unknown"
    """It gets whole cards, and only idle models are evicted for it."""


@dataclass(frozen=True)
class Estimate:
    """What a model's files say that it needs."""

    mib: Mapping[int, int] = field(default_factory=dict)
    """On each card, by the number of cards that it is spread over; empty = it can't be told."""
    least: Mapping[int, int] = field(default_factory=dict)
    """With less it can't run at all; of a card with more than that and less than `mib` it gets all there is
    beside others' use."""
    why: str = ""
    """How the numbers come about, or why there are none; for people."""
    raised: int = 0
    """So many starts ran out of the memory that it gave them."""

    def after_too_little(self) -> Estimate:
        """A quarter more, after a start that ran out of memory; three times at most, which is about twice as
        much. Beyond that the number isn't what is wrong."""
        if self.raised == RAISES or not self.mib:
            return self
        times = "once" if self.raised == 0 else f"{self.raised + 1} times"
        why = f"{self.why.split(_RAISED)[0]}{_RAISED}{times}: a start ran out of memory"
        mib = {count: math.ceil(mib * RAISE) for count, mib in self.mib.items()}
        least = {count: math.ceil(mib * RAISE) for count, mib in self.least.items()}
        return Estimate(mib, least, why, self.raised + 1)


class Card(Protocol):
    """What a need depends on."""

    @property
    def kind(self) -> str:
        """The product's name; empty = declared."""

    @property
    def total_mib(self) -> int:
        """All its memory."""

    @property
    def budget_mib(self) -> int:
        """What model servers may use of it."""

    @property
    def usable_mib(self) -> int:
        """What is left of the budget beside others' use."""


@dataclass(frozen=True)
class Need:
    """What one server of a model needs, and in which pool."""

    model: str
    pool: str = "default"
    count: int | None = None
    """Over how many equal cards it is spread; None = over the fewest on which it fits."""
    amount: int | None = None
    """Declared, as an amount."""
    share: float | None = None
    """Declared, as a share of a card's total (0 to 1)."""
    measured: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """By the kind of the cards and their number."""
    estimate: Estimate = Estimate()
    pending: bool = False
    """Its files are being read: a start waits for that, which takes seconds."""

    @property
    def declared(self) -> bool:
        """The setting `vram` says it."""
        return self.amount is not None or self.share is not None

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of cards over which it may be spread, the smallest first."""
        if self.count is not None:
            return (self.count,)
        known = {*self.estimate.mib, *(count for _, count in self.measured)}
        return (1,) if self.declared or not known else tuple(sorted(known))

    def source(self, card: Card, count: int) -> Source:
        """Where the need on such a card, as one of `count`, is from."""
        if self.declared:
            return Source.DECLARED
        if (card.kind, count) in self.measured:
            return Source.MEASURED
        return Source.ESTIMATED if count in self.estimate.mib else Source.UNKNOWN

    def steady(self, count: int) -> bool:
        """It needs the same of equal cards, whatever others use of them."""
        full = self.estimate.mib.get(count, 0)
        return self.declared or (full > 0 and self.estimate.least.get(count, full) >= full)

    def on(self, card: Card, count: int) -> int:
        """MiB that it needs of this card, as one of `count`; 1 at least."""
        if self.amount is not None:
            return self.amount
        if self.share is not None:
            return math.ceil(card.total_mib * self.share)
        source = self.source(card, count)
        if source is Source.MEASURED:
            return self.measured[card.kind, count]
        if source is Source.ESTIMATED:
            full = self.estimate.mib[count]
            return min(full, max(self.estimate.least.get(count, full), card.usable_mib))
        return max(1, card.usable_mib)


def need_of(
    model: Model,
    estimate: Estimate | None = None,
    measured: Mapping[tuple[str, int], int] | None = None,
    estimating: bool = False,
) -> Need:
    """The need of a model by all that is known of it. `estimating`: its estimate is under way."""
    return Need(
        model.name,
        model.pool,
        model.tensor_parallel_size,
        model.vram_mib,
        model.vram_share,
        measured or {},
        estimate or Estimate(),
        estimating and not measured and model.vram_mib is None and model.vram_share is None,
    )
