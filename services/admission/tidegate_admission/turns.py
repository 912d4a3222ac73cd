"""Who waits at a gate, and whose turn it is.

Bands first, raised by age; within a band the tenants share slot-seconds by weight; within a flow the order is
that of arrival: moved tickets first, restated ones by their age.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from tidegate_admission.fairness import Accounts, Flow, Tenants
from tidegate_admission.line import Deadlines, Entry, Line
from tidegate_admission.order import Order
from tidegate_admission.ticket import Band, Generation, Id, Ticket

_ANYWHERE: frozenset[str] = frozenset()
_orders = itertools.count(1)
_Key = TypeVar("_Key")
_Room = TypeVar("_Room")


class Turns:
    """The waiting tickets. Each of them is in the flow of its tenant and band, and in exactly one place.

    - in the flow's line of those that exclude the same instances, where turns are taken;
    - parked, when its session is silent: it keeps its place and is passed over;
    - early, when it was judged by a newer catalogue than supply has: it waits for supply to catch up.
    """

    def __init__(self, silent: set[str], tenants: Tenants, aging: float) -> None:
        self.tickets: OrderedDict[Id, Ticket] = OrderedDict()
        """All of them, in the order in which their queue timeouts end."""
        self.accounts = Accounts(tenants)
        self._order = Order(aging, self._first, self.accounts.active)
        self._silent = silent
        self._parked: dict[str, dict[Id, Ticket]] = {}
        self._early: dict[Generation, dict[Id, Ticket]] = {}
        self._deadlines = Deadlines()

    def add(self, ticket: Ticket, catalog: Generation) -> None:
        """Takes a ticket in; `catalog` is the one that supply goes by."""
        self.tickets[ticket.id] = ticket
        ticket.order = ticket.order or next(_orders)
        if ticket.trace_parent:
            ticket.position = len(self.tickets)
        account = self.accounts.active.get(ticket.tenant)
        if account is None:
            account = self.accounts.enter(ticket.tenant, self._order.minimum())
        ticket.tenant = account.name  # as in Gate: one text for all
        flow = account.flows.get(ticket.band)
        if flow is None:
            flow = account.flows[ticket.band] = Flow(account, ticket.band)
        flow.tickets[ticket.id] = ticket
        if ticket.deadline < math.inf:
            self._deadlines.push(ticket)
        if ticket.catalog > catalog:
            self._early.setdefault(ticket.catalog, {})[ticket.id] = ticket
        else:
            self._stand(ticket, flow)

    def remove(self, ticket: Ticket) -> None:
        """Takes a ticket out, wherever it is."""
        del self.tickets[ticket.id]
        flow = self._flow(ticket)
        self._lift(ticket, flow)
        self._left(ticket, flow)

    def exclude(self, ticket: Ticket, instance_id: str, moves: int) -> None:
        """A waiting ticket is moved: up, and away from an instance."""
        stood, flow = ticket.serial != 0, self._flow(ticket)
        if stood:
            self._lift(ticket, flow)
        ticket.moves = max(moves, ticket.moves)
        ticket.excluded |= {instance_id} if instance_id else set()
        if stood:
            self._stand(ticket, flow)

    def take(self, room: Callable[[frozenset[str]], _Room | None], now: float) -> tuple[Ticket, _Room] | None:
        """Takes out the ticket whose turn it is, of those for whom `room(excluded)` finds any; with it.

        1. Without room for those who exclude nothing there is none for anybody.
        2. Flows are asked in their order; one whose tickets all exclude what has room is passed over.
        """
        anywhere = room(_ANYWHERE)
        if anywhere is None:  # 1
            return None
        passed: list[Flow] = []
        turn = None
        while turn is None and (flow := self._order.next(now)) is not None:  # 2
            turn = self._pick(flow, room, anywhere)
            if turn is None:
                self._order.hide(flow)
                passed.append(flow)
        for flow in passed:
            self._order.show(flow)
        return turn

    def charge(self, name: str, seconds: float) -> None:
        """A tenant has had so many slot-seconds; negative: it is given back what it didn't use."""
        account = self.accounts.find(name)
        if account is None:
            return
        account.virtual += seconds / account.weight
        if seconds < 0.0 and name in self.accounts.active:
            for flow in account.flows.values():
                if flow.tickets:
                    self._order.show(flow)

    def displaced(self, ticket: Ticket, max_queue: int) -> Ticket | None:
        """Who makes room for `ticket`, which comes to a full queue; None = nobody does.

        1. Somebody is displaced only from a tenant that has more than its share of the queue.
        2. A ticket of a tenant below its share displaces in any band, another one only in a lower band.
        3. From the lowest band in which such a tenant waits, it hits the tenant furthest above its share.
        4. Of its tickets the newest; not one that was moved, whose turn had come already.
        """
        accounts = self.accounts
        own = accounts.active.get(ticket.tenant)
        below = (own.waiting() if own else 0) + 1 <= accounts.share(ticket.tenant, max_queue)
        worst: tuple[int, float] = (0 if below else ticket.band, math.inf)
        hit: Flow | None = None
        for surplus, account in accounts.surplus(ticket.tenant, max_queue):  # 1
            flow = account.lowest()
            if (flow.band, surplus) > worst:  # 2, 3
                worst, hit = (flow.band, surplus), flow
        newest = reversed(hit.tickets.values()) if hit else iter(())
        return next((other for other in newest if not other.moves), None)  # 4

    def by_band(self) -> tuple[int, ...]:
        """How many wait in each band, from high to low."""
        flows = [flow for account in self.accounts.active.values() for flow in account.flows.values()]
        return tuple(sum(len(flow.tickets) for flow in flows if flow.band == band) for band in Band)

    def level(self, band: int, arrived: float, now: float) -> int:
        """The band to which a band is raised whose oldest head arrived then."""
        return self._order.level(band, arrived, now)

    def catch_up(self, catalog: Generation) -> None:
        """Supply goes by this catalogue now."""
        for generation in [generation for generation in self._early if generation <= catalog]:
            for ticket in self._early.pop(generation).values():
                self._stand(ticket, self._flow(ticket))

    def unpark(self, session_id: str) -> None:
        """A session is no longer silent: its tickets take their old places."""
        for ticket in self._parked.pop(session_id, {}).values():
            self._stand(ticket, self._flow(ticket))

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
        accounts = self.accounts.active.values()
        flows = [flow for account in accounts for flow in account.flows.values() if flow.tickets]
        heads = [line.head() for flow in flows for line in flow.lines.values()]
        first = next(iter(self.tickets.values()))
        return min([first.arrived, *(entry[1] for entry in heads if entry is not None)])

    def _flow(self, ticket: Ticket) -> Flow:
        return self.accounts.active[ticket.tenant].flows[ticket.band]

    def _left(self, ticket: Ticket, flow: Flow) -> None:
        """A ticket of this flow has gone."""
        del flow.tickets[ticket.id]
        if not flow.tickets:
            if not flow.account.waiting():
                self.accounts.leave(flow.account)
        elif ticket.moves:
            self._order.show(flow)  # the next head may be the older one

    def _pick(
        self, flow: Flow, room: Callable[[frozenset[str]], _Room | None], anywhere: _Room
    ) -> tuple[Ticket, _Room] | None:
        """Takes out the first of a flow's tickets that has room."""
        assert flow.shown is not None
        best, where = flow.shown[1], anywhere
        if len(flow.lines) > 1:
            found = []
            for excluded, line in flow.lines.items():
                fits = room(excluded) if excluded else anywhere
                entry = self._head(line) if fits is not None else None
                if entry is not None and fits is not None:
                    found.append((entry, fits))
            if not found:
                return None
            best, where = min(found, key=lambda pair: pair[0])
        ticket = best[4]
        flow.lines[ticket.excluded].pop()
        ticket.serial = 0
        del self.tickets[ticket.id]
        self._left(ticket, flow)
        return ticket, where

    def _stand(self, ticket: Ticket, flow: Flow) -> None:
        entry = flow.line(ticket.excluded).push(ticket)
        if self._order.better(flow, entry):
            self._order.show(flow)

    def _lift(self, ticket: Ticket, flow: Flow) -> None:
        if ticket.serial:  # it stands in a line, as an entry that is dead from now on
            ticket.serial = 0
            flow.lines[ticket.excluded].tidy(len(flow.tickets))
        else:
            _take_off(self._early, ticket.catalog, ticket.id)
            _take_off(self._parked, ticket.id[0], ticket.id)
        self._deadlines.tidy(len(self.tickets))

    def _first(self, flow: Flow) -> Entry | None:
        """The first of a flow's tickets that may be granted if there is room."""
        lines = flow.lines
        if len(lines) == 1:
            return self._head(lines[_ANYWHERE])
        entries = []
        for excluded, line in list(lines.items()):
            entry = self._head(line)
            if entry is not None:
                entries.append(entry)
            elif excluded:
                del lines[excluded]
        return min(entries, default=None)

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
