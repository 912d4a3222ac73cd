"""The table of an instance's states."""

from __future__ import annotations

import itertools

import pytest

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.instance import (
    CUT_OFF,
    TRANSITIONS,
    Drain,
    DrainCause,
    IllegalTransition,
    Instance,
    InstanceState,
)

# As the protocol draws it; written out again, so that the table can't change without a second thought.
LEGAL = """
starting ready, starting stopping, ready draining, ready stopping,
draining ready, draining falling_asleep, draining stopping, falling_asleep sleeping, falling_asleep stopping,
sleeping waking, sleeping stopping, waking ready, waking stopping, stopping gone
"""


def pairs() -> set[tuple[InstanceState, InstanceState]]:
    return {
        (InstanceState[before.upper()], InstanceState[after.upper()])
        for before, after in (line.split() for line in LEGAL.replace("\n", " ").split(","))
    }


@pytest.mark.parametrize(("before", "after"), list(itertools.product(InstanceState, InstanceState)))
def test_every_step(before: InstanceState, after: InstanceState) -> None:
    """Steps of the diagram are made; any other raises and changes nothing."""
    instance = Instance("i", "m", ("gpu0",), 1, 0.0, state=before, reason="as it was")
    if (before, after) in pairs():
        instance.to(after, 5.0, "why")
        assert (instance.state, instance.since, instance.reason) == (after, 5.0, "why")
        return
    snapshot = dict(vars(instance))
    with pytest.raises(IllegalTransition):
        instance.to(after, 5.0, "why")
    assert vars(instance) == snapshot


def test_table_is_complete() -> None:
    """Every state has a row, GONE is final, and the numbers are the contract's."""
    assert set(TRANSITIONS) == set(InstanceState)
    assert not TRANSITIONS[InstanceState.GONE]
    for state in InstanceState:
        assert pb.InstanceState.Value(f"INSTANCE_STATE_{state.name}") == state.value


def test_ready_times() -> None:
    """A drain that is taken back is no new residency; a start and a waking are."""
    instance = Instance("i", "m", (), 0, 0.0)
    instance.to(InstanceState.READY, 1.0)
    instance.start_drain(Drain(DrainCause.IDLE, 2.0, 9.0), "idle")
    assert instance.drain is not None
    instance.to(InstanceState.READY, 3.0)
    assert instance.drain is None
    assert instance.ready_at == 1.0


def test_drained_needs_an_acknowledgement() -> None:
    """Empty counts only when admission has seen the drain, and the server itself runs nothing."""
    instance = Instance("i", "m", (), 0, 0.0, generation=5)
    assert not instance.drained(4)
    assert instance.drained(5)
    instance.sample(1, 0, 10.0)
    assert not instance.drained(5)
    instance.sample(0, 0, 10.0)
    assert instance.drained(5)
    instance.leases = 1
    assert not instance.drained(5)
    instance.leases, instance.generation = 0, 0  # its state isn't published yet
    assert not instance.drained(5)


def test_only_what_the_server_said_since_counts() -> None:
    """A count from before the demand that showed no lease proves nothing; without any, none is needed."""
    instance = Instance("i", "m", (), 0, 0.0, state=InstanceState.READY, generation=1)
    instance.show(1, 90.0)
    instance.start_drain(Drain(DrainCause.UNLOAD, 100.0, None), "unload")
    instance.generation = 5
    instance.sample(0, 0, 100.5)
    instance.show(4, 101.0)  # that demand hadn't seen the drain
    assert (instance.outdated, instance.cut_at) == (False, None)
    instance.show(5, 102.0)
    assert instance.outdated
    assert not instance.drained(5)
    instance.show(5, 110.0)
    assert instance.cut_at == 102.0 + CUT_OFF, "a later demand begins nothing anew"
    instance.sample(0, 0, 102.5)
    assert (instance.outdated, instance.drained(5)) == (False, True)
    instance.sample(2, 0, 103.0)
    assert not instance.drained(5)
    instance.forget(200.0)
    assert instance.drained(5), "it no longer says anything"
    instance.leases = 1
    instance.show(5, 201.0)
    assert instance.cut_at is None
