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
    settles: float = 0.0
    """Seconds in which that must be shown free; 0 = nobody can be asked: it is taken as free at once."""
    draining: bool = False
    """An operator has taken it back."""
    missing: bool = False
    """The driver doesn't show it any more."""
    part: bool = False
    """A part of a card (MIG): CUDA shows a process one of them, so that no server is spread over several."""

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
        self._instances = {instance.id: instance for instance in instances}
        for instance in self._instances.values():
            for card in instance.devices if instance.exists else ():
                if card in self.on:
                    self.on[card].append(instance)
        self.started: dict[str, int] = dict.fromkeys(self.cards, 0)
        """MiB of the starts that this plan orders."""
        self.changing: set[str] = set()
        """Cards on which this plan orders a start or a stop."""
        self.intents: dict[str, Intent] = {}
        """By model; changed by `claim` and `drop` alone."""
        self.touched: set[str] = set()
        """Cards on which something was started, stopped, promised or told to leave since this was cleared."""
        self._claims: dict[str, dict[str, int]] = {card: {} for card in self.cards}
        self._claimants: dict[str, set[str]] = {}
        """By instance: the models for which it leaves."""
        self._held = {card: sum(item.reserved_mib for item in items) for card, items in self.on.items()}

    def claim(self, intent: Intent) -> None:
        """Promises its room; a model has one intent at most."""
        self.drop(intent.model)
        self.intents[intent.model] = intent
        for card, need in zip(intent.devices, intent.needs, strict=True):
            self._claims[card][intent.model] = need
        for victim in intent.victims:
            self._claimants.setdefault(victim, set()).add(intent.model)
        self._changed(intent)

    def drop(self, model: str) -> None:
        """Takes the promise back, if there is one."""
        intent = self.intents.pop(model, None)
        if intent is None:
            return
        for card in intent.devices:
            del self._claims[card][model]
        for victim in intent.victims:
            self._claimants[victim].discard(model)
        self._changed(intent)

    def start(self, card: str, mib: int) -> None:
        """A server is started there by this plan."""
        self.started[card] += mib
        self.changing.add(card)
        self.touched.add(card)

    def stop(self, cards: Iterable[str]) -> None:
        """A server is stopped there by this plan."""
        self.changing.update(cards)
        self.touched.update(self.cards.keys() & set(cards))

    def _changed(self, intent: Intent) -> None:
        self.touched.update(intent.devices)
        for victim in intent.victims:  # it may be on more cards than the intent is
            if victim in self._instances:
                self.touched.update(self.cards.keys() & set(self._instances[victim].devices))

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
        return self._held[card] + self.started[card]

    def claimed(self, card: str, but: str) -> int:
        """MiB that intents of models other than `but` reserve there."""
        claims = self._claims[card]
        return sum(claims.values()) - claims.get(but, 0)

    def claims(self, card: str) -> Mapping[str, int]:
        """MiB that intents reserve there, by model."""
        return self._claims[card]

    def makes_room(self, instance_id: str, but: str) -> bool:
        """It leaves for a model other than `but`."""
        models = self._claimants.get(instance_id)
        return bool(models) and models != {but}

    def free(self, card: str, model: str) -> int:
        """MiB that `model` may take there now: what is free, less what others were promised."""
        usable = self.cards[card].usable_mib - self.cards[card].settling_mib
        return min(usable - self.reserved(card), self.room(card, model, ()))

    def room(self, card: str, model: str, leaving: Collection[str]) -> int:
        """MiB for `model` once `leaving`, and the victims of others' intents, have gone and settled."""
        held = sum(
            item.reserved_mib
            for item in self.on[card]
            if item.id not in leaving and not self.makes_room(item.id, model)
        )
        return self.cards[card].usable_mib - held - self.started[card] - self.claimed(card, model)

    def suffices(self, intent: Intent) -> bool:
        """Its victims make its room, others' begun intents considered; what has not begun may never come."""
        begun = [one for one in self.intents.values() if one.begun and one.model != intent.model]
        gone = {victim for one in (intent, *begun) for victim in one.victims}
        for card, need in zip(intent.devices, intent.needs, strict=True):
            held = sum(item.reserved_mib for item in self.on[card] if item.id not in gone)
            claimed = sum(self._claims[card].get(one.model, 0) for one in begun)
            if self.cards[card].usable_mib - held - self.started[card] - claimed < need:
                return False
        return True

    def violation(self) -> Mapping[str, int]:
        """Cards whose reservations exceed the budget (others' use aside: it can grow), and by how much."""
        excess = {card: self.reserved(card) - self.cards[card].budget_mib for card in self.cards}
        return {card: mib for card, mib in excess.items() if mib > 0}
