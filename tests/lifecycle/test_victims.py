"""Who has to go for another model: the ranking case by case, and what holds for every choice."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lifecycle.test_planner import GIB, NOW, card, model, running, waits, world
from tests.support.depth import examples
from tidegate_lifecycle.budget import Intent, Ledger
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.instance import DrainCause, Instance, InstanceState
from tidegate_lifecycle.needs import need_of
from tidegate_lifecycle.placing import Places
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.victims import GRANT_TIME, Victims
from tidegate_lifecycle.world import Demand, Policy, StartDrain, World


def evicted(seen: World, now: float = NOW) -> list[str]:
    """Instances that are told to make room."""
    actions = plan(seen, now).actions
    drains = [action for action in actions if isinstance(action, StartDrain)]
    return [action.instance_id for action in drains if action.cause is DrainCause.EVICTION]


def wanted(*items: Instance, gib: int = 10, **keys: Any) -> World:
    """A world in which model `new` wants room on one card of 24 GiB that these instances fill."""
    models = [model(name) for name in sorted({item.model for item in items})]
    demand = {"new": waits(), **keys.pop("demand", {})}
    return world(model("new", gib), *models, instances=items, demand=demand, **keys)


def idle(name: str, gib: int = 12, since: float = 0.0, **keys: Any) -> Instance:
    """Unused for so many seconds."""
    return running(name, gib, last_used=NOW - since, **keys)


def test_the_longer_unused_one_goes() -> None:
    """Whatever it would cost to load it again."""
    seen = wanted(idle("a", since=600), idle("b", since=30), load_times={"a": 500.0, "b": 5.0})
    assert evicted(seen) == ["a-1"]


def test_of_two_used_about_as_long_ago_the_one_that_is_missed_less_goes() -> None:
    """First by arrivals × reload, then by the reload, and only then by the last use."""
    pair = idle("a", since=50), idle("b", since=40)
    assert evicted(wanted(*pair)) == ["a-1"]
    assert evicted(wanted(*pair, load_times={"a": 100.0, "b": 5.0})) == ["b-1"]
    rates = {"a": Demand(arrival_rate=0.1), "b": Demand(arrival_rate=3.0)}
    assert evicted(wanted(*pair, load_times={"a": 100.0, "b": 5.0}, demand=rates)) == ["a-1"]


def test_a_reload_that_was_never_seen_is_reckoned_from_the_size() -> None:
    """Two cards' worth of a model load longer than one."""
    small, large = idle("a", 4, since=40), idle("b", 20, since=50)
    assert evicted(wanted(small, large, gib=4)) == ["a-1"]


def test_one_that_suffices_alone_goes_in_place_of_several_of_its_age() -> None:
    """Best fit and fewest victims within a step of age; but never a younger one for the sake of number."""
    cards = (card(gib=24),)
    trio = idle("a", 6, since=45), idle("b", 6, since=44), idle("c", 12, since=43)
    assert evicted(wanted(*trio, cards=cards, gib=12)) == ["c-1"]
    younger = idle("a", 6, since=600), idle("b", 6, since=599), idle("c", 12, since=10)
    assert sorted(evicted(wanted(*younger, cards=cards, gib=12))) == ["a-1", "b-1"]


def test_a_second_server_goes_before_an_only_one() -> None:
    """Idle or busy: its model goes on being served. No busy one goes while an idle one suffices."""
    first, second = running("a", 8), running("a", 8, id="a-2", ordered_at=5.0, last_used=NOW)
    other = idle("b", 8, since=3600)
    assert evicted(wanted(first, second, other, gib=8)) == ["a-2"]
    first.leases = second.leases = 3
    assert evicted(wanted(first, second, other, gib=8)) == ["b-1"], "an idle one before a busy one"
    other.leases = 1
    other.ready_at = first.ready_at = second.ready_at = NOW - 1  # all in their residency
    assert evicted(wanted(first, second, other, gib=8)) == ["a-2"], "a busy second one has no turn of its own"
    assert evicted(wanted(first, other, gib=8)) == []


def test_always_on_and_pinned_ones_never_go() -> None:
    """However long they are idle."""
    kept, pinned = idle("on", 10, since=9999), idle("p", 10, since=9999)
    models = model("new"), Model("on", vram_mib=10 * GIB, always_on=True), model("p")
    keys: dict[str, Any] = {"instances": (kept, pinned), "demand": {"new": waits(0.0)}}
    assert not evicted(world(*models, **keys, pinned=frozenset({"p"})))
    assert evicted(world(*models, **keys)) == ["p-1"]


def test_who_has_just_become_ready_is_granted_first_even_without_turns() -> None:
    """With `max_swap_wait` 0 the other one's waiter would evict it before anybody was served, for ever."""
    fresh = running("b", 20, ready_at=NOW)
    keys: dict[str, Any] = {
        "instances": (fresh,),
        "demand": {"a": waits(NOW - 50), "b": waits(NOW - 40)},
        "policy": Policy(min_residency=0.0, max_swap_wait=0.0),
    }
    seen = world(model("a", 20), model("b", 20), **keys)
    assert not evicted(seen)
    assert plan(seen, NOW).wake_at == NOW + GRANT_TIME
    assert evicted(seen, NOW + GRANT_TIME) == ["b-1"]


def test_what_can_never_fit_evicts_nothing() -> None:
    """Not even where all are idle."""
    assert not evicted(wanted(idle("a", since=999), idle("b", since=999), gib=25))


def crowd(seed: int) -> tuple[World, Model, dict[str, Instance]]:
    """Cards full of servers, some in use, some spread over several cards; and a model that wants room."""
    dice = random.Random(seed)
    cards = tuple(card(f"gpu{number}", 24) for number in range(dice.randint(1, 5)))
    ledger = Ledger(cards, ())
    models, items = {}, []
    for number in range(dice.randint(1, 14)):
        name, need = f"m{number}", dice.randint(2, 16) * GIB
        count = dice.choice([1, 1, 1, 2])
        room = [one.id for one in cards if ledger.free(one.id, name) >= need][:count]
        if len(room) < count:
            continue
        models[name] = Model(name, vram_mib=need, tensor_parallel_size=count, always_on=dice.random() < 0.1)
        item = running(
            name, need // GIB, on=tuple(room), last_used=NOW - dice.choice([1, 20, 300, 301, 5000])
        )
        item.leases = dice.choice([0, 0, 2])
        item.ready_at = NOW - dice.choice([5, 500])
        items.append(item)
        ledger = Ledger(cards, items)
    new = Model("new", vram_mib=dice.randint(2, 24) * GIB, tensor_parallel_size=dice.randint(1, len(cards)))
    demand = {"new": waits(NOW - dice.choice([1, 100]))}
    rates = {name: Demand(arrival_rate=dice.random()) for name in models if dice.random() < 0.3}
    seen = world(new, *models.values(), cards=cards, instances=tuple(items), demand=demand | rates)
    return seen, new, {item.id: item for item in items}


@settings(max_examples=examples(150), deadline=None)
@given(seed=st.integers(0, 10**9))
def test_nobody_goes_in_vain(seed: int) -> None:
    """Whoever is told to go: with all of them there is room, without any one of them there isn't; no busy one
    goes where idle ones suffice; who keeps his room stays."""
    seen, new, items = crowd(seed)
    decided = plan(seen, NOW)
    gone = evicted(seen)
    intent = next((one for one in decided.intents if one.model == "new"), None)
    assert bool(gone) == (intent is not None and intent.begun)
    if intent is None or not gone:
        return
    ledger = Ledger(seen.cards, items.values())
    assert set(gone) == set(intent.victims)
    assert ledger.suffices(intent)
    for one in gone:
        rest = tuple(other for other in gone if other != one)
        fewer = Intent("new", intent.devices, intent.needs, rest)
        assert not ledger.suffices(fewer), f"{one} goes in vain"
        assert not seen.catalog[items[one].model].always_on
    victims = Victims(seen, NOW)
    if any(items[one].leases for one in gone):
        calm = tuple(item for item in items.values() if victims.unused(item) is not None)
        without = Ledger(seen.cards, [item for item in items.values() if item not in calm])
        rooms = [without.free(one.id, "new") >= (new.vram_mib or 0) for one in seen.cards]
        assert sum(rooms) < (new.tensor_parallel_size or 1), "idle ones would have sufficed"


@settings(max_examples=examples(100), deadline=None)
@given(seed=st.integers(0, 10**9))
def test_no_capacity_is_said_only_when_it_is_true(seed: int) -> None:
    """There is room to be made exactly when it fits without all who may ever be made to go."""
    seen, new, items = crowd(seed)
    ledger, victims = Ledger(seen.cards, items.values()), Victims(seen, NOW)
    kept = [item for item in items.values() if victims.keeps_room(item)]
    without = Ledger(seen.cards, kept)
    rooms = [without.free(one.id, "new") >= (new.vram_mib or 0) for one in seen.cards]
    fits = sum(rooms) >= (new.tensor_parallel_size or 1)
    assert Places(ledger, victims).conceivable(need_of(new)) == fits


def test_the_state_decides_who_may_go() -> None:
    """One that starts is no victim that could be told now, and has no known time at which it could be."""
    starting = running("a", 12, state=InstanceState.STARTING, ready_at=None)
    seen = wanted(starting, gib=20)
    assert not evicted(seen)
    assert plan(seen, NOW).waits["new"].ready_in is None
