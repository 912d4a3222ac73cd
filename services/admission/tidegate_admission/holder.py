"""A unary holder: a session whose acquires are calls of their own instead of messages of one stream.

Pure. It stands in the same book as the edges' sessions, so its tickets and leases are queued, counted and
listed like theirs. Two things differ: each of its leases has a time to live of its own, counted from the
lease's last renewal, and answers go to the calls that wait for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from tidegate_admission.progress import FlowProgress
from tidegate_admission.session import Session
from tidegate_admission.ticket import Id, Reason, Refusal, Ticket

ENDED_KEPT = 60.0
"""Seconds, at least, for which it is remembered why a lease has ended: for late repeats and renewals."""
_NO_STREAM = 1 << 64
"""Above every stream_seq: no edge's stream can take a holder's place."""

Tell = Callable[[Id, "str | Refusal"], None]
"""Hands an answer to the calls that wait: the instance's address, or a refusal."""


class Holder(Session):
    """One unary holder, and its own outbox (`session.Outbox`). The dispatcher is its only writer."""

    __slots__ = ("_kept", "_now", "_tell", "ended", "renewed", "seq")

    def __init__(self, holder_id: str, lease_ttl: float, tell: Tell, now: float) -> None:
        super().__init__(holder_id, now)
        self.stream_seq, self.outbox, self.seq = _NO_STREAM, self, 0
        self.renewed: dict[int, float] = {}
        """By lease: when it was granted or last renewed."""
        self.ended: dict[int, tuple[float, Reason]] = {}
        """Leases that have ended, and when and why; oldest first."""
        self._kept = max(ENDED_KEPT, lease_ttl)
        self._tell, self._now = tell, now

    # --- the outbox ------------------------------------------------------------------------------------

    def grant(
        self, ticket: Ticket, address: str, waiting: int, active: int, max_concurrent: int, max_queue: int
    ) -> None:
        """See `session.Outbox`."""
        self.renewed[ticket.id[1]] = self._now
        self._tell(ticket.id, address)

    def refuse(self, refusal: Refusal) -> None:
        """See `session.Outbox`."""
        self._tell(refusal.ticket.id, refusal)

    def lost(self, n: int, reason: Reason) -> None:
        """The lease has ended; its holder is told when it asks next."""
        self.renewed.pop(n, None)
        self.ended[n] = (self._now, reason)

    def welcome(self) -> None:
        """There is no stream to welcome."""

    def ack(self, number: int) -> None:
        """There are no heartbeats."""

    def query(self, number: int) -> None:
        """There are no heartbeats."""

    def progress(self, flow: FlowProgress) -> None:
        """A call gives one answer."""

    def close(self, reason: Reason) -> None:
        """There is no stream to close."""

    # --- time ------------------------------------------------------------------------------------------

    def hear(self, now: float) -> None:
        """A call of this holder has come."""
        self.heard = self._now = now

    def overdue(self, now: float, lease_ttl: float) -> list[Ticket]:
        """The time is `now`; gives the leases that were not renewed for `lease_ttl`."""
        self._now = now
        while self.ended and now - next(iter(self.ended.values()))[0] > self._kept:
            del self.ended[next(iter(self.ended))]
        return [self.leases[n] for n, since in self.renewed.items() if now - since >= lease_ttl]

    def renew(self, n: int, now: float) -> bool:
        """Keeps a lease for another time to live; false when there is none of that number."""
        if n in self.leases:
            self.renewed[n] = now
        return n in self.leases

    def released(self, n: int) -> None:
        """The lease was given back after it was used."""
        self.lost(n, Reason.RECLAIMED)

    def unused(self, n: int) -> None:
        """The lease was given back because nobody waited for it any more: the same request may come again."""
        self.renewed.pop(n, None)

    def shift(self, gap: float, now: float) -> None:
        """See `Session.shift`."""
        super().shift(gap, now)
        self.renewed = {n: min(since + gap, now) for n, since in self.renewed.items()}

    def idle(self) -> bool:
        """Nothing of it needs to be remembered."""
        return not (self.tickets or self.leases or self.ended or self.rostered)


def number(request_id: str) -> int:
    """The number of the lease that a request gets.

    Made from the request's id alone, so a repeat means the same lease in every admission: neither a restart
    nor another request can give the number to a second lease of the holder (48 bits of BLAKE2b).
    """
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=6).digest())
