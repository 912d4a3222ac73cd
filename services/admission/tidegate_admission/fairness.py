"""Who shares a model, and how much each tenant has had: weights, flows, virtual times.

A tenant's virtual time is the slot-seconds it was charged at this gate, divided by its weight. The tenant
with the least is served next, so slots are shared by weight; start-time fair queueing, Goyal, Vin and Cheng,
SIGCOMM 1996, with an estimate as length (the tenant's mean service time) that is corrected later.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate_admission.line import Entry, Line
from tidegate_admission.ticket import Band, Id, Ticket

DEFAULT_TENANT = "default"
"""Everybody without a tenant; on tickets its name is empty."""
MAX_IDLE = 1000
"""Tenants of a gate, and means of a model, that are remembered while they have no ticket: made-up names
can't fill the memory. One that is forgotten comes back like a new one."""

_ANYWHERE: frozenset[str] = frozenset()
_LOW = int(Band.LOW)


@dataclass(frozen=True, slots=True)
class TenantRule:
    """What is configured for a tenant."""

    weight: int = 1
    """Its share of slots and queue, relative to others'; from 1."""
    top: int = int(Band.NORMAL)
    """The highest band that its tickets may have."""
    requests: int = 0
    """Per minute, over all models; 0 = no limit."""
    tokens: int = 0
    """Per minute, over all models; 0 = no limit."""

    @property
    def rated(self) -> bool:
        """It has a rate."""
        return bool(self.requests or self.tokens)


@dataclass(frozen=True, slots=True)
class Tenants:
    """The section `tenants`. A name that isn't configured has the default's rule, and flows of its own."""

    default: TenantRule = TenantRule()
    named: Mapping[str, TenantRule] = field(default_factory=dict)

    @property
    def rated(self) -> bool:
        """Some tenant has a rate."""
        return any(rule.rated for rule in (self.default, *self.named.values()))

    def of(self, name: str) -> TenantRule:
        """A tenant's rule."""
        return self.named.get(name, self.default)

    def band(self, name: str, asked: int) -> int:
        """The band that a tenant's ticket gets: what it asks for, lowered to the tenant's top."""
        top = self.named.get(name, self.default).top
        return asked if top <= asked <= _LOW else max(top, min(asked, _LOW))


class Flow:
    """A tenant's tickets of one band; FIFO, moved ones first."""

    __slots__ = ("account", "aged", "band", "lines", "shown", "tickets")

    def __init__(self, account: Account, band: int) -> None:
        self.account = account
        self.band = band
        self.tickets: OrderedDict[Id, Ticket] = OrderedDict()
        """All that wait, in the order in which they were taken in; those that are passed over too."""
        self.lines: dict[frozenset[str], Line] = {_ANYWHERE: Line()}
        """Those that may be granted, by the instances that they exclude (nearly always none)."""
        self.shown: tuple[float, Entry, Flow] | None = None
        """Its valid item in the order of flows."""
        self.aged: tuple[float, int, Flow] | None = None
        """Its valid item in the order of their heads' ages."""

    def line(self, excluded: frozenset[str]) -> Line:
        """The line of those that exclude these instances."""
        line = self.lines.get(excluded)
        if line is None:
            line = self.lines[excluded] = Line()
        return line


class Account:
    """One tenant at one gate."""

    __slots__ = ("flows", "name", "virtual", "weight")

    def __init__(self, name: str, weight: int) -> None:
        self.name = name
        self.weight = weight
        self.virtual = 0.0
        """Slot-seconds charged ÷ weight."""
        self.flows: dict[int, Flow] = {}
        """By band."""

    def waiting(self) -> int:
        """How many of its tickets wait."""
        return sum([len(flow.tickets) for flow in self.flows.values()])

    def lowest(self) -> Flow:
        """The flow of its lowest band in which a ticket waits; only for one that has any."""
        return max((flow for flow in self.flows.values() if flow.tickets), key=lambda flow: flow.band)

    def __repr__(self) -> str:
        return f"<Account {self.name or DEFAULT_TENANT} virtual={self.virtual:.3f} waiting={self.waiting()}>"


class Accounts:
    """The tenants of a gate."""

    def __init__(self, tenants: Tenants) -> None:
        self.active: dict[str, Account] = {}
        """Those with a waiting ticket."""
        self._tenants = tenants
        self._idle: OrderedDict[str, Account] = OrderedDict()
        self._floor = 0.0
        """The virtual time of the tenant that was served when the queue was last empty."""

    def find(self, name: str) -> Account | None:
        """A tenant's account, active or not."""
        return self.active.get(name) or self._idle.get(name)

    def enter(self, name: str, minimum: float) -> Account:
        """A tenant's account, now active. Idleness earns no credit: one that was idle begins at `minimum`,
        the least of the active ones (infinite: there are none), unless it has had more than that."""
        account = self._idle.pop(name, None) or Account(name, self._tenants.of(name).weight)
        account.virtual = max(account.virtual, minimum if minimum < math.inf else self._floor)
        self.active[name] = account
        return account

    def leave(self, account: Account) -> None:
        """The last ticket of a tenant has gone."""
        del self.active[account.name]
        self._idle[account.name] = account
        if not self.active:
            self._floor = max(self._floor, account.virtual)
        if len(self._idle) > MAX_IDLE:
            self._idle.popitem(last=False)

    def share(self, name: str, max_queue: int) -> float:
        """Tickets that a tenant may have waiting while others want the queue too; at least one."""
        return max(1.0, max_queue * self.part(name))

    def part(self, name: str) -> float:
        """A tenant's share of the slots (0 to 1) among those who wait, itself counted."""
        own = self._tenants.of(name).weight
        others = sum([account.weight for account in self.active.values() if account.name != name])
        return own / (own + others)

    def surplus(self, arriving: str, max_queue: int) -> list[tuple[float, Account]]:
        """The tenants that have more than their share of the queue, `arriving`'s new ticket counted, each
        with what it has per weight."""
        weights = [account.weight for account in self.active.values() if account.name != arriving]
        fair = max_queue / (sum(weights) + self._tenants.of(arriving).weight)
        found = []
        for account in self.active.values():
            count = account.waiting() + (account.name == arriving)
            if count > max(1.0, fair * account.weight):
                found.append((count / account.weight, account))
        return found
