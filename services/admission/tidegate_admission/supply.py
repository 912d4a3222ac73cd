"""What lifecycle says there is to grant, and what of it counts.

While lifecycle is unsettled (it has just started) it only adds: what the last settled supply named stays in
view until a settled one leaves it out. A fresh lifecycle truthfully reports that nothing runs.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tidegate_admission.ticket import NO_GENERATION, Generation, Reason


class InstanceState(enum.IntEnum):
    """State of an instance; `tidegate.lifecycle.v1.InstanceState`, whose comments say who leaves it when."""

    STARTING = 1
    READY = 2
    DRAINING = 3
    FALLING_ASLEEP = 4
    SLEEPING = 5
    WAKING = 6
    STOPPING = 7
    GONE = 8


MAY_SERVE = frozenset({InstanceState.STARTING, InstanceState.READY, InstanceState.WAKING})
"""States of an instance that serves, or may soon."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One instance that exists."""

    id: str
    address: str
    state: int
    """An InstanceState; one that this version doesn't know is never granted on."""
    slots: int = 0
    """Its ceiling; 0 = it names none."""
    old: bool = False
    """It was there before this process, so somebody may hold leases on it that the book doesn't know."""
    running: int | None = None
    """What its server itself reports as running; None = nothing."""
    queued: int | None = None
    """What its server itself reports as waiting in it; None = nothing."""


@dataclass(frozen=True, slots=True)
class ModelSupply:
    """What there is of one model; durations in seconds."""

    model: str
    instances: tuple[Instance, ...] = ()
    max_concurrent: int | None = None
    max_queue: int | None = None
    ready_in: float | None = None
    """When a slot can be had while no server is up; None = unknown."""
    start_deadline: float = 0.0
    """What is left of it while the model loads; 0 = it isn't loading."""
    reason: Reason | None = None
    """Why it can't be had; None = it can."""
    message: str = ""
    retry_after: float = 0.0
    under_way: bool = False
    """`ready_in` counts down from now; else it is from whenever somebody asks for the model."""


@dataclass(frozen=True, slots=True)
class Supply:
    """One report."""

    generation: Generation
    whole: bool
    settled: bool
    models: tuple[ModelSupply, ...] = ()
    removed: tuple[str, ...] = ()
    catalog: Generation = NO_GENERATION
    roster: tuple[str, ...] = ()
    roster_known: bool = False
    first_admission: bool = False
    """There was none before this one."""


@dataclass(slots=True)
class SupplyBook:
    """The view of supply that admission acts on. Its only writer is the dispatcher."""

    generation: Generation = NO_GENERATION
    """The newest report taken in."""
    catalog: Generation = NO_GENERATION
    settled: bool = False
    """The newest report was a settled one, so what the view lacks does not exist."""
    view: dict[str, ModelSupply] = field(default_factory=dict)
    """By model: what is granted on."""
    _stated: dict[str, ModelSupply] = field(default_factory=dict)
    _last_settled: dict[str, ModelSupply] = field(default_factory=dict)

    def take(self, report: Supply) -> set[str]:
        """Takes a report in; gives the models whose view may have changed.

        1. A whole report replaces what this lifecycle has stated; any other one updates it.
        2. Settled: the view is what is stated.
        3. Not settled: the view is the last settled one with what is stated added to it.
        """
        named = {item.model for item in report.models}
        affected = named | set(report.removed)
        if report.whole:  # 1
            affected |= set(self._stated)
            self._stated = {}
        for model in report.removed:
            self._stated.pop(model, None)
        self._stated.update({item.model: item for item in report.models})
        if report.settled != self.settled or report.whole:
            affected |= set(self.view) | set(self._stated)
        if report.settled:  # 2
            view = self._last_settled = self._stated
        else:  # 3
            view = _added(self._last_settled, self._stated)
        self.view = dict(view)
        self.generation, self.catalog, self.settled = report.generation, report.catalog, report.settled
        return affected

    def gone(self, model: str, instance_id: str) -> bool:
        """Whether a settled supply says that no such instance exists."""
        if not self.settled:
            return False
        known = self.view.get(model)
        return known is None or all(instance.id != instance_id for instance in known.instances)


def _added(base: dict[str, ModelSupply], stated: dict[str, ModelSupply]) -> dict[str, ModelSupply]:
    view = dict(base)
    for model, item in stated.items():
        before = base.get(model)
        instances = {instance.id: instance for instance in (before.instances if before else ())}
        instances.update({instance.id: instance for instance in item.instances})
        # A reason is a judgement over everything that exists, and an unsettled lifecycle doesn't know that.
        view[model] = replace(item, instances=tuple(instances.values()), reason=None)
    return view


def present(instances: Iterable[Instance]) -> list[Instance]:
    """Those that exist: a GONE one is only a farewell."""
    return [instance for instance in instances if instance.state != InstanceState.GONE]
