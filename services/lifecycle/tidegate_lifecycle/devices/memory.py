"""What is known of one card's memory beside our servers' reservations. Pure: MiB, and monotonic seconds.

Two things are kept apart: what **others** use, a reserve that moves with the readings, and what is still
**settling**: memory of servers of ours that have gone, until the driver shows that it is back. At every
reading that was begun after the last of ours had gone

    foreign + our reservations + settling ≥ used, as the driver shows it,

so that no more is ever promised than the driver shows as free.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FALL = 10.0
"""Seconds for which others must have used less before the reserve for them falls, to the most since then."""
SETTLE = 15.0
"""Seconds, from a server's end, within which the driver should show its memory free: what is missing then
counts as used by others. A neighbour that is starting hides what comes back: then they begin with its end."""


@dataclass(frozen=True)
class Ours:
    """What is reserved on a card for servers that exist."""

    resting: int = 0
    loading: int = 0
    """For those that start or wake: they may not have taken it yet."""

    @property
    def all(self) -> int:
        """Both."""
        return self.resting + self.loading


@dataclass(frozen=True)
class Overdue:
    """The bound for settling memory has passed."""

    mib: int
    """What was missing."""
    seen: bool
    """The driver showed it as used, and it counts as others' from now on; False = the driver has shown
    nothing since, and it is taken as free."""


class CardMemory:
    """One card that the driver can read. The caller says what is ours at each moment."""

    def __init__(self) -> None:
        self.foreign = 0
        """MiB beyond our reservations."""
        self.settling = 0
        """MiB of servers that have gone which the driver hasn't shown as free yet."""
        self._gone_at = self._bound = -math.inf
        self._seen = False
        """A reading was begun since."""
        self._lower: tuple[float, int] | None = None
        """Since when the readings show less of others than `foreign`, and the most of it since then."""

    def gone(self, mib: int, now: float) -> None:
        """A server of ours has gone; it held so much here."""
        self.settling += mib
        self._gone_at, self._bound, self._seen = now, now + SETTLE, False

    def read(self, used: int, began: float, ours: Ours) -> None:
        """Takes in what the driver shows as used, by a reading that was begun then.

        1. One from before a server's end says nothing about what came back.
        2. What others and servers at rest account for isn't settling any more. What a loading server shows
           can't be told from it, so it accounts for nothing here.
        3. More than all that is others': at once.
        4. Less: when it has been so for `FALL`, and nothing of ours comes or goes.
        """
        if began >= self._gone_at:  # 1
            self._seen = True
            self.settling = min(self.settling, max(0, used - self.foreign - ours.resting))  # 2
        others = max(0, used - ours.all - self.settling)
        if others >= self.foreign:  # 3
            self.foreign, self._lower = others, None
        elif ours.loading or self.settling:
            self._lower = None
        else:  # 4
            since, most = self._lower or (began, others)
            self._lower = since, max(most, others)
            if began - since >= FALL:
                self.foreign, self._lower = self._lower[1], None

    def settle(self, ours: Ours, now: float) -> Overdue | None:
        """Ends what has taken too long; says so."""
        if ours.loading:
            self._bound = now + SETTLE
        if not self.settling or now < self._bound:
            return None
        overdue = Overdue(self.settling, self._seen)
        self.foreign += self.settling if self._seen else 0
        self.settling = 0
        return overdue

    @property
    def bound(self) -> float:
        """When what settles counts as others' at the latest; inf = nothing settles."""
        return self._bound if self.settling else math.inf
