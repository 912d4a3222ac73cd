"""What a model needs and how that is known, in words and numbers for `tidegate explain`. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate_lifecycle.budget import Card
from tidegate_lifecycle.needs import Need, Source
from tidegate_lifecycle.placing import gib, groups


def need_text(need: Need, cards: Iterable[Card]) -> str:
    """One sentence: the source, the amount on each of so many cards, and how it came about."""
    if need.pending:
        return "unknown yet: its files are being read"
    pool = [card for card in cards if card.pool == need.pool]
    found = min(groups(need, pool), key=lambda group: need.on(group.cards[0], group.count), default=None)
    if found is None:
        why = f"; {need.estimate.why}" if need.estimate.why and not need.declared else ""
        return f"more than any card of the pool {need.pool} may hold{why}"
    card, count = found.cards[0], found.count
    source = need.source(card, count)
    if source is Source.UNKNOWN:
        reason = f": {need.estimate.why}" if need.estimate.why else ""
        return f"unknown{reason}; it gets a whole card, and only idle models go for it"
    amount = f"{source.value}: {gib(need.on(card, count))} GiB{_each(count)}"
    if source is not Source.ESTIMATED:
        return amount
    full, least = need.estimate.mib[count], need.estimate.least.get(count, 0)
    shrunk = ""
    if full > need.on(card, count):
        shrunk = f"; {gib(full)} GiB were asked for, {gib(least)} would do for one sequence"
    return f"{amount} from {need.estimate.why}{shrunk}"


def _each(count: int) -> str:
    return f" on each of {count} cards" if count > 1 else ""
