"""The restart window: until when a fresh admission must assume leases that it hasn't been told of."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate_admission.supply import Supply


class RestartWindow:
    """Open from the start of the process. While it is open, instances older than the process count as full.

    It closes when
    1. `lease_ttl` has passed: what was held before has expired, or been stated;
    2. lifecycle knew the sessions of the admission before, and each of them has said its Hello
       (a unary holder says none, because each of its leases is renewed for itself: with one, it is 1);
    3. lifecycle never had a list of sessions, and by a settled supply no instance is older than the process.
    """

    def __init__(self, now: float, lease_ttl: float) -> None:
        self.until = now + lease_ttl
        self.over = False
        """The counts can be relied on; never becomes false again."""
        self._roster: set[str] | None = None
        """Sessions still to be heard; None = lifecycle hasn't told any."""
        self._heard: set[str] = set()

    def hello(self, session_id: str) -> None:
        """A session has said its complete Hello (or its goodbye)."""
        self._heard.add(session_id)
        self._judge()

    def supply(self, report: Supply, old: Iterable[bool]) -> None:
        """A report came; `old` says of each instance in view whether it is older than this process."""
        if self.over:
            return
        if report.roster_known and self._roster is None and report.whole:
            self._roster = set(report.roster)
        elif self._roster is None and report.settled and not any(old):  # 3
            self.over = True
        self._judge()

    def pass_time(self, now: float) -> None:
        """Looks at the clock."""
        if now >= self.until:  # 1
            self.over = True

    def shift(self, gap: float) -> None:
        """The process stood still for `gap` seconds, and so heard nobody."""
        self.until += gap

    def missing(self) -> list[str]:
        """Sessions that it still waits for."""
        return sorted((self._roster or set()) - self._heard)

    def _judge(self) -> None:
        if self._roster is not None and self._roster <= self._heard:  # 2
            self.over = True
