"""Demand, deadlines and progress over real sockets: the admission process with a look-alike of lifecycle."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc import aio

from tests.admission.real import Stage, supply
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.lifecycle.v1 import lifecycle_pb2 as lpb
from tidegate_chassis import rpc


async def test_a_deadline_that_cannot_be_met_is_refused_and_its_interest_told(stage: Stage) -> None:
    """The refusal names the estimate, lifecycle hears of the interest and of nobody who waits; while the
    model loads in time for it, the retry waits and is granted."""
    await stage.start(lpb.ModelSupply(model="m", state=lpb.MODEL_STATE_STOPPED, ready_in_ms=20_000))
    edge = stage.edge()
    await edge.hello()
    await edge.until(lambda queues: queues.supply_settled)
    await edge.send(pb.Acquire(n=1, model="m", deadline_ms=500))
    refusal = await edge.next("refusal", 1)
    assert refusal.reason == pb.REASON_DEADLINE_UNREACHABLE
    assert 20_000 <= refusal.retry_after_ms <= 24_000
    assert "ready in 20.0 s" in refusal.message
    demand = await stage.lifecycle.until(lambda one: any(model.interest_ms for model in one.models))
    assert [(one.model, one.waiting) for one in demand.models] == [("m", 0)]
    assert 170_000 < demand.models[0].interest_ms <= 180_000
    loading = lpb.ModelSupply(model="m", state=lpb.MODEL_STATE_LOADING, start_deadline_ms=600_000)
    loading.ready_in_ms, loading.under_way = 200, True
    await stage.lifecycle.say(loading)
    seen = stage.lifecycle.generation + 1
    await stage.lifecycle.until(lambda one: one.supply_seen.n >= seen)
    await edge.send(pb.Acquire(n=2, model="m", deadline_ms=10_000))
    await edge.until(lambda queues: queues.models[0].queue.waiting == 1)
    await stage.lifecycle.say(supply())
    await edge.next("grant", 2)


async def test_without_an_estimate_the_tickets_own_deadline_ends_it(stage: Stage) -> None:
    """Within a second of it, and with the other reason."""
    await stage.start(lpb.ModelSupply(model="m", state=lpb.MODEL_STATE_STOPPED))
    edge = stage.edge()
    await edge.hello()
    loop = asyncio.get_running_loop()
    begun = loop.time()
    await edge.send(pb.Acquire(n=1, model="m", deadline_ms=400))
    refusal = await edge.next("refusal", 1)
    assert refusal.reason == pb.REASON_DEADLINE_EXCEEDED
    assert refusal.retry_after_ms == 0
    assert 0.35 <= loop.time() - begun <= 1.4
    assert not any(model.interest_ms for one in stage.lifecycle.demands for model in one.models)


async def test_a_unary_call_whose_deadline_cannot_be_met_is_told_so(stage: Stage) -> None:
    """The call's own deadline is the caller's: DEADLINE_EXCEEDED at once, with the reason."""
    await stage.start(lpb.ModelSupply(model="m", state=lpb.MODEL_STATE_STOPPED, ready_in_ms=60_000))
    edge = stage.edge()
    await edge.until(lambda queues: queues.supply_settled)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    request = pb.AcquireRequest(holder_id="h", request_id="r", model="m")
    with pytest.raises(aio.AioRpcError) as refused:
        await edge.stub.Acquire(request, timeout=20)
    assert loop.time() - begun < 10
    assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert rpc.reason_of(refused.value) == "REASON_DEADLINE_UNREACHABLE"
    await stage.lifecycle.until(lambda one: any(model.interest_ms for model in one.models))


async def test_progress_is_told_by_flow(stage: Stage) -> None:
    """A thousand tickets of two tenants are two short messages a second, each with its flow's numbers."""
    await stage.start(supply(slots=1, max_queue=5000))
    edge = stage.edge()
    await edge.hello()
    await edge.send(pb.Acquire(n=1, model="m"))
    await edge.next("grant", 1)
    for first in (2, 502):
        await edge.send(
            *[
                pb.Acquire(n=n, model="m", tenant="ab"[n % 2], wants_progress=n > 100)
                for n in range(first, first + 500)
            ]
        )
    await edge.until(lambda queues: queues.models[0].queue.waiting == 1000)
    found: dict[str, pb.Progress] = {}
    while len(found) < 2:
        told = await edge.next("progress")
        found[told.tenant] = told
    for told in found.values():
        assert told.model == "m"
        assert list(told.bands) == [pb.BAND_HIGH, pb.BAND_NORMAL]
        assert told.step == pytest.approx(2.0, abs=0.1)
        assert told.HasField("ready_in_ms")
        assert not told.loading
        assert told.ByteSize() < 100
    assert sorted(told.position for told in found.values()) == [1, 2]


async def test_the_same_affinity_is_granted_the_same_instance(stage: Stage) -> None:
    """Over the wire: of two instances it is the one that served the affinity last, while it has room."""
    both = supply(slots=3)
    other = lpb.InstanceSupply(
        instance_id="m-2", address="http://127.0.0.1:9", state=lpb.INSTANCE_STATE_READY, slots=3
    )
    both.instances.append(other)
    await stage.start(both)
    edge = stage.edge()
    await edge.hello()
    await edge.send(pb.Acquire(n=1, model="m", affinity="x"))
    first = (await edge.next("grant", 1)).instance_id
    await edge.send(pb.Acquire(n=2, model="m"))
    assert (await edge.next("grant", 2)).instance_id != first, "most free slots"
    await edge.send(pb.Acquire(n=3, model="m", affinity="x"), pb.Acquire(n=4, model="m", affinity="x"))
    assert {(await edge.next("grant", n)).instance_id for n in (3, 4)} == {first}
    await edge.send(pb.Acquire(n=5, model="m", affinity="x"))
    assert (await edge.next("grant", 5)).instance_id != first, "it is full"


async def test_reports_are_coalesced_whatever_happens(stage: Stage) -> None:
    """Hundreds of changes make at most ten reports a second, and one for the first waiter of a second."""
    await stage.start(supply(slots=1))
    edge = stage.edge()
    await edge.hello()
    await edge.until(lambda queues: queues.supply_settled)
    loop = asyncio.get_running_loop()
    await edge.send(pb.Acquire(n=1, model="m"))
    await edge.next("grant", 1)
    begun, before = loop.time(), len(stage.lifecycle.demands)
    for n in range(2, 300):  # each waits for a moment: the queue is empty and not, over and over
        await edge.send(pb.Acquire(n=n, model="m"))
        await edge.send(pb.Done(n=n - 1))
        await edge.next("grant", n)
    passed = loop.time() - begun
    assert len(stage.lifecycle.demands) - before <= 3 + 11 * passed
    last = await stage.lifecycle.until(
        lambda one: any(item.grants == 299 for model in one.models for item in model.instances)
    )
    assert last.settled
    assert list(last.roster) == ["edge"]
