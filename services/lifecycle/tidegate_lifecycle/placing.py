"""Where a model could run, and who would have to go for it. Pure; part of the planner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tidegate_lifecycle.budget import Card, Intent, Ledger, need_on
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.instance import Instance, InstanceState


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


def groups(model: Model, cards: Iterable[Card]) -> list[list[Card]]:
    """Cards of its pool in groups of equal ones, each large enough for its tensor_parallel_size and need."""
    by_size: dict[tuple[int, int], list[Card]] = {}
    for card in cards:
        if card.pool == model.pool and 0 < need_on(model, card) <= card.budget_mib:
            by_size.setdefault((card.total_mib, card.budget_mib), []).append(card)
    count = model.tensor_parallel_size or 1
    return [group for group in by_size.values() if len(group) >= count]


def choose_free(model: Model, ledger: Ledger) -> Chosen | None:
    """Best fit: the cards with room now on which the least stays free; those at rest before gated ones."""
    spots = []
    for group in groups(model, ledger.cards.values()):
        fits = []
        for card in group:
            if card.closed:
                continue
            need, free = need_on(model, card), ledger.free(card.id, model.name)
            if card.usable_mib >= need and free >= need:
                fits.append(Spot(card, need, free - need))
        spots.append(fits)
    return _cheapest(model, spots, lambda spot: (ledger.gated(spot.card.id), spot.left, spot.card.id))


def choose_victims(
    model: Model,
    ledger: Ledger,
    idle: Callable[[Instance], bool],
    free_at: Callable[[Instance], float | None],
) -> Chosen | None:
    """The cards on which the least harm makes room: fewest busy victims, then the longest unused ones.

    `idle` says whether an instance may go at once; `free_at` when it may be told to drain (inf = unknown),
    None = it may not go for this model at all.
    """
    taken = ledger.victims(model.name)
    spots = []
    for group in groups(model, ledger.cards.values()):
        found = (_spot(model, card, ledger, taken, idle, free_at) for card in group if not card.closed)
        spots.append([spot for spot in found if spot is not None])
    return _cheapest(model, spots, _harm)


def _harm(spot: Spot) -> tuple[int, float, float, int, int, str]:
    last = max((item.last_used for item in spot.victims), default=-math.inf)
    return spot.busy, spot.free_at, last, len(spot.victims), spot.left, spot.card.id


def _cheapest(
    model: Model, spots: list[list[Spot]], key: Callable[[Spot], tuple[object, ...]]
) -> Chosen | None:
    count = model.tensor_parallel_size or 1
    best: tuple[list[tuple[object, ...]], Chosen] | None = None
    for group in spots:
        if len(group) < count:
            continue
        taken = sorted(group, key=key)[:count]
        # The worst card decides: a server waits for the last of its cards.
        cost = [key(spot) for spot in reversed(taken)]
        if best is None or cost < best[0]:
            best = cost, Chosen(tuple(sorted(taken, key=lambda spot: spot.card.id)))
    return best[1] if best else None


def _spot(
    model: Model,
    card: Card,
    ledger: Ledger,
    taken: set[str],
    idle: Callable[[Instance], bool],
    free_at: Callable[[Instance], float | None],
) -> Spot | None:
    """The victims on one card: what leaves anyway, idle ones by last use, then busy ones; none in vain."""
    need = need_on(model, card)
    leaving = [item for item in ledger.on[card.id] if _leaves(item) and item.id not in taken]
    victims: list[Instance] = []
    candidates = [item for item in ledger.on[card.id] if not _leaves(item) and item.id not in taken]
    ranked = sorted(
        (
            (not idle(item), at, item.last_used, item)
            for item in candidates
            if (at := free_at(item)) is not None
        ),
        key=lambda entry: entry[:3],
    )

    def room(without: Iterable[Instance]) -> int:
        return ledger.room(card.id, model.name, {item.id for item in [*leaving, *without]})

    for _, _, _, item in ranked:
        if room(victims) >= need:
            break
        victims.append(item)
    if room(victims) < need:
        return None
    for item in list(victims):  # a large one that was taken last may have made smaller ones needless
        rest = [other for other in victims if other is not item]
        if room(rest) >= need:
            victims = rest
    times = {item.id: at for _, at, _, item in ranked}
    at = max((times[item.id] for item in victims), default=-math.inf)
    busy = sum(not idle(item) for item in victims)
    return Spot(card, need, room(victims) - need, tuple(victims), busy, at)


def _leaves(item: Instance) -> bool:
    """It goes without being told again, unless its reason goes first."""
    return item.state in (InstanceState.STOPPING, InstanceState.DRAINING)


def describe(model: Model, ledger: Ledger, now: float) -> str:
    """Why it has no room: "needs 38.2 GiB; gpu0 has 21 free of 24, held by b 18 GiB idle 4 min"."""
    cards = [card for card in ledger.cards.values() if card.pool == model.pool]
    if not cards:
        return f"there is no device in the pool {model.pool}"
    needs = sorted({need_on(model, card) for card in cards})
    count = model.tensor_parallel_size or 1
    each = f" on each of {count} equal devices" if count > 1 else ""
    need = f"needs {gib(needs[0])} GiB{each}" if len(needs) == 1 else f"needs a share of a device{each}"
    return "; ".join([need, *device_lines(model, ledger, now)])


def too_large(model: Model, ledger: Ledger) -> str:
    """Why it can never be placed, in numbers that don't change with time."""
    cards = [card for card in ledger.cards.values() if card.pool == model.pool]
    count = model.tensor_parallel_size or 1
    if len(cards) < count:
        return f"needs {count} equal devices; the pool {model.pool} has {len(cards)}"
    need = min(need_on(model, card) for card in cards)
    each = f" on each of {count} equal devices" if count > 1 else ""
    budgets = ", ".join(f"{card.id} {gib(card.budget_mib)}" for card in cards)
    return f"needs {gib(need)} GiB{each}; of the devices may be used: {budgets}"


def device_lines(model: Model, ledger: Ledger, now: float) -> tuple[str, ...]:
    """Per device of its pool: what is there, what is free, who holds the rest."""
    return tuple(_line(card, ledger, now) for card in ledger.cards.values() if card.pool == model.pool)


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
