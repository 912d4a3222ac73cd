"""Where a model could run, and who would have to go for it. Pure; part of the planner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tidegate_lifecycle.budget import Card, Intent, Ledger
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.needs import Need, Source
from tidegate_lifecycle.victims import Candidate, Cost, Victims, order


class Spot(NamedTuple):
    """One card with what must leave it."""

    card: Card
    need: int
    left: int
    """MiB that stay free there."""
    victims: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """The cards of one server."""

    spots: tuple[Spot, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """Ids of the cards, sorted."""
        return tuple(spot.card.id for spot in self.spots)

    @property
    def victims(self) -> tuple[Instance, ...]:
        """Each victim once."""
        return tuple({one.item.id: one.item for spot in self.spots for one in spot.victims}.values())

    @property
    def free_at(self) -> float:
        """When the last of the victims may be told to drain; -inf = at once; inf = unknown."""
        return max((one.free_at for spot in self.spots for one in spot.victims), default=-math.inf)

    def intent(self, model: str, begun: bool) -> Intent:
        """The claim on these cards."""
        needs = tuple(spot.need for spot in self.spots)
        return Intent(model, self.devices, needs, tuple(item.id for item in self.victims), begun)


@dataclass(frozen=True)
class Group:
    """Equal cards, and over how many of them a server is spread."""

    cards: tuple[Card, ...]
    count: int


def groups(need: Need, cards: Iterable[Card]) -> list[Group]:
    """The cards of its pool in groups of equal ones, each with the fewest on which it fits, if it does."""
    return _fitting(need, alike(cards).get(need.pool, ()))


def alike(cards: Iterable[Card]) -> dict[str, list[tuple[Card, ...]]]:
    """Equal cards together, by pool."""
    found: dict[tuple[str, str, bool, int, int], list[Card]] = {}
    for card in cards:
        key = card.pool, card.kind, card.part, card.total_mib, card.budget_mib
        found.setdefault(key, []).append(card)
    pools: dict[str, list[tuple[Card, ...]]] = {}
    for (pool, *_), equal in found.items():
        pools.setdefault(pool, []).append(tuple(equal))
    return pools


def _fitting(need: Need, pool: Iterable[tuple[Card, ...]]) -> list[Group]:
    found = []
    for equal in pool:
        most = 1 if equal[0].part else len(equal)
        fits = (count for count in need.counts if count <= most and _fits(need, equal[0], count))
        if (count := next(fits, None)) is not None:
            found.append(Group(equal, count))
    return found


def _fits(need: Need, card: Card, count: int) -> bool:
    unknown = need.source(card, count) is Source.UNKNOWN
    return card.budget_mib > 0 if unknown else 0 < need.on(card, count) <= card.budget_mib


class _Standing:
    """What is on one card, for a model without an intent of its own: reckoned anew after a change."""

    __slots__ = ("free", "gated", "movable", "room", "unused", "unused_room", "used")

    def __init__(self, card: str, ledger: Ledger, victims: Victims) -> None:
        self.gated = ledger.gated(card)
        self.free = ledger.free(card, "")
        stay = [item for item in ledger.on[card] if not _leaves(item) and not ledger.makes_room(item.id, "")]
        held = sum(item.reserved_mib for item in stay)
        self.room = ledger.cards[card].usable_mib - held - ledger.started[card] - ledger.claimed(card, "")
        """MiB once those have gone that leave anyway."""
        unused = [one for item in stay if (one := victims.unused(item)) is not None]
        self.unused = sorted(unused, key=order)
        self.unused_room = self.room + sum(one.item.reserved_mib for one in unused)
        """MiB once those have gone, too, that may go at once."""
        self.used = [item for item in stay if victims.unused(item) is None and not victims.keeps_room(item)]
        self.movable = self.unused_room + sum(item.reserved_mib for item in self.used)
        """MiB once all have gone that can ever be made to go."""


@dataclass(frozen=True)
class _Sites:
    """The cards of a group on which something may be placed."""

    count: int
    unknown: bool
    """The need isn't known: it gets whole cards."""
    cards: tuple[tuple[Card, int], ...]
    """Each with MiB that the model needs there."""

    @classmethod
    def of(cls, need: Need, group: Group) -> _Sites:
        """Equal cards may differ in what others use of them."""
        steady, mib = need.steady(group.count), need.on(group.cards[0], group.count)
        return cls(
            group.count,
            need.source(group.cards[0], group.count) is Source.UNKNOWN,
            tuple(
                (card, mib if steady else need.on(card, group.count))
                for card in group.cards
                if not card.closed
            ),
        )


class Places:
    """Looks for places in one plan's ledger."""

    def __init__(self, ledger: Ledger, victims: Victims) -> None:
        self.ledger, self.victims = ledger, victims
        self._alike = alike(ledger.cards.values())
        self._standing = {card: _Standing(card, ledger, victims) for card in ledger.cards}
        self._groups: dict[str, list[Group]] = {}
        self._sites: dict[str, list[_Sites]] = {}

    def groups(self, need: Need) -> list[Group]:
        """As the function `groups`, of all cards."""
        found = self._groups.get(need.model)
        if found is None:
            found = self._groups[need.model] = _fitting(need, self._alike.get(need.pool, ()))
        return found

    def free(self, need: Need) -> Chosen | None:
        """Best fit: cards with room now, those at rest before gated ones, then where the least stays free."""
        own, there = need.model in self.ledger.intents, self._there()
        options = []
        for sites in self._of(need):
            fits = []
            for card, mib in sites.cards:
                free = self.ledger.free(card.id, need.model) if own else there[card.id].free
                if free >= mib:
                    fits.append(Spot(card, mib, free - mib))
            options.append((sites.count, fits))
        return _cheapest(options, lambda spot: (there[spot.card.id].gated, spot.left, spot.card.id))

    def conceivable(self, need: Need) -> bool:
        """There would be room if all went that can ever be made to go. It has no intent."""
        there = self._there()
        return any(
            sum(there[card.id].movable >= mib for card, mib in sites.cards) >= sites.count
            for sites in self._of(need)
        )

    def made(self, need: Need, since: float | None) -> Chosen | None:
        """The cards on which the least harm makes room. It has no intent.

        1. Where idle ones suffice, nobody else is asked to go.
        2. Else busy ones too, the fewest, for tickets that wait `since` then (None = for nobody).
        3. Then by who has to go (`Victims`): the costliest of a card's victims is compared; then what their
           next loads would cost in all; then fewer victims; then the card on which less stays free.
        """
        for busy in (False, True) if since is not None else (False,):
            options = [(sites.count, self._spots(sites, since if busy else None)) for sites in self._of(need)]
            if (chosen := _cheapest(options, _harm)) is not None:
                return self._none_in_vain(chosen)
        return None

    def _spots(self, sites: _Sites, since: float | None) -> list[Spot]:
        """Its cards with room to be made; by idle ones alone when `since` is None.

        For a whole card, for want of a number, busy ones aren't told to go: it waits until they are idle.
        """
        found, there = [], self._there()
        for card, mib in sites.cards:
            at = there[card.id]
            if (at.unused_room if since is None else at.movable) < mib:
                continue
            ranked = at.unused
            if since is not None and at.unused_room < mib:
                ranked = [*ranked, *self.victims.used(at.used, None if sites.unknown else since)]
            victims = _fewest(ranked, mib - at.room)
            if victims is not None:
                found.append(Spot(card, mib, at.room - mib + _freed(victims), victims))
        return found

    def _none_in_vain(self, chosen: Chosen) -> Chosen:
        """Of servers on several of the cards some may have been chosen for one whose going another makes
        needless."""
        if len(chosen.spots) == 1:
            return chosen
        union = {one.item.id: one for spot in chosen.spots for one in spot.victims}
        there = self._there()

        def left(spot: Spot, rest: Iterable[Candidate]) -> int:
            gone = sum(one.item.reserved_mib for one in rest if spot.card.id in one.item.devices)
            return there[spot.card.id].room + gone - spot.need

        for one in sorted(union.values(), key=order, reverse=True):
            rest = {id_: other for id_, other in union.items() if other is not one}
            if all(left(spot, rest.values()) >= 0 for spot in chosen.spots):
                union = rest
        return Chosen(
            tuple(
                Spot(
                    spot.card,
                    spot.need,
                    left(spot, union.values()),
                    tuple(one for one in union.values() if spot.card.id in one.item.devices),
                )
                for spot in chosen.spots
            )
        )

    def _of(self, need: Need) -> list[_Sites]:
        found = self._sites.get(need.model)
        if found is None:
            found = self._sites[need.model] = [_Sites.of(need, group) for group in self.groups(need)]
        return found

    def _there(self) -> Mapping[str, _Standing]:
        """By card, as it is now."""
        for card in self.ledger.touched:
            self._standing[card] = _Standing(card, self.ledger, self.victims)
        self.ledger.touched.clear()
        return self._standing


def _fewest(ranked: Sequence[Candidate], lacking: int) -> tuple[Candidate, ...] | None:
    """Who goes for so many MiB: from the first on until it is enough, and none in vain; or instead of several
    one that suffices alone and costs no more than the costliest of them."""
    victims, room = [], 0
    for one in ranked:
        if room >= lacking:
            break
        victims.append(one)
        room += one.item.reserved_mib
    if room < lacking:
        return None
    if len(victims) > 1:
        for one in list(victims):
            if room - one.item.reserved_mib >= lacking:  # a large one that was taken last makes it needless
                victims.remove(one)
                room -= one.item.reserved_mib
        limit = max(one.cost for one in victims)
        alone = (one for one in ranked if one.item.reserved_mib >= lacking and one.cost <= limit)
        if len(victims) > 1 and (instead := next(alone, None)) is not None:
            victims = [instead]
    return tuple(victims)


_NONE: Cost = (False, -math.inf, False, -math.inf)


def _harm(spot: Spot) -> tuple[object, ...]:
    busy, worst, missed, reload = 0, _NONE, 0.0, 0.0
    for one in spot.victims:
        busy += one.busy
        worst = max(worst, one.cost)
        missed += one.detail[0]
        reload += one.detail[1]
    return busy, worst, missed, reload, len(spot.victims), spot.left, spot.card.id


def _freed(victims: Iterable[Candidate]) -> int:
    mib = 0
    for one in victims:
        mib += one.item.reserved_mib
    return mib


def _cheapest(
    options: Iterable[tuple[int, list[Spot]]], key: Callable[[Spot], tuple[object, ...]]
) -> Chosen | None:
    best: tuple[tuple[object, int, list[tuple[object, ...]]], Chosen] | None = None
    for count, spots in options:
        if len(spots) < count:
            continue
        taken = sorted(spots, key=key)[:count] if count > 1 else [min(spots, key=key)]
        # The worst card decides: a server waits for the last of its cards. Then few cards before many.
        keys = [key(spot) for spot in reversed(taken)]
        cost = (keys[0][0], count, keys)
        if best is None or cost < best[0]:
            best = cost, Chosen(tuple(sorted(taken, key=lambda spot: spot.card.id)))
    return best[1] if best else None


def _leaves(item: Instance) -> bool:
    """It goes without being told again, unless its reason goes first."""
    return item.state in (InstanceState.STOPPING, InstanceState.DRAINING)
