"""The snapshot for operators, in the wire's form."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis.process import VERSION
from tidegate_lifecycle.budget import Card, Ledger
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.fleet import Fleet
from tidegate_lifecycle.hub import watching
from tidegate_lifecycle.instance import Instance
from tidegate_lifecycle.needs import Need, Source
from tidegate_lifecycle.placing import groups
from tidegate_lifecycle.supply import millis, model_supply


def snapshot(fleet: Fleet, now: float) -> pb.GetStatusResponse:
    """Everything there is."""
    cards = {card.id: card for card in fleet.cards()}
    ledger = Ledger(cards.values(), fleet.instances.values())
    return pb.GetStatusResponse(
        version=VERSION,
        uptime_ms=millis(now - fleet.began),
        settled=fleet.settled,
        models=[_model(fleet, model, cards, now) for _, model in sorted(fleet.catalog.models.items())],
        instances=[_instance(item, now) for item in fleet.instances.values()],
        devices=[_device(fleet, device, cards[device.id], ledger, now) for device in fleet.devices.values()],
        admission_connected=fleet.link.connected,
        catalog_generation=fleet.config.generation,
        config_age_ms=millis(now - fleet.config.read_at),
        config_problems=fleet.config.problems,
        config_needs_restart=fleet.config.needs_restart,
    )


def _model(fleet: Fleet, model: Model, cards: dict[str, Card], now: float) -> pb.ModelStatus:
    counts = fleet.counts.get(model.name, {})
    status = pb.ModelStatus(
        model=model.name,
        loads=counts.get("loads", 0),
        failed_loads=counts.get("failed_loads", 0),
        restarts=counts.get("restarts", 0),
        load_time_ms=millis(fleet.load_times.get(model.name, 0.0)),
        pinned=model.always_on or model.name in fleet.pinned,
    )
    if not model.external:
        _tell_need(status, fleet.need(model), cards.values())
    fetch = fleet.fetches.of(one for one in fleet.instances.values() if one.model == model.name)
    if fetch is not None:
        status.download.CopyFrom(watching.status(fetch))
    if model.name in fleet.told.views:
        supply = model_supply(fleet.told.views[model.name], now)
        status.state, status.reason, status.message = supply.state, supply.reason, supply.message
        status.retry_after_ms = supply.retry_after_ms
    wait = fleet.waits.get(model.name)
    if wait is not None and not status.message:
        status.message = f"waits ({wait.reason.value}): {wait.text}"
    return status


def _tell_need(status: pb.ModelStatus, need: Need, cards: Iterable[Card]) -> None:
    """Of the cards of its pool on which it fits those where it needs the least."""
    options = [(need.on(one.cards[0], one.count), one) for one in groups(need, cards)]
    if not options:
        status.need_source = (Source.DECLARED if need.declared else Source.UNKNOWN).value
        return
    mib, group = min(options, key=lambda option: option[0])
    source = need.source(group.cards[0], group.count)
    status.need_source = source.value
    status.need_mib = 0 if source is Source.UNKNOWN else mib


def _instance(item: Instance, now: float) -> pb.InstanceStatus:
    status = pb.InstanceStatus(
        instance_id=item.id,
        model=item.model,
        state=item.state.value,  # type: ignore[arg-type]
        address=item.address,
        device_ids=item.devices,
        reserved_mib=item.reserved_mib,
        age_ms=millis(now - item.ordered_at),
        idle_ms=0 if item.leases else millis(now - item.last_used),
        leases=item.leases,
        pid=item.pid,
        adopted=item.adopted,
        reason=item.reason,
    )
    if item.running is not None:
        status.running = item.running
    if item.queued is not None:
        status.queued = item.queued
    return status


def _device(fleet: Fleet, device: Device, card: Card, ledger: Ledger, now: float) -> pb.DeviceStatus:
    promised = sum(
        need
        for intent in fleet.intents
        if not intent.victims
        for name, need in zip(intent.devices, intent.needs, strict=True)
        if name == device.id
    )
    status = pb.DeviceStatus(
        device_id=device.id,
        uuid=device.uuid,
        name=device.name,
        pool=device.pool,
        total_mib=device.total_mib,
        budget_mib=device.budget_mib,
        reserved_mib=ledger.reserved(device.id) + promised,
        problem=device.problem,
        draining=card.draining,
        settling_mib=card.settling_mib,
        missing=device.missing,
    )
    if device.since is not None:
        status.problem_ms = millis(now - device.since)
    if device.used_mib is not None:
        status.foreign_mib = card.foreign_mib
    return status
