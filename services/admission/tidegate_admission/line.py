"""Tickets in the order of their turns. Taking one in, out, or next costs O(log n), however many wait."""

from __future__ import annotations

import heapq
import itertools
import math

from tidegate_admission.ticket import Phase, Ticket

Entry = tuple[int, float, int, int, Ticket]
"""(rank, arrived, order, serial, ticket). Serials are unique, so two tickets are never compared."""

_serials = itertools.count(1)

MOVED, ARRIVED = 0, 1
"""Ranks: a moved ticket has had its turn already, so it stands before those that only arrived."""


class Line:
    """A heap in which a ticket that left stays as a dead entry until it comes up or too many are dead."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[Entry] = []

    def push(self, ticket: Ticket) -> Entry:
        """Gives a ticket its place: by its age, moved ones first."""
        ticket.serial = serial = next(_serials)
        rank = MOVED if ticket.moves else ARRIVED
        entry = (rank, ticket.arrived, ticket.order, serial, ticket)
        heapq.heappush(self._heap, entry)
        return entry

    def head(self) -> Entry | None:
        """Whose turn it is; None when nobody stands here."""
        heap = self._heap
        while heap:
            entry = heap[0]
            ticket = entry[4]
            if (
                ticket.serial == entry[3] and ticket.phase is Phase.WAITING
            ):  # alive; written out: the hot path
                return entry
            heapq.heappop(heap)
        return None

    def pop(self) -> None:
        """Takes out the entry that `head` has just given."""
        heapq.heappop(self._heap)

    def tidy(self, alive: int) -> None:
        """Throws the dead entries away once there are more of them than `alive` could explain."""
        if len(self._heap) > 2 * alive + 64:
            self._heap = [entry for entry in self._heap if _alive(entry)]
            heapq.heapify(self._heap)

    def __len__(self) -> int:
        """Entries, dead ones too."""
        return len(self._heap)


class Deadlines:
    """Waiting tickets by their callers' own deadlines; those that left are dead entries, as in a line."""

    __slots__ = ("_heap",)

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Ticket]] = []

    def push(self, ticket: Ticket) -> None:
        """Remembers a ticket that has a deadline."""
        heapq.heappush(self._heap, (ticket.deadline, ticket.order, ticket))

    def pop_due(self, now: float) -> Ticket | None:
        """A waiting ticket whose deadline has passed, or None. One whose deadline was put off comes up at the
        old one, and is put back."""
        while self._heap:
            deadline, _, ticket = self._heap[0]
            if ticket.phase is Phase.WAITING and deadline > now:
                return None
            heapq.heappop(self._heap)
            if ticket.phase is not Phase.WAITING:
                continue
            if ticket.deadline <= now:
                return ticket
            if ticket.deadline < math.inf:
                self.push(ticket)
        return None

    def tidy(self, alive: int) -> None:
        """As `Line.tidy`."""
        if len(self._heap) > 2 * alive + 64:
            live = {ticket.id: ticket for _, _, ticket in self._heap if ticket.phase is Phase.WAITING}
            self._heap = [(ticket.deadline, ticket.order, ticket) for ticket in live.values()]
            heapq.heapify(self._heap)


def _alive(entry: Entry) -> bool:
    ticket = entry[4]
    return ticket.serial == entry[3] and ticket.phase is Phase.WAITING
