"""The gRPC service: translates, calls the dispatcher, translates back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc import aio

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc
from tidegate_admission import views
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.rates import RateState
from tidegate_admission.stream import Stream
from tidegate_admission.ticket import Id, QueueView, Reason
from tidegate_admission.unary import Unary, refused
from tidegate_admission.wire import put_rates
from tidegate_chassis.errors import Refused
from tidegate_chassis.process import VERSION

NAME = "tidegate.admission.v1.AdmissionService"
WATCH_INTERVAL = 0.5
"""Seconds between two snapshots of WatchQueues, at least."""

_Context = aio.ServicerContext[Any, Any]


class Service(pb_grpc.AdmissionServiceServicer):
    """Implements `tidegate.admission.v1.AdmissionService`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        incarnation: int,
        clock: Callable[[], float],
        fatal: Callable[[Exception], None],
    ) -> None:
        self._dispatcher, self._incarnation, self._clock, self._fatal = dispatcher, incarnation, clock, fatal
        self._streams: set[Stream] = set()
        self._unary = Unary(dispatcher, clock, fatal)
        self._closed = asyncio.Event()

    async def Session(  # noqa: N802 - the contract's name
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: _Context
    ) -> AsyncIterator[pb.SessionResponse]:
        """One edge's session."""
        stream = Stream(self._dispatcher, self._incarnation, self._clock, self._fatal)
        self._streams.add(stream)
        responses = stream.run(request_iterator)
        try:
            async for response in responses:
                yield response
        finally:
            self._streams.discard(stream)
            await responses.aclose()  # type: ignore[attr-defined]  # it is a generator

    async def ListLeases(  # noqa: N802 - the contract's name
        self, request: pb.ListLeasesRequest, context: _Context
    ) -> pb.ListLeasesResponse:
        """All leases, oldest first."""
        now = self._clock()
        found = views.leases(self._dispatcher, request.model, request.session_id)
        return pb.ListLeasesResponse(
            leases=[
                pb.Lease(
                    lease_id=lease_id(ticket.id),
                    session_id=session.id,
                    holder=session.holder,
                    model=ticket.model,
                    instance_id=ticket.instance_id,
                    tenant=ticket.tenant or "default",
                    age_ms=_ms(now - ticket.granted),
                )
                for session, ticket in found
            ]
        )

    async def RevokeLease(  # noqa: N802 - the contract's name
        self, request: pb.RevokeLeaseRequest, context: _Context
    ) -> pb.RevokeLeaseResponse:
        """Ends one lease."""
        lease = _parse(request.lease_id)
        if lease is None or not self._dispatcher.revoke(lease, self._clock()):
            raise Refused(grpc.StatusCode.NOT_FOUND, "REASON_INVALID", "no such lease exists")
        return pb.RevokeLeaseResponse()

    async def Acquire(  # noqa: N802 - the contract's name
        self, request: pb.AcquireRequest, context: _Context
    ) -> pb.AcquireResponse:
        """Waits for one slot."""
        trace_parent = str(dict(context.invocation_metadata() or ()).get("traceparent", ""))
        return await self._unary.acquire(request, context.time_remaining(), context.peer(), trace_parent)

    async def Renew(  # noqa: N802 - the contract's name
        self, request: pb.RenewRequest, context: _Context
    ) -> pb.RenewResponse:
        """Keeps a unary lease."""
        return self._unary.renew(request)

    async def Release(  # noqa: N802 - the contract's name
        self, request: pb.ReleaseRequest, context: _Context
    ) -> pb.ReleaseResponse:
        """Ends a unary lease."""
        return self._unary.release(request)

    async def GetQueues(  # noqa: N802 - the contract's name
        self, request: pb.GetQueuesRequest, context: _Context
    ) -> pb.GetQueuesResponse:
        """A snapshot."""
        return pb.GetQueuesResponse(queues=self._queues())

    async def WatchQueues(  # noqa: N802 - the contract's name
        self, request: pb.WatchQueuesRequest, context: _Context
    ) -> AsyncIterator[pb.WatchQueuesResponse]:
        """Snapshots: one now, then the newest whenever it says something new. None is ever stored."""
        told: pb.Queues | None = None
        while not self._closed.is_set():
            queues = self._queues()
            if (news := _timeless(queues)) != told:
                told = news
                yield pb.WatchQueuesResponse(queues=queues)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), WATCH_INTERVAL)
        raise refused(Reason.DRAINING, "admission is stopping", 1.0)

    def close(self, reason: Reason) -> None:
        """Ends all sessions' streams, and the calls that wait."""
        self._closed.set()
        self._unary.close(reason)
        for stream in list(self._streams):
            stream.close(reason)

    def _queues(self) -> pb.Queues:
        dispatcher, now = self._dispatcher, self._clock()
        return pb.Queues(
            incarnation=self._incarnation,
            uptime_ms=_ms(now - dispatcher.started),
            models=[_model(view) for view in views.queues(dispatcher, now)],
            sessions=[_session(view) for view in views.sessions(dispatcher, now)],
            tenants=[_tenant(name, state) for name, state in views.tenants(dispatcher, now)],
            supply_settled=dispatcher.linked and dispatcher.books.supply.settled,
            version=VERSION,
        )


def lease_id(ticket_id: Id) -> str:
    """How a lease is named to operators."""
    return f"{ticket_id[0]}/{ticket_id[1]}"


def _parse(text: str) -> Id | None:
    session_id, _, n = text.rpartition("/")
    return (session_id, int(n)) if session_id and n.isascii() and n.isdigit() else None


def _ms(seconds: float) -> int:
    return max(0, int(seconds * 1000))


def _timeless(queues: pb.Queues) -> pb.Queues:
    """A snapshot without what changes by time alone."""
    copy = pb.Queues()
    copy.CopyFrom(queues)
    copy.uptime_ms = 0
    for model in copy.models:
        model.oldest_wait_ms = 0
    for session in copy.sessions:
        session.silent_ms = 0
    for tenant in copy.tenants:
        tenant.ClearField("rates")
    return copy


def _queue(view: QueueView) -> pb.QueueState:
    return pb.QueueState(
        waiting=view.waiting,
        active=view.active,
        max_concurrent=view.max_concurrent,
        max_queue=view.max_queue,
    )


def _model(view: views.GateView) -> pb.ModelQueue:
    tally = view.tally
    return pb.ModelQueue(
        model=view.model,
        queue=_queue(view.queue),
        oldest_wait_ms=_ms(view.oldest_wait),
        instances=[
            pb.InstanceSlots(
                instance_id=slot.id,
                active=slot.active,
                slots=slot.slots,
                effective_slots=slot.effective,
                held_back=slot.held_back,
            )
            for slot in view.instances
        ],
        ticket_ends={str(kind): count for kind, count in tally.ticket_ends.items()},
        lease_ends={str(kind): count for kind, count in tally.lease_ends.items()},
        restated=tally.restated,
    )


def _tenant(name: str, state: RateState) -> pb.TenantRate:
    rate = pb.TenantRate(tenant=name)
    put_rates(rate.rates, state)
    return rate


def _session(view: views.SessionView) -> pb.SessionInfo:
    return pb.SessionInfo(
        session_id=view.id,
        holder=view.holder,
        connected=view.connected,
        silent_ms=_ms(view.silent),
        waiting=view.waiting,
        active=view.active,
    )
