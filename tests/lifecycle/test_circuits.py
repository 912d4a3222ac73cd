"""Back-off, one try, closed again: by the clock of the test."""

from __future__ import annotations

import math

from tidegate_lifecycle.circuits import BACK_OFF, DISTURBANCES, FORGIVEN, STABLE, Circuits


def delay(circuits: Circuits, now: float) -> float:
    """Seconds until the model `m` may be tried again."""
    return circuits.known["m"].retry_at - now


def test_each_failure_doubles_the_back_off() -> None:
    """From the shortest to the longest, whenever it comes; a success begins anew."""
    circuits, now, seen = Circuits(), 100.0, []
    for _ in range(9):
        circuits.failed("m", "no", now)
        seen.append(delay(circuits, now))
        now += seen[-1] + 30.0  # one try, which takes its time
    assert seen == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert (seen[0], seen[-1]) == BACK_OFF
    circuits.succeeded("m")
    assert not circuits.known
    circuits.failed("m", "no", now)
    assert delay(circuits, now) == 1


def test_an_operator_ends_the_back_off_but_forgets_nothing() -> None:
    """One try at once; its failure counts on."""
    circuits = Circuits()
    for _ in range(3):
        circuits.failed("m", "no", 10.0, missed=True)
    circuits.half_open("m", 11.0)
    assert not circuits.known["m"].is_open(11.0)
    assert (circuits.known["m"].failures, circuits.known["m"].missed) == (3, 3)
    circuits.failed("m", "no", 12.0)
    assert delay(circuits, 12.0) == 8
    circuits.half_open("other", 12.0)
    assert list(circuits.known) == ["m"]


def test_failures_are_forgotten_but_not_while_a_try_is_under_way() -> None:
    """A load may take longer than failures are remembered: its own failure counts on all the same."""
    circuits = Circuits()
    circuits.failed("m", "no", 0.0)
    assert circuits.forgive(0.5, ()) == 1.0
    assert circuits.forgive(1.0, ()) == math.inf
    late = 2.0 + FORGIVEN
    circuits.forgive(late, {"m"})
    circuits.failed("m", "no", late)
    assert delay(circuits, late) == 2
    circuits.forgive(late + 3.0 + FORGIVEN, ())
    assert not circuits.known


def test_a_neighbours_fault_is_not_the_models() -> None:
    """Tried again without a back-off, a bounded number of times in a row; then one counts."""
    circuits = Circuits()
    for _ in range(2):
        assert [circuits.disturbed("m") for _ in range(DISTURBANCES + 1)] == [True] * DISTURBANCES + [False]
    assert not circuits.known
    assert circuits.disturbed("m")
    circuits.succeeded("m")
    assert [circuits.disturbed("m") for _ in range(DISTURBANCES)] == [True] * DISTURBANCES
    circuits.failed("m", "something else", 0.0)
    assert circuits.disturbed("m")


def test_servers_that_die_soon_back_off_longer_and_longer() -> None:
    """The first may be started again at once; though each try succeeds, the next ones wait ever longer."""
    circuits, now = Circuits(), 0.0
    assert circuits.crashed("m", 1.0, "signal 11", now)
    seen = []
    for _ in range(8):
        circuits.succeeded("m")
        assert not circuits.crashed("m", STABLE - 1, "signal 11", now)
        seen.append(delay(circuits, now))
    assert seen == [1, 2, 4, 8, 16, 32, 60, 60]
    circuits.succeeded("m")
    assert circuits.crashed("m", STABLE, "signal 11", now), "one that lived isn't held against its model"
