"""What waiting tickets cost, and that nothing of one that has ended stays."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator

from tests.admission.support import Desk, instance, model
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_admission import wire
from tidegate_admission.stream import Stream
from tidegate_admission.ticket import Ticket

COUNT = 5_000
LIMIT = 900
"""Bytes; what the allocator loses comes on top, and both together must stay below 1 KiB."""


def fill(acquire: pb.Acquire, n: int) -> None:
    """A ticket with all that an edge may say of it but a trace and an affinity."""
    acquire.n, acquire.model, acquire.tenant = n, "m", f"tenant-{n % 10}"
    acquire.catalog_generation.incarnation, acquire.catalog_generation.n = 1, 300
    acquire.deadline_ms, acquire.token_estimate = 3_600_000 + n, 1000 + n


def desk() -> Desk:
    """A model with one slot and a long queue."""
    one = Desk(max_queue=COUNT)
    one.supply(model(instance(slots=1)), catalog=300)
    return one


def test_a_waiting_ticket_costs_less_than_a_kibibyte() -> None:
    """Everything that is made for it counts: its names, its places in queues and heaps, its deadlines."""
    one = desk()
    session, _ = one.open()
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for first in range(0, COUNT, 50):
            message = pb.Operations()
            for n in range(first + 1, first + 51):
                fill(message.operations.add().acquire, n)
            wire.operations(one.dispatcher, session, message, one.now)
            one.now += 0.001
        del message
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(session.tickets) >= COUNT - 1
    assert (after - before) / COUNT < LIMIT


async def test_a_stream_keeps_nothing_of_its_hello() -> None:
    """Restated tickets that have ended are gone, although the stream that stated them goes on."""
    one = desk()
    said: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()

    async def requests() -> AsyncIterator[pb.SessionRequest]:
        while True:
            yield await said.get()

    hello = pb.Hello(session_id="restated", stream_seq=1, last=True)
    ends = pb.Operations()
    for n in range(1, 301):
        ticket = hello.waiting.add().acquire
        ticket.n, ticket.model = n, "m"
        ends.operations.add().done.n = n
    said.put_nowait(pb.SessionRequest(hello=hello))
    stream = Stream(one.dispatcher, 1, lambda: one.now, lambda _: None)
    responses = stream.run(requests())
    assert (await anext(responses)).answers[0].HasField("welcome")
    assert tickets("restated") == 300
    said.put_nowait(pb.SessionRequest(operations=ends))
    said.put_nowait(pb.SessionRequest(heartbeat=pb.Heartbeat(number=1)))
    await anext(responses)  # the heartbeat's answer
    assert tickets("restated") <= 64  # dead entries of a line, until there are too many
    await responses.aclose()  # type: ignore[attr-defined]  # it is a generator


def tickets(session_id: str) -> int:
    """How many tickets of a session are in memory."""
    gc.collect()
    return sum(type(one) is Ticket and one.id[0] == session_id for one in gc.get_objects())
