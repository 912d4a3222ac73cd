"""Who waits at a gate, and whose turn it is.

The order is that of arrival: moved tickets first, restated ones by their age.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from tidegate_admission.line import Deadlines, Entry, Line
from tidegate_admission.ticket import Generation, Id, Ticket

_ANYWHERE: frozenset[str] = frozenset()
_orders = itertools.count(1)
_Key = TypeVar("_Key")
_Room = TypeVar("_Room")


class Turns:
    """The waiting tickets. Each of them is in exactly one of three places.

    - in the line of those that exclude the same instances (nearly always none), where turns are taken;
    - parked, when its session is silent: it keeps its place and is passed over;
    - early, when it was judged by a newer catalogue than supply has: it waits for supply to catch up.
    """

    def __init__(self, silent: set[str]) -> None:
        self.tickets: OrderedDict[Id, Ticket] = OrderedDict()
        """All of them, in the order in which their queue timeouts end."""
        self._silent = silent
        self._lines: dict[frozenset[str], Line] = {_ANYWHERE: Line()}
        self._parked: dict[str, dict[Id, Ticket]] = {}
        self._early: dict[Generation, dict[Id, Ticket]] = {}
        self._deadlines = Deadlines()

    def add(self, ticket: Ticket, catalog: Generation) -> None:
        """Takes a ticket in; `catalog` is the one that supply goes by."""
        self.tickets[ticket.id] = ticket
        ticket.order = ticket.order or next(_orders)
        ticket.position = len(self.tickets)
        if ticket.deadline < math.inf:
            self._deadlines.push(ticket)
        if ticket.catalog > catalog:
            self._early.setdefault(ticket.catalog, {})[ticket.id] = ticket
        else:
            self._stand(ticket)

    def remove(self, ticket: Ticket) -> None:
        """Takes a ticket out, wherever it is."""
        del self.tickets[ticket.id]
        self._lift(ticket)

    def exclude(self, ticket: Ticket, instance_id: str, moves: int) -> None:
        """A waiting ticket is moved: up, and away from an instance."""
        stood = ticket.serial != 0
        if stood:
            self._lift(ticket)
        ticket.moves = max(moves, ticket.moves)
        ticket.excluded |= {instance_id} if instance_id else set()
        if stood:
            self._stand(ticket)

    def take(self, room: Callable[[frozenset[str]], _Room | None]) -> tuple[Ticket, _Room] | None:
        """Takes out the ticket whose turn it is, of those for whom `room(excluded)` finds any; with it."""
        best: Entry | None = None
        where: _Room | None = None
        for excluded in list(self._lines) if len(self._lines) > 1 else (_ANYWHERE,):
            found = room(excluded)
            entry = self._head(self._lines[excluded]) if found is not None else None
            if entry is not None and (best is None or entry < best):
                best, where = entry, found
            elif excluded and not self._lines[excluded]:
                del self._lines[excluded]
        if best is None or where is None:
            return None
        ticket = best[4]
        self._lines[ticket.excluded].pop()
        ticket.serial = 0
        del self.tickets[ticket.id]
        return ticket, where

    def catch_up(self, catalog: Generation) -> None:
        """Supply goes by this catalogue now."""
        for generation in [generation for generation in self._early if generation <= catalog]:
            for ticket in self._early.pop(generation).values():
                self._stand(ticket)

    def unpark(self, session_id: str) -> None:
        """A session is no longer silent: its tickets take their old places."""
        for ticket in self._parked.pop(session_id, {}).values():
            self._stand(ticket)

    def past_deadline(self, now: float) -> Ticket | None:
        """A ticket whose caller's own deadline has passed; it is still in `tickets`."""
        return self._deadlines.pop_due(now)

    def impatient(self, clock: float) -> Ticket | None:
        """A ticket whose queue timeout is over by the queue clock; it is still in `tickets`."""
        if not self.tickets:
            return None
        first = next(iter(self.tickets.values()))
        return first if first.patience <= clock else None

    def oldest(self) -> float:
        """When the ticket that has waited longest arrived; infinite = nobody waits."""
        if not self.tickets:
            return math.inf
        # Only moved and restated tickets are older than the first in the order of timeouts; they head a line.
        heads = [line.head() for line in self._lines.values()]
        first = next(iter(self.tickets.values()))
        return min([first.arrived, *(entry[1] for entry in heads if entry is not None)])

    def _stand(self, ticket: Ticket) -> None:
        line = self._lines.get(ticket.excluded)
        if line is None:
            line = self._lines[ticket.excluded] = Line()
        line.push(ticket)

    def _lift(self, ticket: Ticket) -> None:
        if ticket.serial:  # it stands in a line, as an entry that is dead from now on
            ticket.serial = 0
            self._lines[ticket.excluded].tidy(len(self.tickets))
        else:
            _take_off(self._early, ticket.catalog, ticket.id)
            _take_off(self._parked, ticket.id[0], ticket.id)
        self._deadlines.tidy(len(self.tickets))

    def _head(self, line: Line) -> Entry | None:
        while (entry := line.head()) is not None:
            ticket = entry[4]
            if ticket.id[0] not in self._silent:
                return entry
            line.pop()
            ticket.serial = 0
            self._parked.setdefault(ticket.id[0], {})[ticket.id] = ticket
        return None


def _take_off(shelves: dict[_Key, dict[Id, Ticket]], key: _Key, ticket_id: Id) -> None:
    tickets = shelves.get(key)
    if tickets and tickets.pop(ticket_id, None) is not None and not tickets:
        del shelves[key]
