"""The link of admission, as lifecycle sees it: which stream counts, what was demanded, what was seen."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import grpc

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis.errors import Refused
from tidegate_lifecycle.instance import Instance
from tidegate_lifecycle.world import Demand


@dataclass(eq=False)
class Stream:
    """One `Coordinate` call. The reconciler marks it, the servicer's writer sends."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """There is something to send."""
    urgent: asyncio.Event = field(default_factory=asyncio.Event)
    """It is to be sent at once, not with the next tick."""
    answered: bool = False
    """Its first demand was taken in: supply may be sent."""
    sent: int = -1
    """The generation that was sent last; -1 = the next report is whole."""
    first: bool = True
    """The next report is the first of the stream and carries the roster."""
    roster: tuple[str, ...] | None = None
    """What the admission before it sent last; None = there was none."""
    first_admission: bool = False
    """There was no admission before it."""
    ended: Refused | None = None
    """Why the service ends it."""

    def mark(self, urgent: bool) -> None:
        """Wakes the writer."""
        self.changed.set()
        if urgent:
            self.urgent.set()

    def end(self, why: Refused) -> None:
        """Ends the call with an error."""
        self.ended = why
        self.mark(urgent=True)


class Link:
    """The demand in force. Used by the reconciler alone, but for reading."""

    def __init__(self, boot: int, roster: list[str] | None, no_admission: bool = False) -> None:
        self.boot = boot
        self.no_admission = no_admission
        """None has ever connected."""
        self.stream: Stream | None = None
        self.incarnation = 0
        self.born = -math.inf
        """When the admission in force was started, by this process's clock."""
        self.settled = False
        self.seen = 0
        self.demand: dict[str, Demand] = {}
        self.roster: tuple[str, ...] | None = None if roster is None else tuple(roster)
        self.last_report = 0.0

    @property
    def connected(self) -> bool:
        """An admission is there."""
        return self.stream is not None

    def take(
        self, stream: Stream, report: pb.DemandReport, instances: dict[str, Instance], now: float
    ) -> bool:
        """Takes in a report; False when it doesn't count (the stream has been ended).

        1. The first one of a stream must be whole.
        2. A new stream supersedes the older one, unless its admission was started earlier than that.
        3. Counts replace those of the models that are named, or all when whole.
        """
        before = self.incarnation
        if stream is not self.stream and not self._accept(stream, report, now):
            return False
        if self.incarnation != before:
            for instance in instances.values():
                instance.grants = 0  # a new process counts from 0, and that is no use
        assert self.stream is stream
        if report.whole:  # 3
            self.demand.clear()
        for entry in report.models:
            self.demand[entry.model] = _demand(entry, now)
        self._leases(report, instances, now)
        self.settled = report.settled
        self.seen = report.supply_seen.n if report.supply_seen.incarnation == self.boot else 0
        # Before it is settled, a new admission may not know everybody whom the previous one knew.
        known = set(report.roster) if report.settled else {*(self.roster or ()), *report.roster}
        self.roster = tuple(sorted(known))
        self.last_report = now
        for instance in instances.values():
            instance.show(self.seen if self.settled else 0, now)
        return True

    def _accept(self, stream: Stream, report: pb.DemandReport, now: float) -> bool:
        if stream.ended is not None:
            return False
        if not report.whole:  # 1
            text = "the first demand of a stream must be whole"
            stream.end(Refused(grpc.StatusCode.INVALID_ARGUMENT, "REASON_INVALID", text))
            return False
        born = now - report.uptime_ms / 1000
        other = self.stream is not None and report.admission_incarnation != self.incarnation
        if other and born < self.born:  # 2
            stream.end(_superseded())
            return False
        if self.stream is not None:
            self.stream.end(_superseded())
        self.stream, self.incarnation, self.born = stream, report.admission_incarnation, born
        stream.answered, stream.roster = True, self.roster
        stream.first_admission, self.no_admission = self.no_admission, False
        stream.mark(urgent=True)
        return True

    def _leases(self, report: pb.DemandReport, instances: dict[str, Instance], now: float) -> None:
        """Leases and grants per instance; either one that shows use since the last report stamps it."""
        named = {entry.model for entry in report.models}
        shown = {item.instance_id: item for entry in report.models for item in entry.instances}
        for instance in instances.values():
            if not report.whole and instance.model not in named:
                continue
            item = shown.get(instance.id)
            leases, grants = (item.leases, item.grants) if item else (0, 0)
            if leases or instance.leases or grants != instance.grants:
                instance.last_used = now
            instance.leases, instance.grants = leases, grants

    def end(self, stream: Stream, now: float, instances: dict[str, Instance]) -> bool:
        """The call is over; False when another one is in force. Nobody waits any more that is known of."""
        if stream is not self.stream:
            return False
        self.stream, self.settled, self.seen = None, False, 0
        self.demand.clear()
        for instance in instances.values():
            if instance.leases:  # the relays go on meanwhile: idle time is counted from here
                instance.last_used = now
        return True


def _superseded() -> Refused:
    return Refused(grpc.StatusCode.ABORTED, "REASON_SUPERSEDED", "a newer admission has connected")


def _demand(entry: pb.ModelDemand, now: float) -> Demand:
    oldest = now - entry.oldest_wait_ms / 1000 if entry.waiting else math.inf
    interest = now + entry.interest_ms / 1000 if entry.interest_ms else 0.0
    return Demand(entry.waiting, oldest, interest, entry.trace_parent, entry.arrival_rate)
