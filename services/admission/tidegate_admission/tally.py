"""What has happened at a model since boot: how tickets and leases ended, and how long things took.

These are records for people and for the conservation check. No decision counts slots by them: those are
sizes of sets, in the gate. Only the mean service times and the pace of the queue are used, for estimates.
"""

from __future__ import annotations

import bisect

from tidegate_admission.estimate import Drain
from tidegate_admission.fairness import MAX_IDLE
from tidegate_admission.ticket import LeaseEnd, Reason, TicketEnd

WAIT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds in seconds of the histogram of waits."""

GUESS = 1.0
"""Slot-seconds that a lease is charged while nothing has been measured."""
_WEIGHT = 0.1
"""Share of the newest value in a mean: about the last twenty count."""


class Tally:
    """The record of one model; outlives its gate, so that means and ends survive idleness."""

    __slots__ = (
        "drain",
        "granted",
        "halvings",
        "lease_ends",
        "means",
        "moved",
        "offered",
        "refusals",
        "restated",
        "restated_waiting",
        "service_mean",
        "ticket_ends",
        "wait_counts",
        "wait_sum",
    )

    def __init__(self) -> None:
        self.offered = 0
        self.moved = 0
        self.restated_waiting = 0
        self.granted = 0
        self.restated = 0
        self.halvings = 0
        """How often a server's 429 or 503 has halved its slots."""
        self.ticket_ends = dict.fromkeys(TicketEnd, 0)
        self.lease_ends = dict.fromkeys(LeaseEnd, 0)
        self.refusals: dict[Reason, int] = {}
        self.service_mean = 0.0
        """Seconds that a lease is held, on average of late; 0 = none has ended yet."""
        self.means: dict[str, float] = {}
        """The same by tenant; the first ones are forgotten when they are too many."""
        self.drain = Drain()
        """How fast the queue is served."""
        self.wait_counts = [0] * (len(WAIT_BUCKETS) + 1)
        self.wait_sum = 0.0

    @property
    def waiting(self) -> int:
        """How many tickets must be waiting, by the record."""
        taken_in = self.offered + self.moved + self.restated_waiting
        return taken_in - sum(self.ticket_ends.values())

    @property
    def active(self) -> int:
        """How many leases must exist, by the record: granted + restated − all ends."""
        return self.granted + self.restated - sum(self.lease_ends.values())

    def waited(self, seconds: float) -> None:
        """Notes the wait of a granted ticket."""
        self.wait_counts[bisect.bisect_left(WAIT_BUCKETS, seconds)] += 1
        self.wait_sum += seconds

    def served(self, tenant: str, seconds: float) -> None:
        """Notes how long a released lease was held."""
        self.drain.released += 1
        self.service_mean = blend(self.service_mean, seconds)
        mean = self.means.get(tenant, 0.0)
        if not mean and len(self.means) >= MAX_IDLE:
            del self.means[next(iter(self.means))]
        self.means[tenant] = blend(mean, seconds)

    def length(self, tenant: str) -> float:
        """What a tenant's next lease is charged, in slot-seconds: the tenant's mean, else the model's, else
        a guess that is corrected soon."""
        return self.means.get(tenant) or self.service_mean or GUESS

    def take_over(self, other: Tally) -> None:
        """Adds the record of a model that is no longer told apart."""
        for name in ("offered", "moved", "restated_waiting", "granted", "restated", "wait_sum", "halvings"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, count in other.ticket_ends.items():
            self.ticket_ends[kind] += count
        for end, count in other.lease_ends.items():
            self.lease_ends[end] += count
        for reason, count in other.refusals.items():
            self.refusals[reason] = self.refusals.get(reason, 0) + count
        self.wait_counts = [a + b for a, b in zip(self.wait_counts, other.wait_counts, strict=True)]


def blend(mean: float, newest: float) -> float:
    """A mean of late, with its newest value; 0 = there is none yet."""
    return mean + _WEIGHT * (newest - mean) if mean else newest
