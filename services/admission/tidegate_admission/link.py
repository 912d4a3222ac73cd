"""The link to lifecycle: demand goes down, supply comes up, on one stream that is opened again when it ends.

Neither side asks and waits: the dispatcher acts on the last supply it was given, link or no link.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog
from grpc import aio

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate.lifecycle.v1 import lifecycle_pb2_grpc as pb_grpc
from tidegate_admission.demand import Demand, ModelDemand
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.supply import Instance, ModelSupply, Supply
from tidegate_admission.ticket import Reason
from tidegate_chassis import rpc

INTERVAL = 0.1
"""Seconds between two reports that are not urgent."""

log = structlog.get_logger("tidegate.admission")

_REASONS: dict[int, Reason] = {
    pb.REASON_NOT_FOUND: Reason.MODEL_NOT_FOUND,
    pb.REASON_START_FAILED: Reason.MODEL_FAILED,
    pb.REASON_NEVER_FITS: Reason.NO_CAPACITY,
    pb.REASON_NO_CAPACITY: Reason.NO_CAPACITY,
    pb.REASON_UNHEALTHY: Reason.MODEL_FAILED,
    pb.REASON_DRAINING: Reason.DRAINING,
}


class SupersededError(Exception):
    """A newer admission has connected to lifecycle; this one must not grant any more."""


class Link:
    """Client of `Coordinate`. `run` ends only by cancellation, with SupersededError, or by an error that is
    no broken stream: the core's, and fatal."""

    def __init__(
        self, address: str, incarnation: int, dispatcher: Dispatcher, clock: Callable[[], float]
    ) -> None:
        self._address, self._incarnation, self._dispatcher, self._clock = (
            address,
            incarnation,
            dispatcher,
            clock,
        )
        self._wanted = asyncio.Event()
        self._urgent = asyncio.Event()
        dispatcher.on_demand = self._on_demand

    async def run(self) -> None:
        """Keeps the stream open."""
        delays = rpc.reconnect_delays()
        while True:
            try:
                async with rpc.connected(self._address) as channel:
                    await self._coordinate(pb_grpc.LifecycleServiceStub(channel))
            except aio.AioRpcError as error:
                if rpc.reason_of(error) == "REASON_SUPERSEDED":
                    raise SupersededError from None
                log.debug("lifecycle.away", code=error.code().name)
            if self._dispatcher.linked:
                self._dispatcher.unlinked(self._clock())
                delays = rpc.reconnect_delays()
                log.warning("lifecycle.lost", keeps="its last settled supply")
            await asyncio.sleep(next(delays))

    async def _coordinate(self, stub: pb_grpc.LifecycleServiceAsyncStub) -> None:
        call: aio.StreamStreamCall[pb.CoordinateRequest, pb.CoordinateResponse] = stub.Coordinate()
        sender = asyncio.create_task(self._send(call))
        sender.add_done_callback(lambda _: call.cancel())  # or lifecycle would never hear of demand again
        try:
            async for response in call:
                if not self._dispatcher.linked:
                    self._dispatcher.linked = True
                    log.info("lifecycle.linked", address=self._address)
                now = self._clock()
                self._dispatcher.supply(from_wire(response.supply, now - self._dispatcher.started), now)
        finally:
            sender.cancel()
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError, aio.AioRpcError, asyncio.InvalidStateError):
                await sender

    async def _send(self, call: aio.StreamStreamCall[pb.CoordinateRequest, pb.CoordinateResponse]) -> None:
        """Everything first, then what changes: at most ten times a second, at once when it is urgent."""
        whole = True
        while True:
            self._wanted.clear()
            self._urgent.clear()
            report = to_wire(self._dispatcher.demand(whole, self._clock()), self._incarnation)
            await call.write(pb.CoordinateRequest(demand=report))
            whole = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL):
                    await self._urgent.wait()
            await self._wanted.wait()

    def _on_demand(self, urgent: bool) -> None:
        self._wanted.set()
        if urgent:
            self._urgent.set()


def to_wire(demand: Demand, incarnation: int) -> pb.DemandReport:
    """A report as lifecycle reads it."""
    return pb.DemandReport(
        admission_incarnation=incarnation,
        uptime_ms=int(demand.uptime * 1000),
        whole=demand.whole,
        settled=demand.settled,
        supply_seen=pb.Generation(incarnation=demand.supply_seen[0], n=demand.supply_seen[1]),
        models=[_model(item) for item in demand.models],
        roster=demand.roster,
    )


def _model(item: ModelDemand) -> pb.ModelDemand:
    return pb.ModelDemand(
        model=item.model,
        waiting=item.waiting,
        oldest_wait_ms=int(item.oldest_wait * 1000),
        waiting_by_band=item.by_band,
        arrival_rate=item.arrival_rate,
        interest_ms=int(item.interest * 1000),
        instances=[
            pb.InstanceDemand(instance_id=one.id, leases=one.leases, grants=one.grants)
            for one in item.instances
        ],
        trace_parent=item.trace_parent,
    )


def from_wire(report: pb.SupplyReport, uptime: float) -> Supply:
    """What a report says. `uptime` of this process, in seconds: older instances were there before it."""
    return Supply(
        (report.generation.incarnation, report.generation.n),
        report.whole,
        report.settled,
        tuple(_supply(item, uptime) for item in report.models),
        tuple(report.removed_models),
        (report.catalog_generation.incarnation, report.catalog_generation.n),
        tuple(report.roster),
        report.roster_known,
        report.first_admission,
    )


def _supply(item: pb.ModelSupply, uptime: float) -> ModelSupply:
    reason = _REASONS.get(item.reason, Reason.UNAVAILABLE) if item.reason else None
    return ModelSupply(
        item.model,
        tuple(
            Instance(
                one.instance_id,
                one.address,
                one.state,
                one.slots,
                one.age_ms / 1000 > uptime,
                one.running if one.HasField("running") else None,
                one.queued if one.HasField("queued") else None,
            )
            for one in item.instances
        ),
        item.max_concurrent if item.HasField("max_concurrent") else None,
        item.max_queue if item.HasField("max_queue") else None,
        item.ready_in_ms / 1000 if item.HasField("ready_in_ms") else None,
        item.start_deadline_ms / 1000,
        reason,
        item.message or f"the model '{item.model}' can't be served now",
        item.retry_after_ms / 1000,
        item.under_way,
    )
