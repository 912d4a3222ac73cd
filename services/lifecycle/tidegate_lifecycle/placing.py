"""Where a model could run, and who would have to go for it. Pure; part of the planner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tidegate_lifecycle.budget import Card, Intent, Ledger
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.needs import Need, Source


@dataclass(frozen=True)
class Spot:
    """One card with what must leave it."""

    card: Card
    need: int
    left: int
    """MiB that stay free there."""
    victims: tuple[Instance, ...] = ()
    busy: int = 0
    """How many of the victims have demand."""
    free_at: float = -math.inf
    """When the last of the victims may be told to drain; -inf = at once; inf = unknown."""


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
        return tuple({item.id: item for spot in self.spots for item in spot.victims}.values())

    @property
    def free_at(self) -> float:
        """When the last of the victims may be told to drain."""
        return max(spot.free_at for spot in self.spots)

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
    alike: dict[tuple[str, int, int], list[Card]] = {}
    for card in cards:
        if card.pool == need.pool:
            alike.setdefault((card.kind, card.total_mib, card.budget_mib), []).append(card)
    found = []
    for equal in alike.values():
        fits = (count for count in need.counts if count <= len(equal) and _fits(need, equal[0], count))
        if (count := next(fits, None)) is not None:
            found.append(Group(tuple(equal), count))
    return found


def _fits(need: Need, card: Card, count: int) -> bool:
    unknown = need.source(card, count) is Source.UNKNOWN
    return card.budget_mib > 0 if unknown else 0 < need.on(card, count) <= card.budget_mib


def choose_free(need: Need, ledger: Ledger) -> Chosen | None:
    """Best fit: the cards with room now on which the least stays free; those at rest before gated ones."""
    options = []
    for group in groups(need, ledger.cards.values()):
        fits = []
        for card in group.cards:
            if card.closed:
                continue
            mib, free = need.on(card, group.count), ledger.free(card.id, need.model)
            if card.usable_mib >= mib and free >= mib:
                fits.append(Spot(card, mib, free - mib))
        options.append((group.count, fits))
    return _cheapest(options, lambda spot: (ledger.gated(spot.card.id), spot.left, spot.card.id))


def choose_victims(
    need: Need,
    ledger: Ledger,
    idle: Callable[[Instance], bool],
    free_at: Callable[[Instance], float | None],
) -> Chosen | None:
    """The cards on which the least harm makes room: fewest busy victims, then the longest unused ones.

    `idle` says whether an instance may go at once; `free_at` when it may be told to drain (inf = unknown),
    None = it may not go for this model at all.
    """
    taken = ledger.victims(need.model)
    options = []
    for group in groups(need, ledger.cards.values()):
        open_ones = [card for card in group.cards if not card.closed]
        found = (_spot(need, card, group.count, ledger, taken, idle, free_at) for card in open_ones)
        options.append((group.count, [spot for spot in found if spot is not None]))
    return _cheapest(options, _harm)


def _harm(spot: Spot) -> tuple[int, float, float, int, int, str]:
    last = max((item.last_used for item in spot.victims), default=-math.inf)
    return spot.busy, spot.free_at, last, len(spot.victims), spot.left, spot.card.id


def _cheapest(
    options: list[tuple[int, list[Spot]]], key: Callable[[Spot], tuple[object, ...]]
) -> Chosen | None:
    best: tuple[tuple[object, int, list[tuple[object, ...]]], Chosen] | None = None
    for count, spots in options:
        if len(spots) < count:
            continue
        taken = sorted(spots, key=key)[:count]
        # The worst card decides: a server waits for the last of its cards. Then few cards before many.
        keys = [key(spot) for spot in reversed(taken)]
        cost = (keys[0][0], count, keys)
        if best is None or cost < best[0]:
            best = cost, Chosen(tuple(sorted(taken, key=lambda spot: spot.card.id)))
    return best[1] if best else None


def _spot(
    need: Need,
    card: Card,
    count: int,
    ledger: Ledger,
    taken: set[str],
    idle: Callable[[Instance], bool],
    free_at: Callable[[Instance], float | None],
) -> Spot | None:
    """The victims on one card: what leaves anyway, idle ones by last use, then busy ones; none in vain.

    For a whole card, for want of a number, busy ones aren't told to go: it waits until they are idle.
    """
    mib = need.on(card, count)
    gentle = need.source(card, count) is Source.UNKNOWN
    leaving = [item for item in ledger.on[card.id] if _leaves(item) and item.id not in taken]
    victims: list[Instance] = []
    candidates = [item for item in ledger.on[card.id] if not _leaves(item) and item.id not in taken]
    ranked = sorted(
        (
            (not idle(item), at if idle(item) or not gentle else math.inf, item.last_used, item)
            for item in candidates
            if (at := free_at(item)) is not None
        ),
        key=lambda entry: entry[:3],
    )

    def room(without: Iterable[Instance]) -> int:
        return ledger.room(card.id, need.model, {item.id for item in [*leaving, *without]})

    for _, _, _, item in ranked:
        if room(victims) >= mib:
            break
        victims.append(item)
    if room(victims) < mib:
        return None
    for item in list(victims):  # a large one that was taken last may have made smaller ones needless
        rest = [other for other in victims if other is not item]
        if room(rest) >= mib:
            victims = rest
    times = {item.id: at for _, at, _, item in ranked}
    at = max((times[item.id] for item in victims), default=-math.inf)
    busy = sum(not idle(item) for item in victims)
    return Spot(card, mib, room(victims) - mib, tuple(victims), busy, at)


def _leaves(item: Instance) -> bool:
    """It goes without being told again, unless its reason goes first."""
    return item.state in (InstanceState.STOPPING, InstanceState.DRAINING)


def describe(need: Need, ledger: Ledger, now: float) -> str:
    """Why it has no room: "needs 38.2 GiB; gpu0 has 21 free of 24, held by b 18 GiB idle 4 min"."""
    if not any(card.pool == need.pool for card in ledger.cards.values()):
        return f"there is no device in the pool {need.pool}"
    options = groups(need, ledger.cards.values())
    needs = {(need.on(group.cards[0], group.count), group.count) for group in options}
    if need.pending:
        text = "what it needs is being read from its files"
    elif len(needs) == 1:
        mib, count = needs.pop()
        text = f"needs {gib(mib)} GiB{_each(count)}"
    else:
        text = f"needs a share of a device{_each(options[0].count if options else 1)}"
    return "; ".join([text, *device_lines(need, ledger, now)])


def too_large(need: Need, ledger: Ledger) -> str:
    """Why it can never be placed, in numbers that don't change with time."""
    cards = [card for card in ledger.cards.values() if card.pool == need.pool]
    counts = [count for count in need.counts if count <= len(cards)]
    if not counts:
        return f"needs {need.counts[0]} equal devices; the pool {need.pool} has {len(cards)}"
    count = counts[-1]
    mib = min(need.on(card, count) for card in cards)
    budgets = ", ".join(f"{card.id} {gib(card.budget_mib)}" for card in cards)
    return f"needs {gib(mib)} GiB{_each(count)}; of the devices may be used: {budgets}"


def _each(count: int) -> str:
    return f" on each of {count} equal devices" if count > 1 else ""


def device_lines(need: Need, ledger: Ledger, now: float) -> tuple[str, ...]:
    """Per device of its pool: what is there, what is free, who holds the rest."""
    return tuple(_line(card, ledger, now) for card in ledger.cards.values() if card.pool == need.pool)


def _line(card: Card, ledger: Ledger, now: float) -> str:
    free = max(0, card.usable_mib - card.settling_mib - ledger.reserved(card.id))
    parts = [f"{card.id} {card.closed or f'has {gib(free)} free of {gib(card.budget_mib)}'}"]
    parts += [f"held by {_holder(item, now)}" for item in ledger.on[card.id]]
    if card.foreign_mib:
        parts.append(f"{gib(card.foreign_mib)} GiB used by others")
    if card.settling_mib:
        parts.append(f"{gib(card.settling_mib)} GiB about to be free")
    parts += [
        f"{gib(need)} GiB promised to {intent.model}"
        for intent in ledger.intents.values()
        for device, need in zip(intent.devices, intent.needs, strict=True)
        if device == card.id
    ]
    return ", ".join(parts)


def _holder(item: Instance, now: float) -> str:
    text = f"{item.model} {gib(item.reserved_mib)} GiB"
    if item.state is not InstanceState.READY:
        return f"{text} {item.state.name.lower()}"
    if item.leases:
        return f"{text} with {item.leases} in flight"
    return f"{text} idle {_span(now - item.last_used)}"


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{max(0.0, seconds):.0f} s"


def gib(mib: int) -> str:
    """MiB as a short number of GiB."""
    return f"{mib / 1024:.1f}".removesuffix(".0")
