"""One admission process alone: lifecycle and the edges are in this process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from grpc import aio

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc
from tidegate.lifecycle.v1 import lifecycle_pb2 as lpb
from tidegate.lifecycle.v1 import lifecycle_pb2_grpc as lpb_grpc
from tidegate_chassis import rpc

Supply = dict[str, tuple[int, int]]
"""Slots and queue of each model."""
CATALOG = (2**40, 300)
"""The catalogue that tickets are judged by."""
PART = 1000
"""Operations or stated ids in one message, as the edge has it."""


class _Lifecycle(lpb_grpc.LifecycleServiceServicer):
    """Says once that every model is ready."""

    def __init__(self, supply: Supply) -> None:
        self._supply = supply

    async def Coordinate(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802 - the contract's name
        models = []
        for name, (slots, queue) in self._supply.items():
            one = lpb.InstanceSupply(
                instance_id=f"{name}-1", address="http://x", state=lpb.INSTANCE_STATE_READY, slots=slots
            )
            models.append(lpb.ModelSupply(model=name, max_concurrent=slots, max_queue=queue, instances=[one]))
        report = lpb.SupplyReport(
            generation=lpb.Generation(incarnation=1, n=1),
            whole=True,
            settled=True,
            models=models,
            catalog_generation=lpb.Generation(incarnation=CATALOG[0], n=CATALOG[1]),
        )
        yield lpb.CoordinateResponse(supply=report)
        async for _ in request_iterator:
            pass


class Session:
    """An edge's side of a session, as thin as it can be: ids that rise, and what was granted."""

    def __init__(self, stub: pb_grpc.AdmissionServiceAsyncStub, name: str) -> None:
        self._call: aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse] = stub.Session(
            wait_for_ready=True
        )
        self._name = name
        self._next = 1
        self._beats = 0
        self._operations = pb.SessionRequest()
        self.granted: list[int] = []
        """Grants that came and were not taken yet."""

    async def open(self, waiting: list[pb.WaitingTicket] | None = None) -> None:
        """Says Hello, with restated tickets, in parts; waits for the welcome."""
        waiting = waiting or []
        self._next += len(waiting)
        count = max(1, -(-len(waiting) // PART))
        for i in range(count):
            part = waiting[i * PART : (i + 1) * PART]
            hello = pb.Hello(
                session_id=self._name, stream_seq=1, holder="bench", last=i == count - 1, waiting=part
            )
            await self._call.write(pb.SessionRequest(hello=hello))
        await self._read()

    def acquire(self, model: str, tenant: str = "") -> int:
        """Puts a ticket on the list of verbs, with what an edge says of a request."""
        n, self._next = self._next, self._next + 1
        fill(self._operations.operations.operations.add().acquire, n, model, tenant)
        return n

    def done(self, n: int) -> None:
        """Puts the end of a ticket or lease on the list."""
        self._operations.operations.operations.add().done.n = n

    async def send(self) -> None:
        """Sends the list as one message."""
        message, self._operations = self._operations, pb.SessionRequest()
        await self._call.write(message)

    async def grants(self, count: int) -> list[int]:
        """Waits until that many grants have come, and takes all there are."""
        while len(self.granted) < count:
            await self._read()
        taken, self.granted = self.granted, []
        return taken

    async def acknowledged(self) -> None:
        """Waits until admission has taken in all that was sent: it answers a heartbeat in its turn."""
        self._beats += 1
        await self._call.write(pb.SessionRequest(heartbeat=pb.Heartbeat(number=self._beats)))
        while not any(answer.HasField("heartbeat_ack") for answer in (await self._read()).answers):
            pass

    async def leave(self) -> None:
        """Says Goodbye, and waits until admission has closed the stream."""
        await self._call.write(pb.SessionRequest(goodbye=pb.Goodbye()))
        while await self._call.read() is not aio.EOF:
            pass

    def close(self) -> None:
        """Leaves without a word."""
        self._call.cancel()

    async def _read(self) -> pb.SessionResponse:
        response = await self._call.read()
        assert isinstance(response, pb.SessionResponse), "the stream goes on"
        for answer in response.answers:
            assert not answer.HasField("refusal"), answer
            if answer.HasField("grant"):
                self.granted.append(answer.grant.n)
        return response


def fill(acquire: pb.Acquire, n: int, model: str, tenant: str) -> None:
    """A ticket with all that an edge may say of it but a trace and an affinity."""
    acquire.n, acquire.model, acquire.tenant = n, model, tenant
    acquire.band = pb.BAND_NORMAL
    acquire.token_estimate = 1000
    acquire.catalog_generation.incarnation, acquire.catalog_generation.n = CATALOG
    acquire.deadline_ms = 3_600_000
    acquire.wants_progress = n % 2 == 0


@asynccontextmanager
async def admission(
    folder: Path, supply: Supply
) -> AsyncIterator[tuple[pb_grpc.AdmissionServiceAsyncStub, int]]:
    """A running admission with this supply: its stub, and its process id."""
    config = folder / "bench.yaml"
    config.write_text(
        f"admission:\n  listen: unix:{folder}/a.sock\n  lease_ttl: 300s\n  queue_timeout: 1h\n"
        f"lifecycle:\n  listen: unix:{folder}/l.sock\ntelemetry:\n  log_level: error\n"
    )
    server = aio.server()
    lpb_grpc.add_LifecycleServiceServicer_to_server(_Lifecycle(supply), server)  # type: ignore[abstract]
    server.add_insecure_port(f"unix:{folder}/l.sock")
    await server.start()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidegate_admission", "--config", str(config)
    )
    try:
        async with rpc.channel(f"unix:{folder}/a.sock") as channel:
            yield pb_grpc.AdmissionServiceStub(channel), process.pid
    finally:
        process.kill()
        await process.wait()
        await server.stop(None)
