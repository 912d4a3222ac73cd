"""The fleet's footprints: which there are, which hold now, and who is measured. The reconciler alone calls
what changes them; samples are taken, and files are written, by tasks that post to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import grpc
import structlog

from tidegate_chassis.errors import Refused
from tidegate_chassis.process import monotonic
from tidegate_lifecycle import messages as m
from tidegate_lifecycle import metrics
from tidegate_lifecycle.catalog import Catalog, Model
from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.footprints.meter import Meter, Subject
from tidegate_lifecycle.footprints.record import FILLS, IMPORTED, Footprint, signature
from tidegate_lifecycle.footprints.scene import Base, Reading, base
from tidegate_lifecycle.footprints.store import FootprintStore, StoreFailed
from tidegate_lifecycle.footprints.verdict import Discarded
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.needs import Source

if TYPE_CHECKING:
    from tidegate_lifecycle.fleet import Fleet

log = structlog.get_logger("tidegate.footprints")

TRIES = 6
"""Measurements of one server, each after a pause twice as long as the one before."""
PAUSE = 10.0
"""The first of these pauses, in spacings of samples."""

Needs = dict[str, dict[tuple[str, int], int]]
"""MiB per card by model, and by the kind of the cards and their number."""


class Desk:
    """What is known, and who is asked for more."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.known: dict[tuple[str, str], Footprint] = {}
        """By model and signature; replaced as a whole, never changed."""
        self.store: FootprintStore | None = None
        self.meter: Meter | None = None
        """None = there is no card that a driver can be asked about."""
        self._readings: dict[str, Reading] = {}
        self._bases: dict[str, Base] = {}
        self._attempts: dict[str, asyncio.Future[Footprint | Discarded]] = {}
        """Measurements under way, by instance."""
        self._matched: tuple[Catalog, dict[tuple[str, str], Footprint]] | None = None
        self._needs: Needs = {}
        self.handlers: Mapping[type[Any], Callable[[Any, float], None]] = {
            m.Measured: self._measured,
            m.MeasureOrder: self._measure_order,
            m.FootprintOrder: self._order,
            m.FootprintsKept: self._kept,
        }

    def open(self, store: FootprintStore, meter: Meter | None, kept: Iterable[Footprint]) -> None:
        """Before the first reconcile; the fleet's devices have just been read."""
        self.store, self.meter = store, meter
        self.known = {item.key: item for item in kept}
        self.read(monotonic())

    # -- what holds now ----------------------------------------------------------------------------

    def needs(self) -> Needs:
        """What the models' servers need as they are configured now, by footprints whose signature matches."""
        state = (self._fleet.catalog, self.known)
        if self._matched is None or any(
            old is not new for old, new in zip(self._matched, state, strict=True)
        ):
            self._needs, self._matched = self._match(), state
        return self._needs

    def _match(self) -> Needs:
        needs: Needs = {}
        metrics.FOOTPRINT.clear()
        for name, model in self._fleet.catalog.models.items():
            found = {
                (item.kind, item.count): item.reserve_mib
                for item in self.known.values()
                if item.model == name and signature(model, item.kind, item.count) == item.signature
            }
            if found:
                needs[name] = found
            metrics.FOOTPRINT.labels(name).set(max(found.values(), default=0) * 2**20)
        return needs

    def current(self, model: Model, devices: Iterable[Device]) -> Footprint | None:
        """The footprint of a model, as it is configured there, on these cards."""
        cards = tuple(devices)
        if not cards:
            return None
        return self.known.get((model.name, signature(model, cards[0].name, len(cards))))

    # -- what happens to servers -------------------------------------------------------------------

    def read(self, began: float) -> None:
        """The cards were read: what is used of one on which nothing settles may be the base of a start."""
        for card in self._fleet.cards():
            device = self._fleet.devices[card.id]
            if device.used_mib is not None and not device.problem and not card.settling_mib:
                self._readings[device.id] = Reading(device.used_mib, began)

    def started(self, instance: Instance, now: float) -> None:
        """A start was ordered: what is used of its cards before."""
        freed = self._fleet.inventory.freed
        found = base(instance, self._fleet.instances.values(), self._readings, freed, now)
        if found is not None:
            self._bases[instance.id] = found

    def ready(self, instance: Instance) -> None:
        """A server is ready, or was found so: measured, unless it is known. Costs nothing but a task
        aside."""
        keeper = self._fleet.keepers[instance.id]
        devices = self._devices(instance)
        known = self.current(keeper.model, devices)
        if known is not None:
            self._shrink(instance, keeper.model, known)
        wanted = known is None or known.source == IMPORTED
        if self.meter is not None and self.meter.settings.measure and wanted and not _unmeasurable(devices):
            self._fleet.spawn(self._keep_trying(instance))

    def gone(self, instance_id: str) -> None:
        """A server is gone."""
        self._bases.pop(instance_id, None)

    def _shrink(self, instance: Instance, model: Model, known: Footprint) -> None:
        """One that got a whole card for want of a number gives back what it doesn't need. One that fills what
        it got has taken it."""
        undeclared = model.vram_mib is None and model.vram_share is None
        if undeclared and model.engine not in FILLS:
            instance.reserved_mib = min(instance.reserved_mib, known.reserve_mib)

    def _devices(self, instance: Instance) -> tuple[Device, ...]:
        known = self._fleet.devices
        return tuple(known[card] for card in instance.devices if card in known)

    # -- measuring ---------------------------------------------------------------------------------

    async def _keep_trying(self, instance: Instance) -> None:
        """Until it is measured, can't be, or has been tried often enough."""
        assert self.meter is not None
        pause = PAUSE * self.meter.settings.spacing
        for _ in range(TRIES):
            outcome = await self._attempt(instance)
            if isinstance(outcome, Footprint) or not outcome.again:
                return
            await asyncio.sleep(pause)
            pause *= 2

    async def _attempt(self, instance: Instance) -> Footprint | Discarded:
        """One measurement, and the keeping of it; who comes while it is under way gets the same outcome."""
        outcome = self._attempts.get(instance.id)
        if outcome is None:
            outcome = self._attempts[instance.id] = asyncio.get_running_loop().create_future()
            self._fleet.spawn(self._measure(instance))
        return await asyncio.shield(outcome)

    async def _measure(self, instance: Instance) -> None:
        assert self.meter is not None
        try:
            found: Footprint | Discarded = await self.meter.measure(self._subject(instance))
        except Discarded as reason:
            found = reason
        self._fleet.tools.post(m.Measured(instance.id, instance.model, found))

    def _end(self, instance_id: str, outcome: Footprint | Discarded) -> None:
        future = self._attempts.pop(instance_id)
        if not future.done():
            future.set_result(outcome)

    def _subject(self, instance: Instance) -> Subject:
        """Discarded when there is nobody to measure, or no way to."""
        keeper = self._fleet.keepers.get(instance.id)
        if keeper is None or keeper.server is None:
            raise Discarded("gone", "the server doesn't run any more", again=False)
        devices = self._devices(instance)
        if why := _unmeasurable(devices):
            raise Discarded("unreadable", why, again=False)
        card = next(card for card in self._fleet.cards() if card.id == devices[0].id)
        asked = self._fleet.need(keeper.model).source(card, len(devices)) is not Source.UNKNOWN
        return Subject(
            instance,
            keeper.model,
            keeper.server,
            asked,
            self._bases.get(instance.id),
            self._fleet.instances.values,
            self._fleet.inventory.freed,
            self._fleet.tools.post,
        )

    def _measured(self, message: m.Measured, now: float) -> None:
        """Its end, and that of others, may have come first: then the number isn't worth keeping."""
        instance = self._fleet.instances.get(message.instance_id)
        outcome = message.outcome
        if isinstance(outcome, Footprint) and (instance is None or not _holds(instance)):
            outcome = Discarded("gone", "the server doesn't run any more", again=False)
        if isinstance(outcome, Discarded):
            metrics.DISCARDED.labels(message.model, outcome.kind).inc()
            self._fleet.events.add(
                now, "footprint_discarded", message.model, message.instance_id, str(outcome)
            )
            self._end(message.instance_id, outcome)
            return
        self._fleet.spawn(self._write(message, (outcome,), ()))

    def _measure_order(self, message: m.MeasureOrder, now: float) -> None:
        mine = [one for one in self._fleet.instances.values() if one.model == message.model and _holds(one)]
        if message.done.done():
            return
        if self.meter is None:
            message.done.set_exception(_refused("there is no card that a driver can be asked about"))
        elif not mine:
            text = f"{message.model} doesn't run: only a server that is ready can be measured; "
            message.done.set_exception(_refused(f"{text}`tidegate models load {message.model}` starts one"))
        elif why := _unmeasurable(self._devices(mine[0])):
            message.done.set_exception(_refused(why))
        else:
            self._fleet.spawn(self._answer(mine[0], message.done))

    async def _answer(self, instance: Instance, done: asyncio.Future[Footprint]) -> None:
        """The outcome of one measurement, for an operator who may have left meanwhile."""
        outcome = await self._attempt(instance)
        if done.done():
            return
        if isinstance(outcome, Footprint):
            done.set_result(outcome)
        else:
            done.set_exception(_refused(f"the measurement is thrown away: {outcome}"))

    # -- keeping -----------------------------------------------------------------------------------

    def _order(self, message: m.FootprintOrder, now: float) -> None:
        self._fleet.spawn(self._write(message, message.put, message.remove))

    async def _write(
        self,
        order: m.Measured | m.FootprintOrder,
        put: tuple[Footprint, ...],
        remove: tuple[tuple[str, str], ...],
    ) -> None:
        assert self.store is not None
        try:
            kept: tuple[Footprint, ...] | str = tuple(
                await (self.store.put(put) if put else self.store.remove(remove))
            )
        except StoreFailed as error:
            kept = str(error)
        self._fleet.tools.post(m.FootprintsKept(order, kept))

    def _kept(self, message: m.FootprintsKept, now: float) -> None:
        order, kept, before = message.order, message.kept, self.known
        if not isinstance(kept, str):
            self.known = {item.key: item for item in kept}
        if isinstance(order, m.Measured):
            assert isinstance(order.outcome, Footprint)
            self._note(order.outcome, order.instance_id, kept if isinstance(kept, str) else "", now)
        elif order.done.done():
            return
        elif isinstance(kept, str):
            order.done.set_exception(_refused(kept))
        else:
            order.done.set_result(len(order.put) or len(before.keys() & set(order.remove)))

    def _note(self, footprint: Footprint, instance_id: str, unkept: str, now: float) -> None:
        """A measured one is used even if it can't be kept: then until this service ends."""
        if unkept:
            self.known = {**self.known, footprint.key: footprint}
        metrics.MEASURED.labels(footprint.model).inc()
        each = f" on each of {footprint.count} cards" if footprint.count > 1 else ""
        text = f"{footprint.mib} MiB{each} (confidence {footprint.confidence:.2f}); later starts reserve "
        text += f"{footprint.reserve_mib}{f'; not kept: {unkept}' if unkept else ''}"
        self._fleet.events.add(now, "footprint", footprint.model, instance_id, text)
        instance = self._fleet.instances.get(instance_id)
        if instance is not None:
            self._shrink(instance, self._fleet.keepers[instance_id].model, footprint)
        self._end(instance_id, Discarded("unkept", text, again=False) if unkept else footprint)


def _holds(instance: Instance) -> bool:
    return instance.state in (InstanceState.READY, InstanceState.DRAINING)


def _unmeasurable(devices: Iterable[Device]) -> str:
    """Why a server on these devices can't be measured at all; empty = it can."""
    cards = tuple(devices)
    declared = [device.id for device in cards if device.index is None]
    if declared:
        return f"the memory of {', '.join(declared)} is declared: no driver is asked what is used of it"
    return "" if cards else "it has no card here"


def _refused(text: str) -> Refused:
    return Refused(grpc.StatusCode.FAILED_PRECONDITION, "REASON_INVALID", text)
