"""The fleet: what runs where, and how that is changed. Only the reconciler calls what changes it."""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import structlog
from opentelemetry.trace import Span

from tidegate_chassis import telemetry
from tidegate_chassis.errors import Refused
from tidegate_chassis.process import monotonic
from tidegate_lifecycle import messages as m
from tidegate_lifecycle import metrics
from tidegate_lifecycle.adoption import Found
from tidegate_lifecycle.budget import Card, Intent
from tidegate_lifecycle.catalog import Catalog, Model
from tidegate_lifecycle.circuits import Circuits
from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.engines import ENGINES, shape
from tidegate_lifecycle.engines.base import Files, Placement
from tidegate_lifecycle.events import Events
from tidegate_lifecycle.footprints.desk import Desk
from tidegate_lifecycle.hub.watching import Fetches
from tidegate_lifecycle.instance import Drain, Instance, InstanceState
from tidegate_lifecycle.inventory import Events as Happened
from tidegate_lifecycle.inventory import Inventory, names
from tidegate_lifecycle.keeper import ExternalKeeper, Keeper, Tools
from tidegate_lifecycle.link import Link
from tidegate_lifecycle.needs import Estimate, Need, Source, need_of
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.runtimes.base import StartSpec
from tidegate_lifecycle.start_deadline import start_deadline
from tidegate_lifecycle.store import Store
from tidegate_lifecycle.telling import Told
from tidegate_lifecycle.world import (
    Policy,
    Start,
    Wait,
    World,
)

log = structlog.get_logger("tidegate.reconciler")

EXTERNAL_PATIENCE = 5.0
"""Seconds that tickets wait for the first health check of an external server."""
SHUTDOWN_GRACE = 3.0
"""Seconds from SIGTERM to SIGKILL when the service stops."""


@dataclass
class Config:
    """The configuration in effect, and what the file is like by now."""

    generation: int = 1
    """The catalogue's count."""
    read_at: float = 0.0
    """When it was last put into effect."""
    problems: tuple[str, ...] = ()
    """What is wrong with the file; empty = it is what is in effect."""
    needs_restart: tuple[str, ...] = ()
    """Keys of the file that only a restart puts into effect."""


class Fleet:
    """Instances with their keepers, circuits, intents and orders; and the views that others are told."""

    def __init__(
        self,
        catalog: Catalog,
        policy: Policy,
        folder: Path,
        boot: int,
        link: Link,
        store: Store,
        devices: Sequence[Device],
        load_times: dict[str, float],
        taken: Collection[str] = (),
    ) -> None:
        self.catalog, self.policy, self.folder, self.boot = catalog, policy, folder, boot
        self.link, self.store = link, store
        self.inventory = Inventory(devices, taken)
        self.devices = self.inventory.devices
        self.hurry: Callable[[bool], None] = lambda settling: None
        """Told whether memory waits to be seen free: then the devices are read at once, and fast."""
        self.load_times = load_times
        self.estimates: dict[str, Estimate] = {}
        """What the files of a model say that it needs."""
        self.estimating: set[str] = set()
        """Models whose files are being read for the first time."""
        self.footprints = Desk(self)
        self.node = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40] or "node"
        self.events = Events()
        self.instances: dict[str, Instance] = {}
        self.keepers: dict[str, Keeper | ExternalKeeper] = {}
        self.circuits = Circuits()
        self.unhealthy: dict[str, str] = {}
        self.fetches = Fetches()
        self.intents: tuple[Intent, ...] = ()
        self.waits: dict[str, Wait] = {}
        self.ordered: set[str] = set()
        self.pinned: set[str] = set()
        self.unload: set[str] = set()
        self.counts: dict[str, dict[str, int]] = {}
        self.leaving: dict[str, Model] = {}
        """Models that were taken out of the catalogue while servers of theirs exist."""
        self.told = Told()
        self.catalog_watchers: set[asyncio.Event] = set()
        self.stopping = False
        self.began = monotonic()
        self.config = Config(read_at=self.began)
        self.settled = False
        """The first reconcile is done."""
        self.tools: Tools
        """Set by the reconciler before anything is started."""
        self._spans: dict[str, Span] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def world(self) -> World:
        """What the planner is to see now."""
        return World(
            catalog=self.catalog.models,
            cards=self.cards(),
            instances=tuple(self.instances.values()),
            demand=self.link.demand,
            circuits=self.circuits.known,
            needs={name: self.need(model) for name, model in self.catalog.models.items()},
            load_times=self.load_times,
            intents=self.intents,
            settled=self.link.connected and self.link.settled,
            seen=self.link.seen if self.link.settled else 0,
            ordered=frozenset(self.ordered),
            pinned=frozenset(self.pinned),
            unload=frozenset(self.unload),
            policy=self.policy,
        )

    def need(self, model: Model) -> Need:
        """What one server of it needs, by all that is known."""
        known = self.estimates.get(model.name), self.footprints.needs().get(model.name)
        return need_of(model, *known, model.name in self.estimating)

    def too_little(self, instance: Instance) -> None:
        """Its server ran out of the memory that was reserved: if that was an estimate, it was too low."""
        model, count = self.catalog.models[instance.model], len(instance.devices)
        need, on = self.need(model), [card for card in self.cards() if card.id in instance.devices]
        if any(need.source(card, count) is Source.ESTIMATED for card in on):
            self.estimates[model.name] = self.estimates[model.name].after_too_little()

    def cards(self) -> tuple[Card, ...]:
        """The devices as the planner sees them."""
        return self.inventory.cards()

    def tell(self, events: Happened, now: float) -> None:
        """Events of the inventory."""
        for kind, words in events:
            self.events.add(now, kind, message=words)

    def renew_catalog(self, catalog: Catalog) -> None:
        """Puts another catalogue in place. What runs isn't touched; the next `publish` tells it in any case:
        admission holds back what was judged by a catalogue that it hasn't seen."""
        known = {**self.leaving, **self.catalog.models}
        self.leaving = {name: model for name, model in known.items() if name not in catalog.models}
        self.catalog = catalog
        self.config.generation += 1
        for watcher in self.catalog_watchers:
            watcher.set()

    def to(self, instance: Instance, state: InstanceState, now: float, reason: str = "") -> None:
        instance.to(state, now, reason)
        instance.generation = 0
        self.events.add(now, state.name.lower(), instance.model, instance.id, reason)

    def drain(self, instance: Instance, drain: Drain, reason: str) -> None:
        instance.start_drain(drain, reason)
        instance.generation = 0
        self.events.add(drain.since, "draining", instance.model, instance.id, reason)

    def stop(self, instance: Instance, now: float, reason: str) -> None:
        if instance.state is not InstanceState.STOPPING:
            self.to(instance, InstanceState.STOPPING, now, reason)
        keeper = self.keepers[instance.id]
        if self.stopping:
            keeper.stop(SHUTDOWN_GRACE)
        else:
            keeper.stop()

    def _new_id(self, model: str) -> str:
        return f"{self.node}.{re.sub(r'[^A-Za-z0-9-]', '-', model)[:40]}.{secrets.token_hex(4)}"

    def start(self, action: Start, now: float) -> None:
        model = self.catalog.models[action.model]
        engine = ENGINES[model.engine]
        instance = Instance(
            self._new_id(model.name),
            model.name,
            action.devices,
            action.reserved_mib,
            now,
            since=now,
            last_used=now,
        )
        instance.shape = shape(model)
        self._bound(instance, model)
        self.instances[instance.id] = instance
        self.footprints.started(instance, now)
        keeper = Keeper(instance.id, model, engine, self.tools)
        self.keepers[instance.id] = keeper
        devices = tuple(self.devices[device] for device in action.devices)

        def spec(host: str, port: int, files: Files) -> StartSpec:
            command = engine.command(model, Placement(host, port, devices, action.reserved_mib, files))
            return StartSpec(
                instance_id=instance.id,
                model=model.name,
                signature=engine.signature(model),
                argv=command.argv,
                env=command.env,
                cwd=self.folder,
                host=host,
                port=port,
                device_ids=tuple(device.key for device in devices),
                reserved_mib=action.reserved_mib,
                image=model.image,
                image_entrypoint=command.image_entrypoint,
                volumes=model.volumes,
                cards=tuple(filter(None, (device.visible_as for device in devices))),
                hub=command.hub,
            )

        self.events.add(now, "starting", model.name, instance.id, action.reason)
        demand = self.link.demand.get(model.name)
        attributes = {"model": model.name, "instance": instance.id, "devices": ",".join(action.devices)}
        parent = demand.trace_parent if demand is not None else ""
        self._spans[instance.id] = telemetry.start_span("lifecycle.load", parent, attributes=attributes)
        self.spawn(keeper.start(spec, instance.patience))

    def _bound(self, instance: Instance, model: Model) -> None:
        """Its start deadline, by what is known of its model now."""
        circuit = self.circuits.known.get(model.name)
        instance.patience = start_deadline(
            model.start_timeout,
            instance.reserved_mib * len(instance.devices),
            self.load_times.get(model.name),
            circuit.missed if circuit is not None else 0,
        )
        instance.deadline_at = instance.loads_since + instance.patience

    def end_span(self, instance_id: str, failed: str = "") -> None:
        span = self._spans.pop(instance_id, None)
        if span is not None:
            if failed:
                telemetry.fail_span(span, failed)
            span.end()

    def watch_external(self, model: Model, url: str, now: float) -> None:
        address = url.rstrip("/")
        instance = Instance(self._new_id(model.name), model.name, (), 0, now, since=now, last_used=now)
        instance.address, instance.shape = address, shape(model)
        instance.launched_at, instance.deadline_at = now, now + EXTERNAL_PATIENCE
        self.instances[instance.id] = instance
        keeper = ExternalKeeper(instance.id, model, ENGINES[model.engine], address, self.tools)
        self.keepers[instance.id] = keeper
        self.spawn(keeper.run())

    def take_over(self, item: Found, now: float) -> None:
        """Adopts a server that was found running; one that isn't wanted as it is ends, and holds its room."""
        server = item.server
        found = (self.inventory.find(name) for name in server.device_ids)
        known = tuple(device.id for device in found if device is not None)
        instance = Instance(
            server.instance_id,
            server.model,
            known,
            server.reserved_mib,
            now - server.age,
            since=now,
            last_used=now,
        )
        instance.address, instance.pid, instance.adopted = server.address, server.pid, True
        self.instances[instance.id] = instance
        model = self.catalog.models.get(server.model) or Model(server.model)
        instance.shape = shape(model)
        keeper = Keeper(instance.id, model, ENGINES[model.engine], self.tools)
        self.keepers[instance.id] = keeper
        instance.launched_at = instance.ordered_at
        self._bound(instance, model)
        self.spawn(keeper.adopt(server, item.ready, instance.deadline_at))
        if item.unwanted:
            self.stop(instance, now, item.unwanted)
            return
        if item.ready:
            instance.to(InstanceState.READY, now)
            self.footprints.ready(instance)
        metrics.ADOPTED.labels(instance.model).inc()
        self.events.add(now, "adopted", instance.model, instance.id, f"process {server.pid}")

    def count(self, model: str, what: str) -> None:
        counts = self.counts.setdefault(model, {})
        counts[what] = counts.get(what, 0) + 1

    def load_error(self, name: str, now: float) -> Refused | None:
        """Why an order to load it can't be carried out; a back-off is no reason, the order ends it."""
        world = self.world()
        circuits = {model: circuit for model, circuit in world.circuits.items() if model != name}
        trial = plan(replace(world, ordered=world.ordered | {name}, circuits=circuits), now)
        wait = trial.waits.get(name)
        if wait is None or not wait.refuses:
            return None
        return refused(f"REASON_{wait.reason.name}", wait.text)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """A task whose exception is fatal for the service."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.tools.post(m.Broke(error))

    async def let_go(self) -> None:
        """Ends the keepers' tasks and leaves the servers running."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def refused(reason: str, text: str, retry_after: float = 0.0) -> Refused:
    """An order that can't be carried out."""
    return Refused(grpc.StatusCode.FAILED_PRECONDITION, reason, text, retry_after)


def no_device(name: str, devices: Sequence[Device]) -> Refused:
    """There is none of that name."""
    text = f"there is no device {name[:200]!r}; there are {names(devices)}"
    return Refused(grpc.StatusCode.NOT_FOUND, "REASON_NOT_FOUND", text)
