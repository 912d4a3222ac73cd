"""What a changed configuration means: the old catalogue and the new one, compared. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tidegate_lifecycle.catalog import Catalog, Model

TAKEN_OVER = frozenset({"idle_timeout", "min_residency", "max_swap_wait", "drain_timeout"})
"""Keys of section `lifecycle` that take effect without a restart of the service."""
_OF_MODELS = frozenset({"docker.image"})
"""Keys that only fill in what models leave out: they take effect as changes of these models."""


@dataclass(frozen=True)
class Changes:
    """The models that differ, by name. Every model of both catalogues is in at most one of these."""

    added: tuple[str, ...] = ()
    """They can be had from now on."""
    removed: tuple[str, ...] = ()
    """They drain, and are refused from now on."""
    reshaped: tuple[str, ...] = ()
    """Their servers must be other ones: those that run drain."""
    adjusted: tuple[str, ...] = ()
    """Their servers go on as they are: only limits, names, times or the like have changed."""

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.reshaped or self.adjusted)

    def __str__(self) -> str:
        """For people."""
        parts = (
            ("added", self.added),
            ("removed", self.removed),
            ("restarted when they run", self.reshaped),
            ("adjusted", self.adjusted),
        )
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names) or "nothing changed"


def compare(old: Catalog, new: Catalog, shape: Callable[[Model], str]) -> Changes:
    """What has changed. `shape` is a text that is the same for two forms of a model exactly when a server of
    the one may go on as a server of the other.

    1. Only in the new one: added. 2. Only in the old one: removed.
    3. In both, with another shape: reshaped. 4. In both, with the same shape, but not equal: adjusted.
    """
    added = sorted(new.models.keys() - old.models.keys())  # 1
    removed = sorted(old.models.keys() - new.models.keys())  # 2
    reshaped, adjusted = [], []
    for name in sorted(old.models.keys() & new.models.keys()):
        before, after = old.models[name], new.models[name]
        if shape(before) != shape(after):  # 3
            reshaped.append(name)
        elif before != after:  # 4
            adjusted.append(name)
    return Changes(tuple(added), tuple(removed), tuple(reshaped), tuple(adjusted))


def needs_restart(old: BaseModel, new: BaseModel, section: str) -> tuple[str, ...]:
    """The keys of a section that differ and are read only when the service starts, with their full names."""
    return tuple(
        f"{section}.{key}"
        for key in _differing(old, new)
        if section != "lifecycle" or (key not in TAKEN_OVER and key not in _OF_MODELS)
    )


def _differing(old: BaseModel, new: BaseModel) -> list[str]:
    found: list[str] = []
    for key in type(old).model_fields:
        before, after = _value(old, key), _value(new, key)
        if before == after:
            continue
        nested = isinstance(before, BaseModel) and isinstance(after, BaseModel)
        found += [f"{key}.{inner}" for inner in _differing(before, after)] if nested else [key]
    return found


def _value(settings: BaseModel, key: str) -> Any:
    return getattr(settings, key)
