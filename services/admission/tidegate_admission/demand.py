"""What admission tells lifecycle: values, made from the gates when a report is due."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tidegate_admission.gate import Gate
from tidegate_admission.ticket import Generation

_LOOK = 100
"""Tickets that are searched for a trace."""


@dataclass(frozen=True, slots=True)
class InstanceDemand:
    """How one instance is used."""

    id: str
    leases: int
    grants: int


@dataclass(frozen=True, slots=True)
class ModelDemand:
    """What is wanted of one model; a model that nobody uses any more has zeros."""

    model: str
    waiting: int = 0
    oldest_wait: float = 0.0
    arrival_rate: float = 0.0
    instances: tuple[InstanceDemand, ...] = ()
    trace_parent: str = ""
    by_band: tuple[int, ...] = (0, 0, 0)
    """Waiting in each band, from high to low."""
    interest: float = 0.0
    """Seconds for which somebody is expected back who was refused because the model loads too slowly."""


@dataclass(frozen=True, slots=True)
class Demand:
    """One report."""

    uptime: float
    whole: bool
    settled: bool
    supply_seen: Generation
    models: tuple[ModelDemand, ...]
    roster: tuple[str, ...]


def of_gate(gate: Gate, now: float) -> ModelDemand:
    """A gate's demand now."""
    traced = (ticket.trace_parent for ticket in itertools.islice(gate.waiting.values(), _LOOK))
    return ModelDemand(
        gate.model,
        len(gate.waiting),
        now - min(gate.turns.oldest(), now),
        gate.arrival_rate,
        tuple(InstanceDemand(slot.id, len(slot.leases), slot.grants) for slot in gate.slots.values()),
        next(filter(None, traced), ""),
        gate.turns.by_band(),
        gate.outlook.interest(now),
    )
