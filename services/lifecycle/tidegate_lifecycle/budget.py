"""The memory of the cards: who holds what, what is promised to whom, and what is free. Pure; MiB per card."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from tidegate_lifecycle.instance import Instance, InstanceState


@dataclass(frozen=True)
class Card:
    """One device as the planner sees it."""

    id: str
    pool: str
    total_mib: int
    budget_mib: int
    """What model servers may use of it: total times the budget's share."""
    foreign_mib: int = 0
    """Used by others; 0 when unknown."""
    kind: str = ""
    """The product's name: footprints hold for one kind; empty = declared."""
    settling_mib: int = 0
    """Of servers that have gone, and not shown as free by the driver yet: not free, but about to be."""
    draining: bool = False
    """An operator has taken it back."""
    missing: bool = False
    """The driver doesn't show it any more."""

    @property
    def closed(self) -> str:
        """Why nothing new is placed there; empty = it may be."""
        if self.draining:
            return "was taken back by an operator"
        return "isn't shown by the driver" if self.missing else ""

    @property
    def usable_mib(self) -> int:
        """What is left of the budget beside others' use."""
        return max(0, self.budget_mib - self.foreign_mib)


@dataclass(frozen=True)
class Intent:
    """Room that is made, or waited for: reserved for `model` on all its cards at once, dropped whole."""

    model: str
    devices: tuple[str, ...]
    needs: tuple[int, ...]
    """MiB on each of `devices`."""
    victims: tuple[str, ...]
    """Instances whose leaving makes the room; those that have gone are no longer in it."""
    begun: bool = False
    """A victim was told to drain: from now on the cards are fixed and the intent comes before every turn."""


class Ledger:
    """A working copy of who holds and claims what; `plan` writes its own decisions into it."""

    def __init__(self, cards: Iterable[Card], instances: Iterable[Instance]) -> None:
        self.cards: dict[str, Card] = {card.id: card for card in cards}
        self.on: dict[str, list[Instance]] = {card: [] for card in self.cards}
        for instance in instances:
            for card in instance.devices if instance.exists else ():
                if card in self.on:
                    self.on[card].append(instance)
        self.started: dict[str, int] = dict.fromkeys(self.cards, 0)
        """MiB of the starts that this plan orders."""
        self.changing: set[str] = set()
        """Cards on which this plan orders a start or a stop."""
        self.intents: dict[str, Intent] = {}

    def gated(self, card: str) -> bool:
        """Nothing may start or stop there: a server is taking its memory, or giving it back."""
        busy = (InstanceState.STARTING, InstanceState.WAKING, InstanceState.FALLING_ASLEEP)
        return (
            card in self.changing
            or self.cards[card].settling_mib > 0
            or any(item.state in busy or item.state is InstanceState.STOPPING for item in self.on[card])
        )

    def stop_gated(self, card: str) -> bool:
        """Nothing may stop there: a server is taking its memory. Two stops don't disturb each other."""
        states = (InstanceState.STARTING, InstanceState.WAKING)
        return self.started[card] > 0 or any(item.state in states for item in self.on[card])

    def reserved(self, card: str) -> int:
        """MiB held by instances and promised to starts of this plan."""
        return sum(item.reserved_mib for item in self.on[card]) + self.started[card]

    def claimed(self, card: str, but: str) -> int:
        """MiB that intents of models other than `but` reserve there."""
        return sum(
            need
            for intent in self.intents.values()
            if intent.model != but
            for device, need in zip(intent.devices, intent.needs, strict=True)
            if device == card
        )

    def victims(self, but: str) -> set[str]:
        """Instances that make room for models other than `but`."""
        return {v for intent in self.intents.values() if intent.model != but for v in intent.victims}

    def free(self, card: str, model: str) -> int:
        """MiB that `model` may take there now: what is free, less what others were promised."""
        usable = self.cards[card].usable_mib - self.cards[card].settling_mib
        return min(usable - self.reserved(card), self.room(card, model, ()))

    def room(self, card: str, model: str, leaving: Collection[str]) -> int:
        """MiB for `model` once `leaving`, and the victims of others' intents, have gone and settled."""
        gone = self.victims(model).union(leaving)
        held = sum(item.reserved_mib for item in self.on[card] if item.id not in gone)
        return self.cards[card].usable_mib - held - self.started[card] - self.claimed(card, model)

    def suffices(self, intent: Intent) -> bool:
        """Its victims make its room, others' begun intents considered; what has not begun may never come."""
        firm = Ledger(self.cards.values(), ())
        firm.on, firm.started = self.on, self.started
        firm.intents = {model: other for model, other in self.intents.items() if other.begun}
        rooms = (firm.room(card, intent.model, intent.victims) for card in intent.devices)
        return all(room >= need for room, need in zip(rooms, intent.needs, strict=True))

    def violation(self) -> Mapping[str, int]:
        """Cards whose reservations exceed the budget (others' use aside: it can grow), and by how much."""
        excess = {card: self.reserved(card) - self.cards[card].budget_mib for card in self.cards}
        return {card: mib for card, mib in excess.items() if mib > 0}
