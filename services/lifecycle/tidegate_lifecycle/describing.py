"""Why a model is placed as it is, or isn't: in words and numbers, before and after the fact. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from tidegate_lifecycle.budget import Card
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.needs import Need, Source
from tidegate_lifecycle.placing import Places

SHOWN = 4
"""Devices in a text, those with the most free; `explain` shows all."""


class Words:
    """The words for one plan's ledger, as it is when they are first asked for."""

    def __init__(self, places: Places) -> None:
        self.places, self.ledger, self.victims = places, places.ledger, places.victims
        self._lines: dict[str, str] = {}
        self._nearest: dict[str, str] = {}

    def no_room(self, need: Need) -> str:
        """Why it isn't started: "needs 38.2 GiB (declared); gpu0 has 21 free of 44 GiB: busy: d 12 GiB, 3 in
        flight; ..."."""
        if not self.pool(need):
            return f"there is no device in the pool {need.pool}"
        nearest = self._nearest.get(need.pool)
        if nearest is None:
            cards = sorted(self.pool(need), key=lambda card: -self.free(card))
            more = [f"{len(cards) - SHOWN} more have less free"] if len(cards) > SHOWN else []
            nearest = "; ".join([*map(self.line, cards[:SHOWN]), *more])
            self._nearest[need.pool] = nearest
        return f"{self.needs(need)}; {nearest}"

    def too_large(self, need: Need) -> str:
        """Why it can never be placed, in numbers that don't change with time."""
        cards = self.pool(need)
        counts = [count for count in need.counts if count <= len(cards)]
        if not counts:
            return f"needs {need.counts[0]} equal devices; the pool {need.pool} has {len(cards)}"
        if counts[0] > 1 and all(card.part for card in cards):
            parts = "are parts of cards, of which a server can have one alone"
            return f"needs {counts[0]} equal devices; those of the pool {need.pool} {parts}"
        count = counts[-1]
        card = min(cards, key=lambda card: need.on(card, count))
        what = f"needs {gib(need.on(card, count))} GiB{_each(count)}{_source(need, card, count)}"
        largest = sorted(cards, key=lambda card: -card.budget_mib)
        budgets = ", ".join(f"{card.id} {gib(card.budget_mib)}" for card in largest[:SHOWN])
        more = f" and no more of {len(cards) - SHOWN} others" if len(cards) > SHOWN else ""
        return f"{what}; of the devices may be used: {budgets}{more}"

    def needs(self, need: Need) -> str:
        """What it needs, on how many devices, and from where that is known."""
        if need.pending:
            return "what it needs is being read from its files"
        options = self.places.groups(need)
        if not options:
            return self.too_large(need)
        said = []
        for group in options:
            card, count = group.cards[0], group.count
            unknown = need.source(card, count) is Source.UNKNOWN
            mib = "a whole device" if unknown else f"{gib(need.on(card, count))} GiB"
            said.append(f"{mib}{'' if unknown and count == 1 else _each(count)}{_source(need, card, count)}")
        return "needs " + " or ".join(dict.fromkeys(said))

    def lines(self, need: Need) -> tuple[str, ...]:
        """Of each device of its pool: what there is, what is free, who has the rest and could go."""
        return tuple(map(self.line, self.pool(need)))

    def line(self, card: Card) -> str:
        """One device: "gpu0 has 21 free of 44 GiB; evictable: b 18 GiB, idle 4 min; pinned: c 10 GiB"."""
        if card.id not in self._lines:
            free = f"has {gib(self.free(card))} free of {gib(card.budget_mib)} GiB"
            parts = [f"{card.id} {card.closed or free}"]
            parts += [self.holder(item) for item in self.ledger.on[card.id]]
            if card.foreign_mib:
                parts.append(f"{gib(card.foreign_mib)} GiB used by others")
            if card.settling_mib:
                parts.append(f"{gib(card.settling_mib)} GiB about to be free")
            if self.ledger.started[card.id]:
                parts.append(f"{gib(self.ledger.started[card.id])} GiB are just given to another one")
            parts += [
                f"{gib(mib)} GiB promised to {model}" for model, mib in self.ledger.claims(card.id).items()
            ]
            self._lines[card.id] = "; ".join(parts)
        return self._lines[card.id]

    def free(self, card: Card) -> int:
        """MiB that nobody holds there."""
        return max(0, card.usable_mib - card.settling_mib - self.ledger.reserved(card.id))

    def pool(self, need: Need) -> list[Card]:
        """The devices that it may use."""
        return [card for card in self.ledger.cards.values() if card.pool == need.pool]

    def holder(self, item: Instance) -> str:
        """Who holds room, and whether it could go: evictable, busy, pinned, or on its way."""
        what = f"{item.model} {gib(item.reserved_mib)} GiB"
        if item.state is not InstanceState.READY:
            return f"{item.state.name.lower().replace('_', ' ')}: {what}"
        demand = self.victims.demand(item.model)
        used = [f"{item.leases or item.running} in flight"] if item.leases or item.running else []
        used += [f"{demand.waiting} waiting"] if demand.waiting else []
        if not used:
            used = [f"idle {span(self.victims.now - item.last_used)}"]
        if self.victims.keeps_room(item):
            return f"pinned: {what}, {' and '.join(used)}"
        kind = "evictable" if self.victims.unused(item) is not None else "busy"
        return f"{kind}: {what}, {' and '.join(used)}"


def _each(count: int) -> str:
    return f" on each of {count} equal devices" if count > 1 else ""


def _source(need: Need, card: Card, count: int) -> str:
    source = need.source(card, count)
    if source is Source.ESTIMATED:
        return f" ({_estimated(need, card, count)})"
    if source is Source.UNKNOWN:
        why = f": {need.estimate.why}" if need.estimate.why else ""
        return f" (its need isn't known{why})"
    return f" ({source.value})"


def _estimated(need: Need, card: Card, count: int) -> str:
    """ "estimated: how it came about; 88 GiB were asked for, 19 would do for one sequence"."""
    full, least = need.estimate.mib[count], need.estimate.least.get(count, 0)
    shrunk = f"{gib(full)} GiB were asked for, {gib(least)} would do for one sequence"
    parts = [need.estimate.why, shrunk if full > need.on(card, count) else ""]
    return ": ".join(filter(None, ["estimated", "; ".join(filter(None, parts))]))


def span(seconds: float) -> str:
    """A time for people, in coarse steps so that a text doesn't change all the time."""
    if seconds >= 7200:
        return f"{math.floor(seconds / 3600)} h"
    return (
        f"{math.floor(seconds / 60)} min" if seconds >= 60 else f"{math.floor(max(0.0, seconds) / 10) * 10} s"
    )


def gib(mib: int) -> str:
    """MiB as a short number of GiB."""
    return f"{mib / 1024:.1f}".removesuffix(".0")


def placed(needs: str, left: Iterable[tuple[str, int]]) -> str:
    """Where a server is started: "on gpu0: needs 18 GiB (declared), 3 GiB stay free"."""
    cards = ", ".join(f"{card} ({gib(mib)} GiB stay free)" for card, mib in left)
    return f"on {cards}; {needs}"
