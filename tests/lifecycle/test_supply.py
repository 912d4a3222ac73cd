"""What admission is told of the time until a model is ready."""

from __future__ import annotations

from typing import Any

import pytest

from tests.lifecycle.test_planner import GIB, NOW, draining, model, running, waits, world
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.budget import Intent
from tidegate_lifecycle.instance import DrainCause, Instance, InstanceState
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.supply import model_supply, view
from tidegate_lifecycle.world import STOP_TIME, Circuit, Policy, Wait, WaitReason

LOADS = {"a": 30.0, "b": 20.0}
POLICY = Policy(min_residency=30.0, max_swap_wait=60.0, drain_timeout=300.0)


def told(
    load_time: float | None, at: float = NOW, wait: Wait | None = None, *instances: Instance
) -> pb.ModelSupply:
    """What is said at a moment of a model looked at now."""
    return model_supply(view(model("a"), instances, wait, None, "", load_time, NOW), at)


def test_a_stopped_model_is_told_with_its_learned_load_time() -> None:
    """From whenever somebody asks, so it is the same later; without a load it is unknown."""
    for at in (NOW, NOW + 100.0):
        said = told(30.0, at)
        assert (said.ready_in_ms, said.under_way) == (30_000, False)
    assert not told(None).HasField("ready_in_ms")


def test_what_remains_of_a_start_runs_down_and_then_is_unknown() -> None:
    """A start that takes longer than those before isn't told as ready at once."""
    starting = loading(NOW - 10.0)
    said = told(30.0, NOW + 5.0, None, starting)
    assert (said.ready_in_ms, said.under_way) == (15_000, True)
    late = told(30.0, NOW + 20.0, None, starting)
    assert not late.HasField("ready_in_ms")
    assert late.start_deadline_ms > 0, "its start deadline bounds the wait"
    assert not told(None, NOW, None, starting).HasField("ready_in_ms")


def loading(since: float) -> Instance:
    """A server of `a` that loads since then, and may take a minute."""
    keys: dict[str, Any] = {"launched_at": since, "patience": 60.0, "deadline_at": since + 60.0}
    return running("a", state=InstanceState.STARTING, ready_at=None, ordered_at=since, **keys)


def test_what_goes_before_the_launch_counts_for_nothing() -> None:
    """While an image is pulled the start deadline moves on, in steps; at the launch it begins to run."""
    item = loading(NOW)
    item.launched_at = None
    said = []
    for second in range(0, 600, 5):
        item.prepare(NOW + second)
        assert NOW + second + 30.0 <= item.deadline_at <= NOW + second + 60.0
        said.append(item.deadline_at)
    assert len(set(said)) < 20, "each step is a report to admission"
    item.launched_at, item.deadline_at = NOW + 600.0, NOW + 660.0
    item.prepare(NOW + 659.0)
    seen = model_supply(view(model("a"), (item,), None, None, "", 40.0, NOW + 620.0), NOW + 620.0)
    assert (seen.start_deadline_ms, seen.ready_in_ms) == (40_000, 20_000)


def test_a_circuit_is_told_in_each_of_its_states() -> None:
    """In its back-off the model is refused with the reason; then it is wanted or tried again, and says so."""

    def seen(circuit: Circuit, *instances: Instance) -> pb.ModelSupply:
        return model_supply(view(model("a"), instances, None, circuit, "", 30.0, NOW), NOW)

    failed = seen(Circuit(2, NOW + 3.0, "no such file"))
    assert (failed.state, failed.reason) == (pb.MODEL_STATE_FAILED, pb.REASON_START_FAILED)
    assert (failed.message, failed.retry_after_ms) == ("no such file", 3000)
    half = Circuit(2, NOW, "no such file")
    waits = seen(half)
    assert (waits.state, waits.reason) == (pb.MODEL_STATE_FAILED, pb.REASON_UNSPECIFIED)
    assert waits.message == "its last start failed, a request tries again: no such file"
    tried = seen(half, loading(NOW - 10.0))
    assert (tried.state, tried.reason) == (pb.MODEL_STATE_LOADING, pb.REASON_UNSPECIFIED)
    assert tried.message == "its last start failed, one try is under way: no such file"
    assert (tried.ready_in_ms, tried.start_deadline_ms) == (20_000, 50_000), "callers wait as for any load"


def test_a_turn_is_told_by_its_bound_and_never_as_sooner() -> None:
    """Rounded up to five seconds, counting down."""
    for bound in (0.4, 3.0, 7.4, 100.0):
        said = told(30.0, NOW, Wait(WaitReason.ROOM, "", bound))
        assert bound * 1000 <= said.ready_in_ms <= (bound + 5) * 1000
        assert said.under_way
    assert not told(30.0, NOW, Wait(WaitReason.ROOM, "", None)).HasField("ready_in_ms")


def bound(*instances: Instance, intents: tuple[Intent, ...] = ()) -> float | None:
    """The bound of the turn of `a`, for which `b` has to go."""
    models = (model("a", 20), model("b", 20), model("c", 2))
    keys: dict[str, Any] = {
        "intents": intents,
        "demand": {"a": waits()},
        "load_times": LOADS,
        "policy": POLICY,
    }
    return plan(world(*models, instances=instances, **keys), NOW).waits["a"].ready_in


def test_the_bound_of_a_turn_counts_what_is_left_of_the_drain() -> None:
    """A busy victim may take all of its drain; one that drains, what is left; an empty one nothing."""
    rest = STOP_TIME + LOADS["a"]
    intent = Intent("a", ("gpu0",), (20 * GIB,), ("b-1",), begun=True)
    assert bound(running("b", 20)) == rest
    assert bound(running("b", 20, leases=1, ready_at=NOW - 10.0)) == pytest.approx(30.0 + 300.0 + rest)
    busy = draining(running("b", 20, leases=1), DrainCause.EVICTION, NOW + 40.0, "a")
    assert bound(busy, intents=(intent,)) == pytest.approx(40.0 + rest)
    endless = draining(running("b", 20, leases=1), DrainCause.EVICTION, NOW + 40.0, "a")
    assert endless.drain is not None
    endless.drain.deadline = None
    assert bound(endless, intents=(intent,)) is None
    stopping = running("b", 20, state=InstanceState.STOPPING)
    assert bound(stopping, intents=(intent,)) == rest


def test_a_start_that_takes_too_long_makes_the_turn_behind_it_unknown() -> None:
    """Nobody knows what remains of it; nor of one that was never loaded before."""
    starting = running("b", 2, state=InstanceState.STARTING, ready_at=None, ordered_at=NOW - 5.0)
    assert bound(starting) == pytest.approx(15.0 + LOADS["a"])
    late = running("b", 2, state=InstanceState.STARTING, ready_at=None, ordered_at=NOW - 21.0)
    assert bound(late) is None
    unknown = running("c", 2, state=InstanceState.STARTING, ready_at=None, ordered_at=NOW - 1.0)
    assert bound(unknown) is None
