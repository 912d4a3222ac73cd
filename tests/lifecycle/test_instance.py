"""The table of an instance's states."""

from __future__ import annotations

import itertools

import pytest

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.instance import (
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
    instance.running = 1
    assert not instance.drained(5)
    instance.running, instance.leases = 0, 1
    assert not instance.drained(5)
    instance.leases, instance.generation = 0, 0  # its state isn't published yet
    assert not instance.drained(5)
