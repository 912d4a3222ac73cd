"""How long a server may take to be ready."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidegate_lifecycle.start_deadline import (
    DOUBLINGS,
    FACTOR,
    FLOOR,
    SECONDS_PER_GIB,
    start_deadline,
)

TIMEOUTS = st.floats(1.0, 86400.0)
SIZES = st.integers(0, 8 * 192 * 1024)
LOADS = st.floats(0.0, 7200.0)
MISSES = st.integers(0, 50)
GIB = 1024


def test_examples() -> None:
    """Minutes for what is unknown or large, one for what was quick; more after a miss."""
    assert start_deadline(600, 10 * GIB, None, 0) == 600
    assert start_deadline(600, 4 * 70 * GIB, None, 0) == 1680
    assert start_deadline(600, 2 * GIB, 1.0, 0) == 63
    assert start_deadline(600, 24 * GIB, 8.0, 0) == 144, "its files may not be cached this time"
    assert start_deadline(600, 24 * GIB, 300.0, 0) == 960
    assert [start_deadline(600, 2 * GIB, 1.0, missed) for missed in range(1, 6)] == [
        600,
        1200,
        2400,
        2400,
        2400,
    ]


@given(TIMEOUTS, SIZES)
def test_until_something_is_known_it_is_the_setting(timeout: float, size: int) -> None:
    """`start_timeout`, unless the model is too large for it."""
    assert start_deadline(timeout, 0, None, 0) == timeout
    assert start_deadline(timeout, size, None, 0) in (timeout, size / GIB * SECONDS_PER_GIB)


@given(TIMEOUTS, SIZES, LOADS, MISSES)
def test_it_never_fails_a_load_that_is_as_slow_as_before(
    timeout: float, size: int, load: float, missed: int
) -> None:
    """Nor one that is several times slower, or that reads everything from a slow disk."""
    deadline = start_deadline(timeout, size, load, missed)
    assert deadline >= FLOOR
    assert deadline >= FACTOR * load
    assert deadline >= size / GIB * SECONDS_PER_GIB


@given(TIMEOUTS, SIZES, st.none() | LOADS, MISSES, st.floats(0.0, 3600.0))
def test_more_never_shortens_it(
    timeout: float, size: int, load: float | None, missed: int, more: float
) -> None:
    """A longer setting, a larger model, slower loads and more misses lengthen it or leave it as it is."""
    deadline = start_deadline(timeout, size, load, missed)
    assert start_deadline(timeout + more, size, load, missed) >= deadline
    assert start_deadline(timeout, size + int(more), load, missed) >= deadline
    assert start_deadline(timeout, size, load, missed + 1) >= deadline
    if load is not None:
        assert start_deadline(timeout, size, load + more, missed) >= deadline


@given(TIMEOUTS, SIZES, st.none() | LOADS, MISSES)
def test_a_server_that_hangs_is_not_waited_for_without_end(
    timeout: float, size: int, load: float | None, missed: int
) -> None:
    """However often it was missed, it is bounded by what is known of the model."""
    known = max(timeout, start_deadline(timeout, size, load, 0))
    assert start_deadline(timeout, size, load, missed) <= known * 2**DOUBLINGS
