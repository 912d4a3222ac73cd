"""The one writer: it alone changes instances, circuits and intents. Others post messages to its mailbox.

It takes in what has happened, asks the planner, carries the actions out through one keeper per instance,
and publishes what has changed. Each message has a named handler; none of them waits.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import structlog

from tidegate_chassis.process import monotonic
from tidegate_lifecycle import messages as m
from tidegate_lifecycle import metrics, renewal
from tidegate_lifecycle.adoption import Found
from tidegate_lifecycle.budget import Ledger
from tidegate_lifecycle.estimating import Estimator, keep_up, take_estimate
from tidegate_lifecycle.fleet import Fleet, no_device, refused
from tidegate_lifecycle.instance import Drain, DrainCause, Instance, InstanceState
from tidegate_lifecycle.keeper import Tools
from tidegate_lifecycle.planner import plan
from tidegate_lifecycle.world import (
    Plan,
    Start,
    StartDrain,
    Stop,
    Undrain,
)

log = structlog.get_logger("tidegate.reconciler")

TICK = 1.0
"""Seconds between two plans at most: for times that the planner doesn't name."""


class Reconciler:
    """The fleet's state and what happens to it. `post` may be called from anywhere on the loop."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.estimator: Estimator | None = None
        """Reckons what models need; None = nobody does."""
        self.mailbox: asyncio.Queue[m.Message] = asyncio.Queue()
        self.settled = asyncio.Event()
        """The first reconcile is done."""
        self.finished = asyncio.Event()
        """The service stops, and no instance exists any more."""
        self._handlers: dict[type[Any], Callable[[Any, float], None]] = {
            m.Launched: self._launched,
            m.BecameReady: self._became_ready,
            m.StartEnded: self._start_ended,
            m.Fetching: self._fetching,
            m.Died: self._died,
            m.Gone: self._gone,
            m.Sampled: self._sampled,
            m.DemandCame: self._demand_came,
            m.StreamEnded: self._stream_ended,
            m.DevicesRead: self._devices_read,
            m.Estimated: self._estimated,
            m.Learned: self._learned,
            m.Order: self._order,
            m.DeviceOrder: self._device_order,
            m.Reloaded: partial(renewal.take, self.fleet),
            m.ConfigRefused: partial(renewal.refuse, self.fleet),
            m.Shutdown: self._shutdown,
            m.Broke: self._broke,
            **fleet.footprints.handlers,
        }

    def post(self, message: m.Message) -> None:
        """Tells it something; never waits."""
        self.mailbox.put_nowait(message)

    async def run(self, tools: Tools, found: Sequence[Found]) -> None:
        """Works until cancelled. `found` are the servers that ran already, judged."""
        self.fleet.tools = tools
        now = monotonic()
        for item in found:
            self.fleet.take_over(item, now)
        self.fleet.inventory.read(list(self.fleet.devices.values()), now, self.fleet.instances.values())
        self.settled.set()
        self.fleet.settled = True
        for model in self.fleet.catalog.models.values():
            for url in model.urls:
                self.fleet.watch_external(model, url, now)
        if self.fleet.link.stream is not None:  # what was sent until now was unsettled: tell everything again
            self.fleet.link.stream.sent = -1
        wake_at = self._reconcile(monotonic())
        while True:
            pause = min(TICK, max(0.0, wake_at - monotonic()))
            try:
                async with asyncio.timeout(pause + 0.001):
                    message = await self.mailbox.get()
            except TimeoutError:
                pass
            else:
                self._handle(message)
                while not self.mailbox.empty():
                    self._handle(self.mailbox.get_nowait())
            wake_at = self._reconcile(monotonic())

    def _handle(self, message: m.Message) -> None:
        self._handlers[type(message)](message, monotonic())

    # -- what has happened -------------------------------------------------------------------------

    def _launched(self, message: m.Launched, now: float) -> None:
        instance = self.fleet.instances[message.instance_id]
        instance.address, instance.pid = message.address, message.pid
        instance.launched_at, instance.deadline_at = message.at, message.at + instance.patience

    def _became_ready(self, message: m.BecameReady, now: float) -> None:
        instance = self.fleet.instances[message.instance_id]
        self.fleet.unhealthy.pop(instance.model, None)
        if instance.state is not InstanceState.STARTING:
            return  # it was told to stop meanwhile
        self.fleet.to(instance, InstanceState.READY, now)
        self.fleet.circuits.succeeded(instance.model)
        self.fleet.end_span(instance.id)
        self.fleet.footprints.ready(instance)
        if not self._external(instance) and not instance.adopted:
            took = now - instance.loads_since
            self.fleet.count(instance.model, "loads")
            metrics.LOADS.labels(instance.model).inc()
            metrics.LOAD_SECONDS.labels(instance.model).observe(took)
            self.fleet.spawn(self._remember(instance.model, took))

    def _external(self, instance: Instance) -> bool:
        """Its server runs elsewhere; also when its model has been changed since, or is gone."""
        return self.fleet.keepers[instance.id].model.external

    async def _remember(self, model: str, seconds: float) -> None:
        self.post(m.Learned(model, await self.fleet.store.record_load(model, seconds)))

    def _learned(self, message: m.Learned, now: float) -> None:
        self.fleet.load_times[message.model] = message.seconds

    def _start_ended(self, message: m.StartEnded, now: float) -> None:
        instance = self.fleet.instances[message.instance_id]
        if self._external(instance):
            self.fleet.unhealthy[instance.model] = message.text
            return
        if instance.state is not InstanceState.STARTING:
            return
        wanted = instance.model not in self.fleet.unload
        again = wanted and message.kind == "neighbour" and self.fleet.circuits.disturbed(instance.model)
        text = f"{message.text}; it is tried again at once" if again else message.text
        self.fleet.to(instance, InstanceState.STOPPING, now, text)
        self.fleet.events.add(now, "start_failed", instance.model, instance.id, text)
        self.fleet.end_span(instance.id, message.kind)
        metrics.FAILED_LOADS.labels(instance.model, message.kind).inc()
        if again:
            self.fleet.ordered.add(instance.model)
        else:
            self.fleet.count(instance.model, "failed_loads")
            self.fleet.ordered.discard(instance.model)
            self.fleet.circuits.failed(instance.model, message.text, now, message.kind == "deadline")
            if message.kind == "memory":
                self.fleet.too_little(instance)

    def _fetching(self, message: m.Fetching, now: float) -> None:
        event = self.fleet.fetches.take(message.instance_id, message.progress, now)
        instance = self.fleet.instances.get(message.instance_id)
        if event is not None and instance is not None:
            self.fleet.events.add(now, event[0], instance.model, instance.id, event[1])

    def _died(self, message: m.Died, now: float) -> None:
        instance = self.fleet.instances[message.instance_id]
        if instance.state not in (InstanceState.READY, InstanceState.DRAINING):
            return
        drained, ready_at = instance.state is InstanceState.DRAINING, instance.ready_at or now
        self.fleet.to(instance, InstanceState.STOPPING, now, message.text)
        self.fleet.events.add(now, "died", instance.model, instance.id, message.text)
        if self._external(instance):
            self.fleet.unhealthy[instance.model] = message.text
            return
        if instance.replaced:  # it was to go; nothing is held against what comes after it
            return
        self.fleet.count(instance.model, "restarts")
        metrics.RESTARTS.labels(instance.model).inc()
        if not self.fleet.circuits.crashed(instance.model, now - ready_at, message.text, now):
            self.fleet.ordered.discard(instance.model)
        elif not drained:
            self.fleet.ordered.add(instance.model)  # restarted, though nobody may wait for it just now

    def _gone(self, message: m.Gone, now: float) -> None:
        instance = self.fleet.instances.pop(message.instance_id)
        self.fleet.footprints.gone(instance.id)
        self.fleet.inventory.gone(instance, now)
        if instance.state is not InstanceState.STOPPING:
            self.fleet.to(instance, InstanceState.STOPPING, now, "it was told to end")
        self.fleet.to(instance, InstanceState.GONE, now, instance.reason)
        del self.fleet.keepers[instance.id]
        self.fleet.end_span(instance.id, "stopped")
        model = self.fleet.catalog.models.get(instance.model)
        if model is None or not any(other.model == instance.model for other in self.fleet.instances.values()):
            self.fleet.unload.discard(instance.model)
        if model is not None and instance.address in renewal.addresses(model) and not self.fleet.stopping:
            self.fleet.watch_external(model, instance.address, now)

    def _sampled(self, message: m.Sampled, now: float) -> None:
        instance = self.fleet.instances[message.instance_id]
        load = message.load
        instance.sample(load.running, load.queued, message.at, load.figures)
        instance.forget(now)
        if instance.running:
            instance.last_used = now

    def _demand_came(self, message: m.DemandCame, now: float) -> None:
        before, settled = self.fleet.link.roster, self.fleet.link.settled
        connected, first = self.fleet.link.connected, self.fleet.link.no_admission
        if not self.fleet.link.take(message.stream, message.report, self.fleet.instances, now):
            return
        if not connected:
            self.fleet.events.add(now, "admission_connected")
        if first:
            self.fleet.spawn(self.fleet.store.set_admission())
        if self.fleet.link.settled and not settled:
            log.info("admission is settled", roster=len(self.fleet.link.roster or ()))
        if self.fleet.link.roster != before:
            self.fleet.spawn(self.fleet.store.set_roster(self.fleet.link.roster or ()))

    def _stream_ended(self, message: m.StreamEnded, now: float) -> None:
        if self.fleet.link.end(message.stream, now, self.fleet.instances):
            self.fleet.events.add(now, "admission_left")

    def _devices_read(self, message: m.DevicesRead, now: float) -> None:
        instances = self.fleet.instances.values()
        self.fleet.tell(self.fleet.inventory.read(message.devices, message.began, instances), now)
        self.fleet.footprints.read(message.began)

    def _broke(self, message: m.Broke, now: float) -> None:
        raise message.error

    def _shutdown(self, message: m.Shutdown, now: float) -> None:
        """Ready ones drain; starting ones end at once; the rest is under way."""
        self.fleet.stopping = True
        for instance in list(self.fleet.instances.values()):
            drain = Drain(DrainCause.SHUTDOWN, now, now + message.drain)
            if instance.state is InstanceState.DRAINING:
                instance.drain = drain
            elif instance.state is InstanceState.READY and not self._external(instance):
                self.fleet.drain(instance, drain, "the service stops")
            else:
                self.fleet.stop(instance, now, "the service stops")

    def _estimated(self, message: m.Estimated, now: float) -> None:
        take_estimate(self.fleet, message)

    def _order(self, message: m.Order, now: float) -> None:
        """An operator's order: carried out by the plan that follows, or refused in numbers."""
        name = message.model
        if message.done.done():
            return
        if name not in self.fleet.catalog.models:
            message.done.set_exception(refused("REASON_NOT_FOUND", f"there is no model {name!r} any more"))
            return
        if self.fleet.stopping:
            message.done.set_exception(refused("REASON_DRAINING", "the service is stopping"))
            return
        if message.verb == "pin":
            self.fleet.pinned.add(name)
        elif message.verb == "unpin":
            self.fleet.pinned.discard(name)
        elif message.verb == "unload":
            self.fleet.ordered.discard(name)
            self._give_up(name, now)
            if any(instance.model == name for instance in self.fleet.instances.values()):
                self.fleet.unload.add(name)
        elif message.verb == "load":
            self.fleet.unload.discard(name)
            error = self.fleet.load_error(name, now)
            if error is not None:
                message.done.set_exception(error)
                return
            self.fleet.circuits.half_open(name, now)
            self.fleet.ordered.add(name)
        message.done.set_result(None)

    def _give_up(self, name: str, now: float) -> None:
        """Ends starts that have no server yet: nobody needs what is being downloaded for them."""
        for instance in list(self.fleet.instances.values()):
            waits = instance.state is InstanceState.STARTING and instance.launched_at is None
            if instance.model == name and waits:
                self.fleet.end_span(instance.id, "unloaded")
                self.fleet.stop(instance, now, "an operator unloaded it")

    def _device_order(self, message: m.DeviceOrder, now: float) -> None:
        """An operator takes a device back or gives it back: remembered before it is answered."""
        if message.done.done():
            return
        device = self.fleet.inventory.find(message.device)
        if device is None:
            message.done.set_exception(no_device(message.device, list(self.fleet.devices.values())))
            return
        self.fleet.tell(self.fleet.inventory.take_back(device, message.drain), now)
        self.fleet.spawn(self._keep_taken(device.id, message.done))

    async def _keep_taken(self, device: str, done: asyncio.Future[str]) -> None:
        await self.fleet.store.set_taken(self.fleet.inventory.taken)
        if not done.done():
            done.set_result(device)

    # -- plan, act, publish ------------------------------------------------------------------------

    def _reconcile(self, now: float) -> float:
        """One turn; returns when to plan again at the latest."""
        if self.estimator is not None:
            keep_up(self.fleet, self.estimator)
        loading = {i.model for i in self.fleet.instances.values() if i.state is InstanceState.STARTING}
        # At the end of a back-off its reason is taken back, though nobody may wait.
        retry_at = self.fleet.circuits.forgive(now, loading)
        for instance in self.fleet.instances.values():
            instance.forget(now)
            instance.prepare(now)
        inventory = self.fleet.inventory
        self.fleet.tell(inventory.settle(self.fleet.instances.values(), now), now)
        if self.fleet.stopping:
            wake_at = self._shutdown_turn(now)
        else:
            decided = plan(self.fleet.world(), now)
            self._act(decided, now)
            wake_at = decided.wake_at
        self._ask_servers()
        self.fleet.hurry(inventory.settling)
        self.fleet.told.publish(self.fleet, now)
        return min(wake_at, retry_at, inventory.bound)

    def _ask_servers(self) -> None:
        """Where a drain, or a model that waits for room, depends on a server's own count: a newer one."""
        for instance in self.fleet.instances.values():
            draining = instance.state is InstanceState.DRAINING
            if instance.outdated and (draining or (instance.running and self.fleet.waits)):
                self.fleet.keepers[instance.id].sampler.ask()

    def _act(self, decided: Plan, now: float) -> None:
        for name, wait in decided.waits.items():
            before = self.fleet.waits.get(name)
            if wait.refuses and (before is None or before.reason is not wait.reason):
                self.fleet.events.add(now, wait.reason.value, name, "", wait.text)
        self.fleet.intents, self.fleet.waits = decided.intents, dict(decided.waits)
        for action in decided.actions:
            if isinstance(action, Start):
                self.fleet.start(action, now)
            elif isinstance(action, StartDrain):
                self._begin_drain(action, now)
            elif isinstance(action, Undrain):
                self.fleet.to(self.fleet.instances[action.instance_id], InstanceState.READY, now)
            elif isinstance(action, Stop):
                self._finish_drain(action, now)
        self.fleet.ordered -= {i.model for i in self.fleet.instances.values() if i.serving and not i.replaced}
        for card, excess in Ledger(self.fleet.cards(), self.fleet.instances.values()).violation().items():
            metrics.OVERCOMMITTED.labels(card).inc()
            log.error("reservations exceed a device's budget", device=card, excess_mib=excess)

    def _begin_drain(self, action: StartDrain, now: float) -> None:
        instance = self.fleet.instances[action.instance_id]
        limit = self.fleet.policy.drain_timeout
        deadline = now + limit if limit else None
        if action.cause is DrainCause.EVICTION:
            metrics.EVICTIONS.labels(instance.model).inc()
        elif action.cause is DrainCause.DEVICE and instance.model in self.fleet.pinned:
            self.fleet.ordered.add(instance.model)  # it moves to another device, if there is room
        self.fleet.drain(instance, Drain(action.cause, now, deadline, action.beneficiary), action.reason)

    def _finish_drain(self, action: Stop, now: float) -> None:
        instance = self.fleet.instances[action.instance_id]
        if action.cut:
            metrics.DRAINS_CUT.labels(instance.model).inc()
        self.fleet.stop(instance, now, instance.reason)

    def _shutdown_turn(self, now: float) -> float:
        seen = self.fleet.link.seen if self.fleet.link.settled else 0
        wake_at = math.inf
        for instance in list(self.fleet.instances.values()):
            if instance.state is not InstanceState.DRAINING or instance.drain is None:
                continue
            deadline = instance.drain.deadline or now
            # Without an admission nobody can say that it is empty, and nobody new comes.
            if not self.fleet.link.connected or instance.drained(seen) or deadline <= now:
                self.fleet.stop(instance, now, "the service stops")
            else:
                wake_at = min(wake_at, deadline)
        if not self.fleet.instances:
            self.finished.set()
        return wake_at

    # -- acts --------------------------------------------------------------------------------------
