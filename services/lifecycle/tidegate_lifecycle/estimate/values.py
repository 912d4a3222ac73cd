"""Values out of files that others wrote: a whole number is one, or it is missing. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate_lifecycle.estimate.shape import UnknownError

_LARGEST = 2**40


def words(text: str) -> frozenset[str]:
    """A set of names from one text."""
    return frozenset(text.split())


def maybe(values: Mapping[str, Any], *names: str) -> int | None:
    """The first of the keys that is there, a whole number from 0; None when none is.

    UnknownError for anything else than a number under such a key.
    """
    for name in names:
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:  # NaN
            raise UnknownError(f"{name} is no number")
        if not 0 <= value <= _LARGEST or value != int(value):
            raise UnknownError(f"{name} = {value} makes no sense")
        return int(value)
    return None


def whole(values: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """As `maybe`, but it has to be there and above 0, unless there is a default."""
    found = maybe(values, *names)
    if found is None and default is not None:
        return default
    if not found:
        raise UnknownError(f"{names[0]} isn't given")
    return found
