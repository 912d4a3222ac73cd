"""The gRPC servicer: translates, calls, translates."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc import aio

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate.lifecycle.v1 import lifecycle_pb2_grpc
from tidegate_chassis.errors import Refused
from tidegate_chassis.process import monotonic
from tidegate_lifecycle import messages, status, supply
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.events import Event
from tidegate_lifecycle.explaining import explain
from tidegate_lifecycle.footprints.rpc import FootprintsServicer
from tidegate_lifecycle.link import Stream
from tidegate_lifecycle.reconciler import Reconciler
from tidegate_lifecycle.runtimes.base import Runtime

SERVICE = "tidegate.lifecycle.v1.LifecycleService"
TICK = 0.1
"""Seconds between two reports when nothing is urgent."""

Context = aio.ServicerContext[Any, Any]


class LifecycleServicer(FootprintsServicer, lifecycle_pb2_grpc.LifecycleServiceServicer):
    """Reads the reconciler's state, posts messages to it, and changes nothing itself."""

    def __init__(self, reconciler: Reconciler, runtime: Runtime) -> None:
        self.post, self.fleet, self.runtime = reconciler.post, reconciler.fleet, runtime

    async def Coordinate(  # noqa: N802 - the contract's name
        self, requests: AsyncIterator[pb.CoordinateRequest], context: Context
    ) -> AsyncIterator[pb.CoordinateResponse]:
        """Reads demands in a task of its own and writes supply as it changes."""
        stream = Stream()
        reader = asyncio.ensure_future(self._read(requests, stream))
        try:
            while True:
                await stream.changed.wait()
                if stream.ended is not None:
                    raise stream.ended
                if reader.done():
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stream.urgent.wait(), TICK)
                stream.changed.clear()
                stream.urgent.clear()
                if stream.answered and stream.ended is None:
                    yield pb.CoordinateResponse(supply=self._report(stream))
                elif stream.ended is not None:
                    raise stream.ended
        finally:
            reader.cancel()
            self.post(messages.StreamEnded(stream))

    async def _read(self, requests: AsyncIterator[pb.CoordinateRequest], stream: Stream) -> None:
        try:
            async for request in requests:
                self.post(messages.DemandCame(stream, request.demand))
        finally:
            stream.mark(urgent=True)  # the writer sees that the reader is done

    def _report(self, stream: Stream) -> pb.SupplyReport:
        """What has changed since the last report; everything in the first one."""
        fleet, told, now = self.fleet, self.fleet.told, monotonic()
        whole = stream.sent < 0
        report = pb.SupplyReport(
            generation=pb.Generation(incarnation=fleet.boot, n=told.generation),
            whole=whole,
            settled=fleet.settled,
            catalog_generation=pb.Generation(incarnation=fleet.boot, n=fleet.config.generation),
            models=[
                supply.model_supply(view, now)
                for name, view in told.views.items()
                if whole or told.changed_at[name] > stream.sent
            ],
            removed_models=[name for name, at in told.removed_at.items() if not whole and at > stream.sent],
        )
        if stream.first:
            report.roster.extend(stream.roster or ())
            report.roster_known = stream.roster is not None
            report.first_admission = stream.first_admission
        stream.first, stream.sent = False, fleet.told.generation
        return report

    async def WatchCatalog(  # noqa: N802
        self, request: pb.WatchCatalogRequest, context: Context
    ) -> AsyncIterator[pb.WatchCatalogResponse]:
        """Whole at once, and after each change of a state, at most ten times a second."""
        fleet, changed = self.fleet, asyncio.Event()
        fleet.catalog_watchers.add(changed)
        try:
            while True:
                now = monotonic()
                generation = fleet.boot, fleet.config.generation
                yield supply.catalog_response(
                    fleet.catalog, fleet.told.views, generation, fleet.node, now - fleet.began
                )
                await changed.wait()
                await asyncio.sleep(TICK)
                changed.clear()
        finally:
            fleet.catalog_watchers.discard(changed)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        """A snapshot."""
        return status.snapshot(self.fleet, monotonic())

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:  # noqa: N802
        """Orders a start; FAILED_PRECONDITION with the numbers when it can't be."""
        model = self._model(request.model)
        if model.external:
            raise _invalid(f"{model.name} runs elsewhere: it is never started or stopped here")
        await self._order("load", model)
        return pb.LoadModelResponse(state=self._state(model), model=model.name)

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:  # noqa: N802
        """Orders a drain and a stop."""
        model = self._model(request.model)
        if model.external or model.always_on:
            why = "runs elsewhere" if model.external else "is always_on"
            raise _invalid(f"{model.name} {why}: it can't be unloaded")
        await self._order("unload", model)
        ending = [instance for instance in self.fleet.instances.values() if instance.model == model.name]
        leases = sum(instance.leases for instance in ending)
        return pb.UnloadModelResponse(
            state=self._state(model), model=model.name, instances=len(ending), leases=leases
        )

    async def PinModel(self, request: pb.PinModelRequest, context: Context) -> pb.PinModelResponse:  # noqa: N802
        """Pins it or takes the pin off."""
        model = self._model(request.model)
        await self._order("pin" if request.pinned else "unpin", model)
        return pb.PinModelResponse(model=model.name, pinned=request.pinned or model.always_on)

    async def DrainDevice(self, request: pb.DrainDeviceRequest, context: Context) -> pb.DrainDeviceResponse:  # noqa: N802
        """Takes a device back, or gives it back; NOT_FOUND names those that there are."""
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.post(messages.DeviceOrder(request.device_id, request.drain, done))
        async with asyncio.timeout(10):
            device = await done
        there = [item for item in self.fleet.instances.values() if device in item.devices]
        leases = sum(item.leases for item in there)
        return pb.DrainDeviceResponse(device_id=device, instances=len(there), leases=leases)

    async def PlanPlacement(  # noqa: N802
        self, request: pb.PlanPlacementRequest, context: Context
    ) -> pb.PlanPlacementResponse:
        """The dry run."""
        model = self._model(request.model)
        if model.external:
            return pb.PlanPlacementResponse(problem="it runs elsewhere")
        told = explain(self.fleet.world(), model.name, monotonic())
        return pb.PlanPlacementResponse(
            actions=told.steps, problem=told.problem, devices=told.devices, need=told.needs
        )

    async def WatchEvents(  # noqa: N802
        self, request: pb.WatchEventsRequest, context: Context
    ) -> AsyncIterator[pb.WatchEventsResponse]:
        """The last ones kept, then each as it happens."""
        events, name = self.fleet.events, request.model
        if name and all(name != event.model for event in events.kept):  # it may be gone from the catalogue
            name = self._model(name).name
        queue = events.watch()
        try:
            kept = [event for event in events.kept if name in ("", event.model)]
            for event in kept[len(kept) - min(request.last, len(kept)) :]:
                yield self._event(event)
            while not request.until_now:
                event = await queue.get()
                if name in ("", event.model):
                    yield self._event(event)
        finally:
            events.unwatch(queue)

    async def TailLog(  # noqa: N802
        self, request: pb.TailLogRequest, context: Context
    ) -> AsyncIterator[pb.TailLogResponse]:
        """The last lines, then what follows if asked to."""
        model = self._model(request.model)
        if model.external:
            raise _invalid(f"{model.name} runs elsewhere: its log isn't here")
        if request.lines > 10_000:
            raise _invalid("lines: give 1 to 10000, or 0 for 100")
        _, offset = await self.runtime.log_since(model.name, None)
        yield pb.TailLogResponse(lines=await self.runtime.tail(model.name, request.lines or 100))
        while request.follow:
            await asyncio.sleep(0.5)
            lines, offset = await self.runtime.log_since(model.name, offset)
            if lines:
                yield pb.TailLogResponse(lines=lines)

    # -- helpers -----------------------------------------------------------------------------------

    def _model(self, name: str) -> Model:
        model = self.fleet.catalog.find(name)
        if model is None:
            raise Refused(grpc.StatusCode.NOT_FOUND, "REASON_NOT_FOUND", f"there is no model {name[:200]!r}")
        return model

    def _state(self, model: Model) -> Any:
        view = self.fleet.told.views.get(model.name)
        return view.state if view is not None else pb.MODEL_STATE_STOPPED

    def _event(self, event: Event) -> pb.WatchEventsResponse:
        return pb.WatchEventsResponse(
            event=pb.Event(
                n=event.n,
                age_ms=supply.millis(monotonic() - event.at),
                kind=event.kind,
                model=event.model,
                instance_id=event.instance_id,
                message=event.message,
                incarnation=self.fleet.boot,
            )
        )

    async def _order(self, verb: str, model: Model) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.post(messages.Order(verb, model.name, done))
        async with asyncio.timeout(10):
            await done


def _invalid(text: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, "REASON_INVALID", text)
