"""What the planner makes of memory that settles, and of devices that nothing may be placed on."""

from __future__ import annotations

import dataclasses

import pytest

from tests.lifecycle.test_planner import GIB, NOW, card, draining, model, running, waits, world
from tidegate_lifecycle.budget import Card, Intent, Ledger
from tidegate_lifecycle.explaining import explain
from tidegate_lifecycle.instance import DrainCause, InstanceState
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.world import Start, StartDrain, Stop, WaitReason


def settling(name: str = "gpu0", gib: int = 0) -> Card:
    return dataclasses.replace(card(name), settling_mib=gib * GIB)


def taken(name: str = "gpu0") -> Card:
    return dataclasses.replace(card(name), draining=True)


def test_settling_memory_is_waited_for_and_nobody_is_evicted_for_it() -> None:
    """It is about to be free: the model waits for the driver's word, and starts when it has come."""
    models, idle = (model("a", 15), model("b", 5)), running("b", 5, last_used=1.0)
    one = world(*models, cards=(settling(gib=10),), instances=(idle,), demand={"a": waits()})
    decided = plan(one, NOW)
    assert (decided.actions, decided.waits["a"].reason) == ((), WaitReason.ROOM)
    told = "gpu0 has 9 free of 24 GiB; evictable: b 5 GiB, idle 16 min; 10 GiB about to be free"
    assert told in decided.waits["a"].text
    later = dataclasses.replace(one, cards=(settling(gib=0),), intents=decided.intents)
    assert plan(later, NOW).actions == (Start("a", ("gpu0",), 15 * GIB),)


def test_nothing_starts_where_memory_settles() -> None:
    """A server that measures its card while a neighbour's memory comes back dies; elsewhere it starts."""
    one = world(model("a", 1), cards=(settling(gib=5),), demand={"a": waits()})
    decided = plan(one, NOW)
    assert (decided.actions, decided.waits["a"].reason) == ((), WaitReason.GATE)
    two = dataclasses.replace(one, cards=(settling(gib=5), card("gpu1")))
    assert plan(two, NOW).actions == (Start("a", ("gpu1",), GIB),)


def test_room_that_was_made_keeps_its_turn_while_it_settles() -> None:
    """The victims have gone, their memory isn't seen free: another model's older ticket doesn't get it."""
    intent = Intent("big", ("gpu0",), (20 * GIB,), ("b-1",), begun=True)
    models = (model("big", 20), model("other", 20), model("b", 20))
    demand = {"big": waits(NOW - 1), "other": waits(NOW - 500)}
    one = world(*models, cards=(settling(gib=20),), intents=(intent,), demand=demand)
    decided = plan(one, NOW)
    assert decided.actions == ()
    assert [(kept.model, kept.begun) for kept in decided.intents if kept.begun] == [("big", True)]
    later = dataclasses.replace(one, cards=(settling(gib=0),), intents=decided.intents)
    assert plan(later, NOW).actions == (Start("big", ("gpu0",), 20 * GIB),)


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_a_device_that_was_taken_back_is_cleared(busy: bool, kept: bool) -> None:
    """Whatever runs on it drains, always_on or not; busy ones as in every drain, and nobody takes it back."""
    item = running("a", leases=2 if busy else 0)
    one = world(model("a", always_on=kept), cards=(taken(),), instances=(item,))
    reason = "gpu0 was taken back by an operator"
    assert plan(one, NOW).actions[0] == StartDrain("a-1", DrainCause.DEVICE, reason)
    item = draining(item, DrainCause.DEVICE, deadline=NOW + 60)
    decided = plan(dataclasses.replace(one, instances=(item,), demand={"a": waits()}), NOW)
    assert decided.actions == (() if busy else (Stop("a-1", cut=False),))


def test_nothing_is_placed_on_a_device_that_was_taken_back() -> None:
    """Another one takes it; without another one the reason is said, and it isn't "never fits"."""
    one = world(model("a"), cards=(taken(), card("gpu1")), demand={"a": waits()})
    assert plan(one, NOW).actions == (Start("a", ("gpu1",), 10 * GIB),)
    alone = dataclasses.replace(one, cards=(taken(),))
    decided = plan(alone, NOW)
    assert (decided.actions, decided.waits["a"].reason) == ((), WaitReason.NO_CAPACITY)
    assert "gpu0 was taken back by an operator" in decided.waits["a"].text
    assert "gpu0 was taken back by an operator" in str(explain(alone, "a", NOW).devices)


def test_always_on_moves_to_another_device() -> None:
    """It starts there while it drains here."""
    item = draining(running("a", leases=1), DrainCause.DEVICE, deadline=NOW + 60)
    models = (model("a", always_on=True),)
    one = world(*models, cards=(taken(), card("gpu1")), instances=(item,))
    assert plan(one, NOW).actions == (Start("a", ("gpu1",), 10 * GIB),)


def test_no_victim_is_sought_on_a_device_that_was_taken_back() -> None:
    """What would be freed there can't be had."""
    items = (running("b", 20), running("c", 20, on=("gpu1",), last_used=NOW - 1))
    models = (model("a", 20), model("b", 20), model("c", 20))
    missing = dataclasses.replace(card(), missing=True)
    one = world(*models, cards=(missing, card("gpu1")), instances=items, demand={"a": waits(0.0)})
    drains = [action for action in plan(one, NOW).actions if isinstance(action, StartDrain)]
    assert [drain.instance_id for drain in drains] == ["c-1"]


def test_servers_on_a_device_that_vanished_are_left_alone() -> None:
    """They may well go on answering."""
    item = running("a", leases=1)
    one = world(model("a"), cards=(dataclasses.replace(card(), missing=True),), instances=(item,))
    assert plan(one, NOW).actions == ()


def test_a_device_that_is_given_back_keeps_its_servers() -> None:
    """A drain that was begun for it is taken back; while it lasts, an eviction's isn't."""
    item = draining(running("a", leases=1), DrainCause.DEVICE, deadline=NOW + 60)
    one = world(model("a"), instances=(item,))
    (action,) = plan(one, NOW).actions
    assert type(action).__name__ == "Undrain"
    victim = draining(running("a", leases=1), DrainCause.EVICTION, deadline=NOW + 60, beneficiary="b")
    one = world(model("a"), model("b"), cards=(taken(),), instances=(victim,))
    assert plan(one, NOW).actions == ()


def test_an_intent_on_a_device_that_was_taken_back_is_dropped() -> None:
    """Its victims there drain on, for the device's sake; the model looks elsewhere."""
    intent = Intent("b", ("gpu0",), (20 * GIB,), ("a-1",), begun=True)
    victim = draining(running("a", 20, leases=1), DrainCause.EVICTION, deadline=NOW + 60, beneficiary="b")
    models = (model("a", 20), model("b", 20))
    cards = (taken(), card("gpu1"))
    one = world(*models, cards=cards, instances=(victim,), intents=(intent,), demand={"b": waits()})
    decided = plan(one, NOW)
    assert (decided.actions, decided.intents) == ((Start("b", ("gpu1",), 20 * GIB),), ())


def test_foreign_use_beyond_the_budget_evicts_nobody() -> None:
    """Reservations stay, new starts are refused in numbers; nothing of ours goes for what others took."""
    items = (running("b", 10), running("c", 10))
    one = world(
        model("a", 10),
        model("b"),
        model("c"),
        cards=(card(foreign=20),),
        instances=items,
        demand={"a": waits(0.0)},
    )
    decided = plan(one, NOW)
    assert (decided.actions, decided.waits["a"].reason) == ((), WaitReason.NO_CAPACITY)
    assert "20 GiB used by others" in decided.waits["a"].text
    assert not Ledger(one.cards, items).violation()


def test_states_that_end_by_themselves_are_not_drained_for_a_device() -> None:
    """A starting server becomes ready first."""
    item = running("a", state=InstanceState.STARTING, ready_at=None)
    one = world(model("a"), cards=(taken(),), instances=(item,))
    assert plan(one, NOW).actions == ()
