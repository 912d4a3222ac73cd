"""The planner, case by case; a world is written down and the plan looked at."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from tidegate_lifecycle.budget import Card, Intent
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.explaining import explain
from tidegate_lifecycle.instance import CUT_OFF, Drain, DrainCause, Instance, InstanceState
from tidegate_lifecycle.needs import Estimate, Need, Source
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.world import (
    Circuit,
    Demand,
    Start,
    StartDrain,
    Stop,
    Undrain,
    WaitReason,
    World,
)

GIB = 1024
NOW = 1000.0


def card(name: str = "gpu0", gib: int = 24, pool: str = "default", foreign: int = 0) -> Card:
    return Card(name, pool, gib * GIB, gib * GIB, foreign * GIB)


def model(name: str, gib: int | None = 10, **keys: Any) -> Model:
    return Model(name, vram_mib=None if gib is None else gib * GIB, **keys)


def running(name: str, gib: int = 10, on: tuple[str, ...] = ("gpu0",), **keys: Any) -> Instance:
    item = Instance(
        f"{name}-1", name, on, gib * GIB, 0.0, state=InstanceState.READY, ready_at=1.0, generation=1
    )
    for key, value in keys.items():
        setattr(item, key, value)
    return item


def draining(
    item: Instance, cause: DrainCause, deadline: float = math.inf, beneficiary: str = ""
) -> Instance:
    item.start_drain(Drain(cause, NOW - 1, deadline, beneficiary), "because")
    return item


def waits(since: float = NOW - 1, waiting: int = 1) -> Demand:
    return Demand(waiting, since)


def world(*models: Model, cards: tuple[Card, ...] = (card(),), **keys: Any) -> World:
    keys = {"settled": True, "seen": 9, **keys}
    return World({item.name: item for item in models}, cards, **keys)


def test_best_fit() -> None:
    """A model goes where it leaves the least room; of its own pool only."""
    cards = (card("big", 80), card("fit", 24), card("other", 20, pool="other"))
    decided = plan(world(model("a", 20), cards=cards, demand={"a": waits()}), NOW)
    assert decided.actions == (Start("a", ("fit",), 20 * GIB),)


def test_tensor_parallel_takes_equal_cards() -> None:
    """tensor_parallel_size cards of equal size; a pool with too few of them can never hold it."""
    cards = (card("a0", 48), card("b0", 24), card("b1", 24))
    decided = plan(world(model("m", 20, tensor_parallel_size=2), cards=cards, demand={"m": waits()}), NOW)
    assert decided.actions == (Start("m", ("b0", "b1"), 20 * GIB),)
    decided = plan(world(model("m", 20, tensor_parallel_size=3), cards=cards, demand={"m": waits()}), NOW)
    assert decided.waits["m"].reason is WaitReason.NEVER_FITS


def test_share_of_a_card() -> None:
    """90 % is reckoned from each card's total."""
    decided = plan(world(Model("m", vram_share=0.9), demand={"m": waits()}), NOW)
    assert decided.actions == (Start("m", ("gpu0",), math.ceil(24 * GIB * 0.9)),)


def test_unknown_footprint_takes_a_whole_card_and_evicts_idle_ones_only() -> None:
    """Without a number a model gets an empty card; a busy model isn't pushed out for it."""
    busy = running("b", leases=1)
    decided = plan(world(model("m", None), model("b"), instances=(busy,), demand={"m": waits(0.0)}), NOW)
    assert not decided.actions
    assert decided.waits["m"].reason is WaitReason.ROOM
    idle = running("b")
    decided = plan(world(model("m", None), model("b"), instances=(idle,), demand={"m": waits(0.0)}), NOW)
    assert [type(action) for action in decided.actions] == [StartDrain]


def test_a_model_whose_files_are_being_read_waits_for_its_estimate() -> None:
    """Nothing starts and nobody goes for it meanwhile; other models aren't held up, and it keeps no room."""
    pending = Need("m", pending=True)
    keys: dict[str, Any] = {"needs": {"m": pending, "a": Need("a", amount=10 * GIB)}}
    decided = plan(world(model("m", None), model("a"), demand={"m": waits(0.0), "a": waits()}, **keys), NOW)
    assert decided.actions == (Start("a", ("gpu0",), 10 * GIB),)
    assert decided.waits["m"].reason is WaitReason.ESTIMATING
    assert "being read from its files" in decided.waits["m"].text
    assert not decided.intents


def test_an_estimate_shrinks_to_what_is_left_beside_others_use_on_all_its_cards() -> None:
    """24 GiB cards of which others use 1 and 3: both servers' parts get what the fuller card has."""
    need = Need("m", count=2, estimate=Estimate({2: 90 * GIB}, {2: 12 * GIB}))
    cards = (card("gpu0", foreign=1), card("gpu1", foreign=3))
    keys: dict[str, Any] = {"needs": {"m": need}, "cards": cards}
    decided = plan(world(model("m", None, tensor_parallel_size=2), demand={"m": waits()}, **keys), NOW)
    assert decided.actions == (Start("m", ("gpu0", "gpu1"), 21 * GIB),)
    least = Need("m", estimate=Estimate({1: 90 * GIB}, {1: 40 * GIB}))
    decided = plan(world(model("m", None), demand={"m": waits()}, needs={"m": least}), NOW)
    assert decided.waits["m"].reason is WaitReason.NEVER_FITS
    assert "needs 40 GiB" in decided.waits["m"].text


def test_gate() -> None:
    """Nothing starts on a card on which a server starts or stops; another card is no matter."""
    starting = running("b", state=InstanceState.STARTING, ready_at=None)
    two = (card("gpu0"), card("gpu1"))
    decided = plan(world(model("a"), model("b"), instances=(starting,), demand={"a": waits()}), NOW)
    assert decided.waits["a"].reason is WaitReason.GATE
    assert not decided.actions
    decided = plan(
        world(model("a"), model("b"), cards=two, instances=(starting,), demand={"a": waits()}), NOW
    )
    assert decided.actions == (Start("a", ("gpu1",), 10 * GIB),)
    both = plan(world(model("a"), model("b"), cards=(card(),), demand={"a": waits(), "b": waits()}), NOW)
    assert len(both.actions) == 1, "one start at a time on a card"


def test_no_stop_beside_a_start() -> None:
    """A drained neighbour isn't stopped while a server starts on its card."""
    starting = running("b", state=InstanceState.STARTING, ready_at=None)
    empty = draining(running("a", generation=1), DrainCause.IDLE)
    decided = plan(world(model("a"), model("b"), instances=(starting, empty)), NOW)
    assert not any(isinstance(action, Stop) for action in decided.actions)
    decided = plan(world(model("a"), model("b"), instances=(empty,)), NOW)
    assert decided.actions == (Stop("a-1", cut=False),)


def test_idle_lru_goes_first() -> None:
    """Of two idle models the longer unused one makes room, and no more than needed."""
    old, new = running("old", last_used=10.0), running("new", last_used=20.0)
    decided = plan(
        world(model("a"), model("old"), model("new"), instances=(new, old), demand={"a": waits()}), NOW
    )
    drained = [action for action in decided.actions if isinstance(action, StartDrain)]
    assert [action.instance_id for action in drained] == ["old-1"]
    assert decided.intents == (Intent("a", ("gpu0",), (10 * GIB,), ("old-1",), begun=True),)


def test_intent_reserves_the_room() -> None:
    """Room freed for a large model isn't taken by a small one with an older ticket."""
    intent = Intent("large", ("gpu0",), (20 * GIB,), ("b-1",), begun=True)
    leaving = draining(running("b", 12), DrainCause.EVICTION, beneficiary="large")
    demand = {"small": waits(1.0), "large": waits(2.0)}
    models = (model("large", 20), model("small", 10), model("b", 12))
    decided = plan(world(*models, instances=(leaving,), intents=(intent,), demand=demand, seen=0), NOW)
    assert not decided.actions
    decided = plan(world(*models, intents=(intent,), demand=demand), NOW)
    assert decided.actions == (Start("large", ("gpu0",), 20 * GIB),)


def test_intent_ends_with_its_reason() -> None:
    """When nobody wants the beneficiary any more, or it backs off, its victim returns."""
    intent = Intent("a", ("gpu0",), (20 * GIB,), ("b-1",), begun=True)
    cases: list[dict[str, Any]] = [
        {"demand": {}},
        {"demand": {"a": waits()}, "circuits": {"a": Circuit(1, NOW + 5)}},
    ]
    for keys in cases:
        leaving = draining(running("b", 12, leases=1), DrainCause.EVICTION, beneficiary="a")
        decided = plan(
            world(model("a", 20), model("b", 12), instances=(leaving,), intents=(intent,), **keys), NOW
        )
        assert decided.actions == (Undrain("b-1"),)
        assert not decided.intents


def test_busy_victim_waits_for_its_turn() -> None:
    """A busy model is shielded by its residency, but not beyond max_swap_wait of the other's ticket."""
    models = (model("a", 20), model("b", 20))
    busy = running("b", 20, leases=1, ready_at=NOW - 10)
    decided = plan(world(*models, instances=(busy,), demand={"a": waits(NOW - 5)}), NOW)
    assert not decided.actions
    assert decided.wake_at == NOW + 20, "the residency of 30 s ends"
    slow = {"b": 100.0}  # 2 × 100 s of residency: then max_swap_wait comes first
    decided = plan(world(*models, instances=(busy,), demand={"a": waits(NOW - 5)}, load_times=slow), NOW)
    assert decided.wake_at == NOW + 55
    decided = plan(world(*models, instances=(busy,), demand={"a": waits(NOW - 5)}, load_times=slow), NOW + 55)
    assert [type(action) for action in decided.actions] == [StartDrain]


def test_no_drain_begins_that_only_a_wish_makes_useful() -> None:
    """Room that another one merely waits to make isn't counted on: the next plan would undo the drain."""
    both = ("gpu0", "gpu1")
    models = [model("a", 20), model("b", 18), model("c", 9, instances=2), model("wide", 12)]
    demand = {"a": waits(NOW - 99), "b": waits(NOW - 90), "c": waits(NOW - 95)}
    fresh = running("wide", 12, on=both, ready_at=NOW - 1, leases=1)
    left, right = running("c", 9, leases=1), running("c", 9, on=("gpu1",), id="c-2", leases=1)
    seen = world(*models, cards=(card(), card("gpu1")), instances=(fresh, left, right), demand=demand)
    first = plan(seen, NOW)
    for action in first.actions:
        assert isinstance(action, StartDrain)
        item = next(item for item in seen.instances if item.id == action.instance_id)
        item.start_drain(Drain(action.cause, NOW, NOW + 300, action.beneficiary), action.reason)
    again = plan(dataclasses.replace(seen, intents=first.intents), NOW)
    assert not [action for action in again.actions if isinstance(action, Undrain)]
    assert not first.actions, "the first in turn waits for the fresh one, and the second for the first"


def test_a_drain_whose_beneficiary_finds_another_place_goes_on_for_the_next_in_turn() -> None:
    """Else it is taken back, another one's drain begins and is taken back in its turn, without end."""
    cards = card(), card("gpu1"), card("gpu2")
    models = [model(name, 14) for name in "abc"] + [model("x", 12), model("y", 12), model("z", 10)]
    demand = {"a": waits(NOW - 30), "b": waits(NOW - 40), "c": waits(NOW - 20)}
    starting = running("z", 10, on=("gpu1",), state=InstanceState.STARTING, ready_at=None)
    leaving = draining(running("x", 12, generation=20), DrainCause.EVICTION, beneficiary="a")
    idle = running("y", 12, on=("gpu2",))
    intent = Intent("a", ("gpu0",), (14 * GIB,), ("x-1",), begun=True)
    seen = world(*models, cards=cards, instances=(starting, leaving, idle), demand=demand, intents=(intent,))
    told = []
    for _ in range(4):
        decided = plan(seen, NOW)
        for action in decided.actions:
            assert isinstance(action, StartDrain | Undrain)
            item = next(item for item in seen.instances if item.id == action.instance_id)
            if isinstance(action, StartDrain):
                item.start_drain(Drain(action.cause, NOW, NOW + 300, action.beneficiary), action.reason)
                item.generation = 20  # admission hasn't seen it yet
            else:
                item.to(InstanceState.READY, NOW, "")
            told.append((type(action), item.id))
        seen = dataclasses.replace(seen, intents=decided.intents)
    assert told == [(StartDrain, "y-1")]
    assert {intent.devices: intent.victims for intent in seen.intents} == {
        ("gpu0",): ("x-1",),
        ("gpu1",): (),  # where one that starts is only waited for
        ("gpu2",): ("y-1",),
    }


def test_fresh_model_is_no_victim() -> None:
    """A model that has just become ready keeps its place until those who waited for it were granted."""
    models = (model("a", 20), model("b", 20))
    fresh = running("b", 20, ready_at=NOW - 31)
    demand = {"a": waits(NOW - 40), "b": waits(NOW - 50)}
    assert not plan(world(*models, instances=(fresh,), demand=demand), NOW).actions
    demand = {"a": waits(NOW - 40), "b": waits(NOW - 1)}  # its own are served; these came later
    assert plan(world(*models, instances=(fresh,), demand=demand), NOW).actions
    unseen = world(*models, instances=(running("b", 20, ready_at=NOW - 31, generation=20),))
    decided = plan(World(**{**vars(unseen), "demand": {"a": waits(NOW - 40)}}), NOW)
    assert not decided.actions, "admission doesn't even know that it is ready"


def test_resident_without_demand_goes_at_once() -> None:
    """Residency shields only a model with leases or tickets."""
    idle = running("b", 20, ready_at=NOW - 1)
    decided = plan(world(model("a", 20), model("b", 20), instances=(idle,), demand={"a": waits()}), NOW)
    assert [type(action) for action in decided.actions] == [StartDrain]


def test_unsettled_only_adds() -> None:
    """While admission is away or unsettled nothing drains or stops; starts go on."""
    models = (model("a", 20), model("b", 4), model("c", 20), model("d", 4, idle_timeout=1.0))
    items = (
        running("a", 10),
        draining(running("d", 4), DrainCause.UNLOAD, deadline=NOW - 1),
    )
    demand = {"b": waits(), "c": waits(0.0)}
    decided = plan(world(*models, instances=items, demand=demand, settled=False, seen=0), NOW)
    assert not any(isinstance(action, Stop | StartDrain) for action in decided.actions)


def test_more_servers_than_instances() -> None:
    """A restart may find more servers of a model than its `instances` (one of them was draining): the
    youngest drains like any other that is in use; nothing is stopped at once."""
    old, young = running("a", 4, leases=1), running("a", 4, id="a-2", ordered_at=5.0, leases=1)
    seen = world(model("a", 4), instances=(young, old), demand={"a": waits()})
    (action,) = plan(seen, NOW).actions
    assert isinstance(action, StartDrain)
    assert action.instance_id == "a-2"
    assert not plan(dataclasses.replace(seen, settled=False), NOW).actions
    draining(young, action.cause)
    assert not plan(seen, NOW).actions, "it isn't taken back though the model is wanted"
    young.leases = 0
    assert plan(seen, NOW).actions == (Stop("a-2", cut=False),)


def test_interest_evicts_idle_only() -> None:
    """Somebody who was refused starts the model, but pushes nobody out who is in use."""
    models = (model("a", 20), model("b", 20))
    interest = {"a": Demand(interest_until=NOW + 60)}
    assert not plan(world(*models, instances=(running("b", 20, leases=1),), demand=interest), NOW).actions
    assert plan(world(*models, instances=(running("b", 20),), demand=interest), NOW).actions


def test_always_on_is_never_a_victim_and_keeps_its_room() -> None:
    """An `always_on` model isn't evicted; while it is down and backs off its room isn't given away."""
    models = (model("a", 20, always_on=True), model("b", 20))
    decided = plan(world(*models, instances=(running("a", 20),), demand={"b": waits(0.0)}), NOW)
    assert not decided.actions
    assert decided.waits["b"].reason is WaitReason.NO_CAPACITY
    down = {"a": Circuit(1, NOW + 5)}
    decided = plan(world(*models, circuits=down, demand={"b": waits(0.0)}), NOW)
    assert not decided.actions
    assert decided.waits["b"].reason is WaitReason.ROOM


def test_never_fits_in_numbers() -> None:
    """What can never fit is said in numbers and evicts nothing."""
    decided = plan(world(model("a", 30), model("b"), instances=(running("b"),), demand={"a": waits()}), NOW)
    assert not decided.actions
    assert decided.waits["a"].reason is WaitReason.NEVER_FITS
    assert decided.waits["a"].text == "needs 30 GiB (declared); of the devices may be used: gpu0 24"


def test_numbers_of_a_wait() -> None:
    """A wait says what is needed, what is free, and who holds the rest since when."""
    held = running("b", 18, last_used=NOW - 240)
    told = explain(
        world(model("a", 38), model("b", 18), cards=(card("gpu0", 40),), instances=(held,)), "a", NOW
    )
    assert told.needs == "needs 38 GiB (declared)"
    assert told.devices == ("gpu0 has 22 free of 40 GiB; evictable: b 18 GiB, idle 4 min",)
    assert isinstance(told.plan.actions[0], StartDrain)
    assert told.plan.actions[0].reason == "makes room for a, which needs 38 GiB (declared)"


def test_numbers_say_who_could_go_and_who_could_not() -> None:
    """Who is evictable, busy, pinned, on its way, or no server of ours; and from where the need is known."""
    cards = (card("gpu0", 44, foreign=2), card("gpu1", 44))
    estimate = Estimate({2: 39117}, why="weights 30.1 + KV 4.2 for 16 x 8192 tokens")
    both = ("gpu0", "gpu1")
    items = (
        running("b", 9, last_used=NOW - 240),
        running("d", 6, leases=3),
        running("c", 10),
        running("e", 12, on=both, state=InstanceState.STARTING, ready_at=None),
    )
    seen = world(
        *(model(name) for name in "abcde"),
        cards=cards,
        instances=items,
        demand={"a": waits(), "d": waits(waiting=2)},
        pinned=frozenset("c"),
        needs=needs(Need("a", estimate=estimate)),
    )
    told = explain(seen, "a", NOW)
    assert told.needs == (
        "needs 38.2 GiB on each of 2 equal devices (estimated: weights 30.1 + KV 4.2 for 16 x 8192 tokens)"
    )
    assert told.devices[0] == (
        "gpu0 has 5 free of 44 GiB; evictable: b 9 GiB, idle 4 min; busy: d 6 GiB, 3 in flight and 2 waiting;"
        " pinned: c 10 GiB, idle 16 min; starting: e 12 GiB; 2 GiB used by others"
    )
    assert told.devices[1] == "gpu1 has 32 free of 44 GiB; starting: e 12 GiB"
    wait = told.plan.waits["a"]
    assert wait.reason is WaitReason.NO_CAPACITY
    assert wait.text == f"{told.needs}; {told.devices[1]}; {told.devices[0]}"


def test_scale_out() -> None:
    """One more instance when tickets wait and memory is free; not beyond `instances`, never by eviction."""
    busy = running("a", leases=8)
    keys: dict[str, Any] = {"instances": (busy,), "demand": {"a": waits(NOW - 5)}}
    assert plan(world(model("a", instances=2), **keys), NOW).actions == (Start("a", ("gpu0",), 10 * GIB),)
    assert not plan(world(model("a", instances=1), **keys), NOW).actions
    assert not plan(world(model("a", instances=2), cards=(card(gib=12),), **keys), NOW).actions


def test_idle_stop_and_return() -> None:
    """Idle for idle_timeout: drained. Wanted again before it is stopped: it returns."""
    idle = running("a", last_used=NOW - 60)
    decided = plan(world(model("a", idle_timeout=60.0), instances=(idle,)), NOW)
    assert [type(action) for action in decided.actions] == [StartDrain]
    assert not plan(world(model("a", idle_timeout=0.0), instances=(idle,)), NOW).actions
    assert plan(world(model("a", idle_timeout=61.0), instances=(idle,)), NOW).wake_at == NOW + 1
    leaving = draining(running("a"), DrainCause.IDLE)
    decided = plan(world(model("a"), instances=(leaving,), demand={"a": waits()}), NOW)
    assert decided.actions == (Undrain("a-1"),)


def test_drain_deadline() -> None:
    """What still runs at the deadline is cut, and counted as cut; without a deadline never."""
    late = draining(running("a", leases=2), DrainCause.EVICTION, NOW, "b")
    intent = Intent("b", ("gpu0",), (20 * GIB,), ("a-1",), begun=True)
    keys: dict[str, Any] = {"intents": (intent,), "demand": {"b": waits()}}
    decided = plan(world(model("a"), model("b", 20), instances=(late,), **keys), NOW)
    assert decided.actions == (Stop("a-1", cut=True),)
    assert late.drain is not None
    late.drain.deadline = None
    assert not plan(world(model("a"), model("b", 20), instances=(late,), **keys), NOW + 1e6).actions


def test_the_servers_own_count_ends_a_drain() -> None:
    """Without leases it stops once the server says that it runs nothing, or at the drain's deadline; with
    no deadline, when no edge that lost admission can relay any more."""
    for deadline, last in ((NOW + 50, NOW + 50), (None, NOW + CUT_OFF)):
        item = draining(running("a"), DrainCause.UNLOAD)
        assert item.drain is not None
        item.drain.deadline = deadline
        item.generation = 9
        item.sample(1, 0, NOW + 1)
        item.show(9, NOW)
        one = world(model("a"), instances=(item,), unload=frozenset({"a"}))
        waiting = plan(one, NOW + 2)
        assert (waiting.actions, waiting.wake_at) == ((), last)
        assert plan(one, last).actions == (Stop("a-1", cut=True),)
        item.sample(0, 0, NOW + 3)
        assert plan(one, NOW + 3).actions == (Stop("a-1", cut=False),)


def test_foreign_memory_counts() -> None:
    """What others use of a card isn't given away, and is named."""
    decided = plan(world(model("a", 20), cards=(card(foreign=8),), demand={"a": waits()}), NOW)
    assert decided.waits["a"].reason is WaitReason.NO_CAPACITY
    assert "8 GiB used by others" in decided.waits["a"].text


def test_room_that_is_just_being_taken_or_given_back_is_waited_for() -> None:
    """A model isn't refused because another one was started in this very plan, or because one is stopping."""
    models = (model("a", 20), model("b", 20))
    decided = plan(world(*models, demand={"a": waits(1.0), "b": waits(2.0)}), NOW)
    assert decided.actions == (Start("a", ("gpu0",), 20 * GIB),)
    assert decided.waits["b"].reason is WaitReason.ROOM
    for state in (InstanceState.STARTING, InstanceState.STOPPING):
        other = running("a", 20, state=state, ready_at=None)
        decided = plan(world(*models, instances=(other,), demand={"b": waits(2.0)}), NOW)
        assert decided.waits["b"].reason in (WaitReason.ROOM, WaitReason.GATE), state


def needs(*of: Need) -> dict[str, Need]:
    return {need.model: need for need in of}


def test_an_estimate_spreads_a_model_over_the_fewest_cards_on_which_it_fits() -> None:
    """One card is too small for it: it gets two, though four would do as well."""
    cards = tuple(card(f"gpu{i}", 24) for i in range(4))
    estimate = Estimate({1: 40 * GIB, 2: 22 * GIB, 4: 12 * GIB})
    decided = plan(
        world(
            model("m", None), cards=cards, demand={"m": waits()}, needs=needs(Need("m", estimate=estimate))
        ),
        NOW,
    )
    assert decided.actions == (Start("m", ("gpu0", "gpu1"), 22 * GIB),)


def test_a_footprint_counts_on_cards_of_its_kind_alone() -> None:
    """On the other kind the estimate does; a declared amount comes before both."""
    cards = (dataclasses.replace(card("a"), kind="A100"), dataclasses.replace(card("b"), kind="L4"))
    need = Need("m", measured={("L4", 1): 9 * GIB}, estimate=Estimate({1: 12 * GIB}))
    assert [need.on(item, 1) for item in cards] == [12 * GIB, 9 * GIB]
    assert [need.source(item, 1) for item in cards] == [Source.ESTIMATED, Source.MEASURED]
    assert dataclasses.replace(need, amount=3).on(cards[1], 1) == 3


def test_a_smaller_card_gives_all_of_its_budget_when_the_least_fits() -> None:
    """The estimate's full reservation is a wish, its least a must."""
    estimate = Estimate({1: 30 * GIB}, least={1: 20 * GIB})
    keys: dict[str, Any] = {"demand": {"m": waits()}, "needs": needs(Need("m", estimate=estimate))}
    assert plan(world(model("m", None), **keys), NOW).actions == (Start("m", ("gpu0",), 24 * GIB),)
    small = plan(world(model("m", None), cards=(card(gib=19),), **keys), NOW)
    assert small.waits["m"].reason is WaitReason.NEVER_FITS


def test_an_estimate_is_raised_three_times_at_most() -> None:
    """Each time by a quarter, said in words once."""
    estimate, seen = Estimate({1: 100}, {1: 80}, "8 GiB weights"), []
    for _ in range(5):
        estimate = estimate.after_too_little()
        seen.append((estimate.mib[1], estimate.least[1]))
    assert seen == [(125, 100), (157, 125), (197, 157), (197, 157), (197, 157)]
    assert estimate.why == "8 GiB weights; raised by a quarter 3 times: a start ran out of memory"
    assert Estimate(why="unknown").after_too_little() == Estimate(why="unknown")


def test_no_server_is_spread_over_parts_of_cards() -> None:
    """CUDA shows a process one MIG instance; the reason is said."""
    parts = tuple(dataclasses.replace(card(f"0:{i}", 20), part=True) for i in range(2))
    decided = plan(world(model("m", 10, tensor_parallel_size=2), cards=parts, demand={"m": waits()}), NOW)
    assert decided.waits["m"].reason is WaitReason.NEVER_FITS
    assert "parts of cards, of which a server can have one alone" in decided.waits["m"].text
    assert plan(world(model("m", 10), cards=parts, demand={"m": waits()}), NOW).actions
