"""What admission is told: a view per model that changes only when something has changed, and its report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.catalog import Catalog, Model
from tidegate_lifecycle.engines import ENGINES
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.world import Circuit, Wait, WaitReason

ROOM_RETRY = 5.0
"""Seconds after which a model that found no capacity may be asked for again."""


@dataclass(frozen=True)
class InstanceView:
    """One instance; times are absolute, so that an unchanged one compares equal."""

    id: str
    address: str
    state: InstanceState
    ordered_at: float
    running: int | None
    queued: int | None


@dataclass(frozen=True)
class ModelView:
    """One model; times are monotonic seconds."""

    model: Model
    state: int
    """A value of pb.ModelState."""
    slots: int | None
    ready_in: float | None = None
    """Seconds from whenever it is asked for."""
    ready_at: float | None = None
    """When a start, or its turn, that is under way should be over."""
    deadline_at: float = 0.0
    reason: int = pb.REASON_UNSPECIFIED
    message: str = ""
    retry_at: float = 0.0
    """0 = a retry can't help."""
    instances: tuple[InstanceView, ...] = ()


def slots(model: Model) -> int | None:
    """Requests in flight per instance; None = admission's default."""
    return model.max_concurrent or ENGINES[model.engine].default_slots(model)


def view(
    model: Model,
    instances: Sequence[Instance],
    wait: Wait | None,
    circuit: Circuit | None,
    unhealthy: str,
    load_time: float | None,
    now: float,
) -> ModelView:
    """What is to be told of a model.

    1. One instance serves: ready.
    2. An external one that doesn't answer: the reason.
    3. One is starting: loading, with what remains of the learned time and of the start deadline.
    4. A failed start in its back-off, no place for it: the reason.
    5. Else it is stopped, or failed and to be tried again: the learned load time, or the bound of its turn.
    """
    existing = [item for item in instances if item.exists]
    shown = tuple(InstanceView(i.id, i.address, i.state, i.ordered_at, i.running, i.queued) for i in existing)
    base = ModelView(model, pb.MODEL_STATE_STOPPED, slots(model), instances=shown)
    starting = [item for item in existing if item.state is InstanceState.STARTING]
    if any(item.state is InstanceState.READY for item in existing):  # 1
        return replace(base, state=pb.MODEL_STATE_READY)
    if unhealthy:  # 2
        failed = replace(base, state=pb.MODEL_STATE_FAILED, reason=pb.REASON_UNHEALTHY)
        return replace(failed, message=unhealthy, retry_at=_ROLLING)
    if starting:  # 3
        return _loading(base, starting, circuit, load_time)
    if circuit is not None and circuit.is_open(now):  # 4
        failed = replace(base, state=pb.MODEL_STATE_FAILED, reason=pb.REASON_START_FAILED)
        return replace(failed, message=circuit.message, retry_at=circuit.retry_at)
    if wait is not None and wait.reason is WaitReason.NEVER_FITS:  # 4
        return replace(base, reason=pb.REASON_NEVER_FITS, message=f"it can never fit: {wait.text}")
    if wait is not None and wait.reason is WaitReason.NO_CAPACITY:  # 4
        none = replace(base, reason=pb.REASON_NO_CAPACITY, message=f"there is no room: {wait.text}")
        return replace(none, retry_at=_ROLLING)
    return _stopped(base, wait, circuit, load_time, now)  # 5


def _loading(
    base: ModelView, starting: Sequence[Instance], circuit: Circuit | None, load_time: float | None
) -> ModelView:
    began = min(item.loads_since for item in starting)
    return replace(
        base,
        state=pb.MODEL_STATE_LOADING,
        ready_at=None if load_time is None else began + load_time,
        deadline_at=max(item.deadline_at for item in starting),
        message=f"its last start failed, one try is under way: {circuit.message}" if circuit else "",
    )


def _stopped(
    base: ModelView, wait: Wait | None, circuit: Circuit | None, load_time: float | None, now: float
) -> ModelView:
    if circuit is not None:
        base = replace(base, state=pb.MODEL_STATE_FAILED)
    if wait is None:
        message = f"its last start failed, a request tries again: {circuit.message}" if circuit else ""
        return replace(base, ready_in=load_time, message=message)
    bound = wait.ready_in
    # Up to five seconds more: the bound is an estimate, and not each tick of it is news.
    return replace(base, ready_at=None if bound is None else math.ceil((now + bound) / 5) * 5.0)


def farewell(item: ModelView) -> ModelView:
    """The same for a model that was taken out of the catalogue: it is refused, and its servers drain."""
    return ModelView(
        item.model,
        pb.MODEL_STATE_STOPPED,
        item.slots,
        reason=pb.REASON_NOT_FOUND,
        message="the model was taken out of the configuration",
        instances=item.instances,
    )


_ROLLING = -1.0
"""A retry time that is always ROOM_RETRY from now."""


def model_supply(item: ModelView, now: float) -> pb.ModelSupply:
    """The wire's form: durations from now."""
    supply = pb.ModelSupply(
        model=item.model.name,
        state=item.state,  # type: ignore[arg-type]
        reason=item.reason,  # type: ignore[arg-type]
        message=item.message,
        start_deadline_ms=max(1, millis(item.deadline_at - now)) if item.deadline_at else 0,
        retry_after_ms=millis(ROOM_RETRY) if item.retry_at == _ROLLING else millis(item.retry_at - now),
        instances=[_instance_supply(one, item.slots, now) for one in item.instances],
    )
    if item.slots is not None:
        supply.max_concurrent = item.slots
    if item.model.max_queue is not None:
        supply.max_queue = item.model.max_queue
    ready_in = item.ready_in if item.ready_at is None else item.ready_at - now
    if ready_in is not None and ready_in > 0:  # what takes longer than it should is unknown
        supply.ready_in_ms = millis(ready_in)
        supply.under_way = item.ready_at is not None
    return supply


def _instance_supply(item: InstanceView, limit: int | None, now: float) -> pb.InstanceSupply:
    supply = pb.InstanceSupply(
        instance_id=item.id,
        address=item.address,
        state=item.state.value,  # type: ignore[arg-type]
        slots=limit or 0,
        age_ms=millis(now - item.ordered_at),
    )
    if item.running is not None:
        supply.running = item.running
    if item.queued is not None:
        supply.queued = item.queued
    return supply


def millis(seconds: float) -> int:
    """Whole milliseconds, never below 0."""
    return max(0, round(seconds * 1000))


def catalog_response(
    catalog: Catalog, views: Mapping[str, ModelView], generation: tuple[int, int], node_id: str, age: float
) -> pb.WatchCatalogResponse:
    """The whole catalogue with states; `generation` is (boot, its count)."""
    models = [
        pb.CatalogModel(
            name=model.name,
            aliases=model.aliases,
            upstream_model=model.served_name,
            request_defaults_json=json.dumps(model.request_defaults) if model.request_defaults else "",
            state=views[model.name].state if model.name in views else pb.MODEL_STATE_STOPPED,  # type: ignore[arg-type]
            engine=model.engine,
            age_ms=millis(age),
        )
        for _, model in sorted(catalog.models.items())
    ]
    count = pb.Generation(incarnation=generation[0], n=generation[1])
    return pb.WatchCatalogResponse(generation=count, models=models, node_id=node_id)
