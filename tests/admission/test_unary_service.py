"""Unary slots, queues and leases over real sockets, with admission as a process."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import pytest
from grpc import aio

from tests.admission.real import PATIENCE, Service, Stage, supply
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_chassis import rpc


def request(request_id: str = "r1", model: str = "m") -> pb.AcquireRequest:
    """A request of the holder `h`."""
    return pb.AcquireRequest(holder_id="h", request_id=request_id, model=model)


def renewal(lease_id: str) -> pb.RenewRequest:
    """A renewal with all that a restarted admission needs."""
    return pb.RenewRequest(holder_id="h", lease_id=lease_id, model="m", instance_id="m-1")


@contextlib.asynccontextmanager
async def refused(code: grpc.StatusCode, reason: str) -> Any:
    """What is inside must fail with this status and reason."""
    with pytest.raises(aio.AioRpcError) as error:
        yield
    assert (error.value.code(), rpc.reason_of(error.value)) == (code, reason)


async def test_acquire_renew_release(stage: Stage) -> None:
    """A unary slot is a lease like any other: listed, kept, released once."""
    await stage.start(supply(slots=1))
    edge = stage.edge()
    lease = await edge.stub.Acquire(request(), timeout=PATIENCE)
    assert (lease.instance_id, lease.address, lease.lease_ttl_ms) == ("m-1", "http://127.0.0.1:9", 10_000)
    again = await edge.stub.Acquire(request(), timeout=PATIENCE)
    assert again == lease
    listed = await edge.stub.ListLeases(pb.ListLeasesRequest(session_id="h"))
    assert [item.lease_id for item in listed.leases] == [lease.lease_id]
    assert lease.lease_id.startswith("h/")
    assert (await edge.stub.Renew(renewal(lease.lease_id))).lease_ttl_ms == 10_000
    release = pb.ReleaseRequest(holder_id="h", lease_id=lease.lease_id)
    assert (await edge.stub.Release(release)).known
    assert not (await edge.stub.Release(release)).known
    queues = await edge.queues()
    assert (queues.models[0].queue.active, queues.models[0].lease_ends["released"]) == (0, 1)


async def test_a_lease_that_is_not_renewed_expires_and_the_next_one_gets_the_slot(stage: Stage) -> None:
    """A holder that is gone frees its slot within lease_ttl + 1 s."""
    stage.service = Service(stage.service.config.parent, lease_ttl="2s")
    await stage.start(supply(slots=1))
    edge = stage.edge()
    first = await edge.stub.Acquire(request("first"), timeout=PATIENCE)
    began = asyncio.get_running_loop().time()
    await edge.stub.Acquire(request("second"), timeout=PATIENCE)
    assert 1.5 < asyncio.get_running_loop().time() - began < 3.1
    async with refused(grpc.StatusCode.NOT_FOUND, "REASON_EXPIRED"):
        await edge.stub.Renew(renewal(first.lease_id))
    queues = await edge.queues()
    assert queues.models[0].lease_ends["expired"] == 1


async def test_cancel_and_deadline_of_a_waiting_call(stage: Stage) -> None:
    """Either ends the ticket; an unknown model and a full queue are refused at once, in words."""
    await stage.start(supply(slots=1, max_queue=1))
    edge = stage.edge()
    lease = await edge.stub.Acquire(request("first"), timeout=PATIENCE)
    waiting = edge.stub.Acquire(request("second"), timeout=PATIENCE)
    await edge.until(lambda q: q.models[0].queue.waiting == 1)
    async with refused(grpc.StatusCode.RESOURCE_EXHAUSTED, "REASON_QUEUE_FULL"):
        await edge.stub.Acquire(request("third"), timeout=PATIENCE)
    waiting.cancel()
    await edge.until(lambda q: q.models[0].queue.waiting == 0)
    with pytest.raises(aio.AioRpcError) as late:
        await edge.stub.Acquire(request("fourth"), timeout=0.3)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await edge.until(lambda q: q.models[0].queue.waiting == 0)
    async with refused(grpc.StatusCode.NOT_FOUND, "REASON_MODEL_NOT_FOUND"):
        await edge.stub.Acquire(request("fifth", "nobody"), timeout=PATIENCE)
    await edge.stub.Release(pb.ReleaseRequest(holder_id="h", lease_id=lease.lease_id))
    queues = await edge.until(lambda q: q.models[0].queue.active == 0)
    assert queues.models[0].ticket_ends["granted"] == 1


async def test_leases_survive_a_restart_of_admission_by_renewal(stage: Stage) -> None:
    """Killed and started again, admission hears of the lease by its renewal and gives nobody its slot."""
    stage.service = Service(stage.service.config.parent, lease_ttl="3s")
    await stage.start(supply(slots=1))
    edge = stage.edge()
    lease = await edge.stub.Acquire(request(), timeout=PATIENCE)
    await stage.lifecycle.until(lambda demand: set(demand.roster) == {"h"} and demand.settled)
    await stage.service.kill()
    await stage.lifecycle.say(supply(slots=1, age=3600))
    await stage.service.start()
    await edge.stub.Renew(renewal(lease.lease_id), wait_for_ready=True, timeout=PATIENCE)
    queues = await edge.until(lambda q: bool(q.models) and bool(q.models[0].instances[0].slots))
    assert (queues.models[0].queue.active, queues.models[0].restated) == (1, 1)
    again = await edge.stub.Acquire(request(), timeout=PATIENCE)
    assert again.lease_id == lease.lease_id
    await edge.until(lambda q: not q.models[0].instances[0].held_back)
    async with refused(grpc.StatusCode.NOT_FOUND, "REASON_EXPIRED"):
        await edge.stub.Renew(renewal("h/12345"))


async def test_a_stop_of_admission_ends_the_calls_that_wait(stage: Stage) -> None:
    """UNAVAILABLE with the reason DRAINING, for a waiting Acquire and for who watches the queues."""
    import signal

    await stage.start(supply(slots=1))
    edge = stage.edge()
    await edge.stub.Acquire(request("first"), timeout=PATIENCE)
    waiting = edge.stub.Acquire(request("second"), timeout=PATIENCE)
    watch: Any = edge.stub.WatchQueues(pb.WatchQueuesRequest())
    assert (await watch.read()).queues.models[0].queue.active == 1
    await edge.until(lambda q: q.models[0].queue.waiting == 1)
    stage.service.signal(signal.SIGTERM)
    async with refused(grpc.StatusCode.UNAVAILABLE, "REASON_DRAINING"):
        await waiting
    async with refused(grpc.StatusCode.UNAVAILABLE, "REASON_DRAINING"):
        while await watch.read() is not aio.EOF:
            pass
    assert await stage.service.ended() == 0


async def test_queues_are_watched(stage: Stage) -> None:
    """A snapshot at once, then the newest after a change, at most twice a second, until it is cancelled."""
    await stage.start(supply(slots=8))
    edge = stage.edge()
    await edge.until(lambda q: q.supply_settled and bool(q.models))
    loop = asyncio.get_running_loop()
    watch: Any = edge.stub.WatchQueues(pb.WatchQueuesRequest())
    first = await watch.read()
    assert first.queues.models[0].queue.active == 0
    times = []
    for n in range(6):
        await edge.stub.Acquire(request(f"r{n}"), timeout=PATIENCE)
    async with asyncio.timeout(PATIENCE):
        while (news := await watch.read()).queues.models[0].queue.active < 6:
            times.append(loop.time())
    assert len(times) <= 2, "many changes, few snapshots"
    assert [session.session_id for session in news.queues.sessions] == ["h"]
    watch.cancel()
    await edge.queues()
    assert not any("call failed" in line for line in stage.service.lines)
