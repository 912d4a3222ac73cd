"""The service as a process, over real sockets, with a look-alike of lifecycle."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.admission.real import PATIENCE, Edge, Service, Stage, free_port, supply
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.lifecycle.v1 import lifecycle_pb2 as lpb


def acquire(*ns: int, model: str = "m") -> list[pb.Acquire]:
    """A batch of acquires."""
    return [pb.Acquire(n=n, model=model) for n in ns]


async def test_acquire_grant_done_in_batches(stage: Stage) -> None:
    """Tickets become leases in their order, within the slots; each end gives the slot to the next."""
    await stage.start(supply(slots=2))
    edge = stage.edge()
    await edge.hello()
    await edge.send(*acquire(1, 2, 3))
    first = await edge.next("grant")
    assert (first.n, first.instance_id, first.address) == (1, "m-1", "http://127.0.0.1:9")
    assert (first.queue.max_concurrent, first.queue.max_queue) == (2, 200)
    await edge.next("grant", 2)
    await edge.send(pb.Done(n=1), pb.Done(n=2, outcome=pb.OUTCOME_CLIENT_GONE))
    await edge.next("grant", 3)
    await edge.send(pb.Done(n=3))
    queues = await edge.until(lambda q: q.models[0].lease_ends["released"] == 3)
    assert queues.models[0].queue.active == 0
    assert queues.models[0].ticket_ends["granted"] == 3


async def test_cancel_in_the_batch_of_its_acquire(stage: Stage) -> None:
    """One ordered list: an acquire that is cancelled in the same message takes no slot."""
    await stage.start(supply(slots=1))
    edge = stage.edge()
    await edge.hello()
    await edge.send(pb.Acquire(n=1, model="m"), pb.Done(n=1), pb.Acquire(n=2, model="m"))
    assert (await edge.next("grant")).n == 2
    queues = await edge.queues()
    assert queues.models[0].ticket_ends["cancelled"] == 1


async def test_an_acquire_said_twice_gives_the_same_grant(stage: Stage) -> None:
    """Retrying an acquire never takes a second slot."""
    await stage.start(supply(slots=2))
    edge = stage.edge()
    await edge.hello()
    await edge.send(*acquire(1))
    await edge.next("grant", 1)
    await edge.send(*acquire(1))
    again = await edge.next("grant", 1)
    assert again.queue.active == 1


async def test_a_grant_that_got_lost_with_its_stream_is_told_again(stage: Stage) -> None:
    """After a reconnect the same session states its ticket as waiting and gets the grant it already has."""
    await stage.start(supply(slots=1))
    edge, other = stage.edge(), stage.edge("other")
    await edge.hello()
    await other.hello()
    await edge.send(*acquire(1))
    await edge.next("grant", 1)
    edge.drop()
    await other.send(*acquire(1))
    stated = pb.WaitingTicket(acquire=pb.Acquire(n=1, model="m"), age_ms=500)
    await edge.hello(waiting=[stated])
    assert (await edge.next("grant", 1)).queue.active == 1
    queues = await edge.queues()
    assert (queues.models[0].queue.active, queues.models[0].queue.waiting) == (1, 1)
    assert queues.models[0].ticket_ends["granted"] == 1


async def test_a_newer_stream_of_a_session_ends_the_older(stage: Stage) -> None:
    """The older stream is aborted, the session goes on."""
    await stage.start(supply(slots=1))
    old, new = stage.edge(), stage.edge()
    await old.hello()
    new.seq = old.seq
    await new.hello()
    assert await old.ended() == grpc.StatusCode.ABORTED
    stale = stage.edge()
    call = stale.stub.Session()
    await call.write(pb.SessionRequest(hello=pb.Hello(session_id="edge", stream_seq=1, last=True)))
    assert await call.code() == grpc.StatusCode.ABORTED


async def test_a_lost_release_is_reclaimed_by_the_heartbeat(stage: Stage) -> None:
    """A digest that differs leads to a full statement, and what it lacks is free for others."""
    await stage.start(supply(slots=1))
    edge = stage.edge()
    await edge.hello()
    await edge.send(*acquire(1, 2))
    await edge.next("grant", 1)
    await edge.beat()
    query = await edge.next("held_query")
    assert query.number == edge.beats
    await edge.state()
    await edge.next("grant", 2)
    queues = await edge.queues()
    assert queues.models[0].lease_ends["reclaimed"] == 1


async def test_admission_killed_and_started_again_hands_no_slot_out_twice(stage: Stage) -> None:
    """Held leases and waiting tickets are restated; nothing is granted before the roster has spoken."""
    await stage.start(supply(slots=2))
    first, second = stage.edge("first"), stage.edge("second")
    await first.hello()
    await second.hello()
    await first.send(*acquire(1))
    await first.next("grant", 1)
    await second.send(*acquire(1, 2))
    await second.next("grant", 1)
    await stage.lifecycle.until(lambda demand: set(demand.roster) == {"first", "second"} and demand.settled)
    await stage.service.kill()
    await stage.lifecycle.say(supply(slots=2, age=3600))
    await stage.service.start()
    waiter = pb.WaitingTicket(acquire=pb.Acquire(n=2, model="m"), age_ms=900)
    held = [pb.HeldLease(n=1, model="m", instance_id="m-1", age_ms=1000)]
    await second.hello(held=held, waiting=[waiter])
    await second.send(*acquire(3))
    queues = await second.until(lambda q: bool(q.models) and bool(q.models[0].instances[0].slots))
    assert queues.models[0].instances[0].effective_slots == 0
    assert "restarted" in queues.models[0].instances[0].held_back
    await first.hello(held=held)
    queues = await first.until(lambda q: q.models[0].instances[0].effective_slots == 2)
    assert (queues.models[0].queue.active, queues.models[0].restated) == (2, 2)
    await first.send(pb.Done(n=1))
    assert (await second.next("grant")).n == 2


async def test_a_dead_edge_is_free_after_the_ttl(stage: Stage) -> None:
    """An edge whose stream is gone loses its leases within lease_ttl + 1 s; a living one gets the slot."""
    stage.service = Service(stage.service.config.parent, lease_ttl="2s")
    await stage.start(supply(slots=1))
    dead, live = stage.edge("dead"), stage.edge("live")
    await dead.hello()
    await live.hello()
    await dead.send(*acquire(1))
    await dead.next("grant", 1)
    await live.send(*acquire(1))
    dead.drop()
    beating = asyncio.create_task(_beat(live))
    try:
        grant = await live.next("grant", 1)
    finally:
        beating.cancel()
    assert grant.waited_ms < 3100
    queues = await live.queues()
    assert queues.models[0].lease_ends["expired"] == 1
    assert [session.session_id for session in queues.sessions] == ["live"]


async def _beat(edge: Edge) -> None:
    while True:
        await edge.beat()
        await edge.next("heartbeat_ack")
        await asyncio.sleep(0.3)  # the rhythm of an edge, not a wait for something


async def test_goodbye_frees_the_slot_at_once(stage: Stage) -> None:
    """An edge that leaves in order leaves nothing behind."""
    await stage.start(supply(slots=1))
    leaver, other = stage.edge("leaver"), stage.edge("other")
    await leaver.hello()
    await other.hello()
    await leaver.send(*acquire(1))
    await leaver.next("grant", 1)
    await other.send(*acquire(1))
    await leaver.goodbye()
    await other.next("grant", 1)
    assert await leaver.ended() == grpc.StatusCode.OK


async def test_demand_reaches_lifecycle_and_a_drain_is_seen(stage: Stage) -> None:
    """The first waiter is told, a draining instance gets no grants, and its last end is told with it seen."""
    await stage.start(lpb.ModelSupply(model="m", state=lpb.MODEL_STATE_STOPPED))
    edge = stage.edge()
    await edge.hello()
    await edge.send(*acquire(1))
    await stage.lifecycle.until(lambda d: bool(d.models) and d.models[0].waiting == 1)
    await stage.lifecycle.say(supply(slots=1))
    await edge.next("grant", 1)
    draining = supply(slots=1, state=lpb.INSTANCE_STATE_DRAINING)
    await stage.lifecycle.say(draining)
    seen = stage.lifecycle.generation + 1
    await stage.lifecycle.until(lambda d: d.supply_seen.n >= seen)
    await edge.send(*acquire(2), pb.Done(n=1))
    demand = await stage.lifecycle.until(
        lambda d: d.supply_seen.n >= seen and any(i.leases == 0 for m in d.models for i in m.instances)
    )
    assert demand.settled
    assert demand.models[0].waiting == 1
    assert demand.models[0].instances[0].grants == 1


async def test_grants_go_on_while_lifecycle_is_away(stage: Stage) -> None:
    """The last settled supply is kept; a returning lifecycle is linked again."""
    await stage.start(supply(slots=1))
    edge = stage.edge()
    await edge.hello()
    await edge.send(*acquire(1))
    await edge.next("grant", 1)
    await stage.lifecycle.stop()
    await edge.until(lambda q: not q.supply_settled)
    await edge.send(pb.Done(n=1), *acquire(2))
    await edge.next("grant", 2)
    await stage.lifecycle.start(stage.service.lifecycle)
    await edge.until(lambda q: q.supply_settled)


async def test_a_superseded_admission_ends(stage: Stage) -> None:
    """When a newer admission has taken over, this one closes its sessions and exits with status 1."""
    await stage.start(supply())
    edge = stage.edge()
    await edge.hello()
    await edge.until(lambda q: q.supply_settled)
    await stage.lifecycle.supersede()
    assert await stage.service.ended() == 1
    assert await edge.ended() == grpc.StatusCode.ABORTED
    assert any("admission.superseded" in line for line in stage.service.lines)


async def test_operators_list_and_revoke_leases(stage: Stage) -> None:
    """A revoked lease is lost to its edge and free for the next; an unknown one is NOT_FOUND."""
    await stage.start(supply(slots=1))
    edge = stage.edge()
    await edge.hello()
    await edge.send(*acquire(1, 2))
    await edge.next("grant", 1)
    listed = await edge.stub.ListLeases(pb.ListLeasesRequest(model="m"))
    assert [(lease.lease_id, lease.instance_id, lease.tenant) for lease in listed.leases] == [
        ("edge/1", "m-1", "default")
    ]
    await edge.stub.RevokeLease(pb.RevokeLeaseRequest(lease_id="edge/1"))
    assert (await edge.next("lost", 1)).reason == pb.REASON_REVOKED
    await edge.next("grant", 2)
    with pytest.raises(aio.AioRpcError) as refused:
        await edge.stub.RevokeLease(pb.RevokeLeaseRequest(lease_id="edge/1"))
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "request_",
    [
        pb.SessionRequest(heartbeat=pb.Heartbeat(number=1)),
        pb.SessionRequest(hello=pb.Hello(session_id="", stream_seq=1, last=True)),
        pb.SessionRequest(hello=pb.Hello(session_id="x" * 65, stream_seq=1, last=True)),
        pb.SessionRequest(hello=pb.Hello(session_id="x", last=True)),
        pb.SessionRequest(),
    ],
)
async def test_a_stream_that_begins_wrongly_is_invalid(stage: Stage, request_: pb.SessionRequest) -> None:
    """Anything before a complete and valid Hello is INVALID_ARGUMENT."""
    await stage.start()
    call = stage.edge().stub.Session()
    await call.write(request_)
    async with asyncio.timeout(PATIENCE):
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_an_edge_that_reads_nothing_is_cut(stage: Stage) -> None:
    """Answers pile up for an edge that doesn't read: its stream is closed, and the others are served."""
    await stage.start(supply(slots=1, max_queue=1))
    deaf, other = stage.edge("deaf"), stage.edge("other")
    call = deaf.stub.Session()
    await call.write(pb.SessionRequest(hello=pb.Hello(session_id="deaf", stream_seq=1, last=True)))
    batch = pb.Operations(
        operations=[pb.Operation(acquire=pb.Acquire(n=n, model="m")) for n in range(1, 5000)]
    )
    await other.hello()

    async def flood() -> None:
        while True:
            await call.write(pb.SessionRequest(operations=batch))

    flooding = asyncio.create_task(flood())
    try:
        await other.until(lambda q: any(s.session_id == "deaf" and not s.connected for s in q.sessions))
    finally:
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        call.cancel()
    await other.beat()
    await other.next("heartbeat_ack")
    assert any("session.slow" in line for line in stage.service.lines)


async def test_health_and_a_graceful_stop(stage: Stage) -> None:
    """SERVING while it listens, lifecycle or not; SIGTERM ends it with status 0 and tells its edges."""
    await stage.service.start()
    edge = stage.edge()
    await edge.hello()
    health = health_pb2_grpc.HealthStub(stage.channels[0])
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await stage.lifecycle.start(stage.service.lifecycle)
    stage.service.signal(signal.SIGTERM)
    assert await stage.service.ended() == 0
    assert await edge.ended() in (grpc.StatusCode.ABORTED, grpc.StatusCode.UNAVAILABLE)


async def test_a_stopped_admission_expires_nobody_when_it_goes_on(stage: Stage) -> None:
    """SIGSTOP for longer than the ttl: the edge's lease is still there after SIGCONT."""
    stage.service = Service(stage.service.config.parent, lease_ttl="2s")
    await stage.start(supply(slots=1))
    edge = stage.edge()
    await edge.hello()
    await edge.send(*acquire(1))
    await edge.next("grant", 1)
    stage.service.signal(signal.SIGSTOP)
    await asyncio.sleep(2.5)  # the outage itself
    stage.service.signal(signal.SIGCONT)
    edge.drop()  # its keepalive has given the connection up
    await edge.hello(held=[pb.HeldLease(n=1, model="m", instance_id="m-1")])
    queues = await edge.queues()
    assert (queues.models[0].queue.active, queues.models[0].restated) == (1, 0)
    assert queues.models[0].lease_ends["expired"] == 0


async def test_a_taken_port_is_status_78(tmp_path: Path) -> None:
    """The service says which address is taken and how to find by whom, and exits with 78."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", free_port()))
        holder.listen()
        service = Service(tmp_path, listen=f"127.0.0.1:{holder.getsockname()[1]}")
        await service.start(listening=False)
        assert await service.ended() == 78
    assert "admission.listen" in "".join(service.lines)
    assert "ss -ltnp" in "".join(service.lines)


async def test_bad_settings_are_status_78(tmp_path: Path) -> None:
    """Every problem is named with its path; the service doesn't start."""
    service = Service(tmp_path, lease_ttl="1s")
    await service.start(listening=False)
    assert await service.ended() == 78
    assert "admission.lease_ttl" in "".join(service.lines)
