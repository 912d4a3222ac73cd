"""Real processes and sockets for the admission tests: the service, a look-alike of lifecycle, and an edge."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

from grpc import aio

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc
from tidegate.lifecycle.v1 import lifecycle_pb2 as lpb
from tidegate.lifecycle.v1 import lifecycle_pb2_grpc as lpb_grpc
from tidegate_admission.session import digest
from tidegate_chassis import rpc

PATIENCE = 15.0
"""Seconds that a test waits for what must come."""


class Lifecycle(lpb_grpc.LifecycleServiceServicer):
    """Answers Coordinate: keeps what admission demands, says what the test tells it to."""

    def __init__(self) -> None:
        self.demands: list[lpb.DemandReport] = []
        self.roster: list[str] | None = None
        self.boot = 1
        self.generation = 0
        self.models: dict[str, lpb.ModelSupply] = {}
        self.superseded = False
        self._changed = asyncio.Condition()
        self._server: aio.Server | None = None

    async def start(self, address: str) -> None:
        """Listens."""
        self._server = aio.server()
        lpb_grpc.add_LifecycleServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(address)
        await self._server.start()

    async def stop(self) -> None:
        """As a killed one: all streams end."""
        assert self._server is not None
        await self._server.stop(None)

    async def say(self, *models: lpb.ModelSupply) -> None:
        """Changes the supply of some models."""
        async with self._changed:
            self.models.update({model.model: model for model in models})
            self.generation += 1
            self._changed.notify_all()

    async def supersede(self) -> None:
        """A newer admission has come."""
        async with self._changed:
            self.superseded = True
            self._changed.notify_all()

    async def until(self, met: Callable[[lpb.DemandReport], bool]) -> lpb.DemandReport:
        """The first demand, of all that came or will come, that a condition holds for."""
        async with asyncio.timeout(PATIENCE), self._changed:
            while True:
                for demand in self.demands:
                    if met(demand):
                        return demand
                await self._changed.wait()

    async def Coordinate(
        self, request_iterator: AsyncIterator[lpb.CoordinateRequest], context: Any
    ) -> AsyncIterator[lpb.CoordinateResponse]:
        """The link."""
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            yield self._report(True)
            told = self.generation
            while True:
                async with self._changed:
                    while told == self.generation and not self.superseded:
                        await self._changed.wait()
                    told = self.generation
                if self.superseded:
                    await abort_superseded(context)
                yield self._report(False)
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[lpb.CoordinateRequest]) -> None:
        async for request in requests:
            async with self._changed:
                self.demands.append(request.demand)
                self.roster = list(request.demand.roster)
                self._changed.notify_all()

    def _report(self, whole: bool) -> lpb.CoordinateResponse:
        report = lpb.SupplyReport(
            generation=lpb.Generation(incarnation=self.boot, n=self.generation + 1),
            whole=whole,
            settled=True,
            models=self.models.values(),
            catalog_generation=lpb.Generation(incarnation=self.boot, n=1),
            roster=self.roster or [],
            roster_known=self.roster is not None,
        )
        return lpb.CoordinateResponse(supply=report)


async def abort_superseded(context: Any) -> None:
    """Ends a call as lifecycle does for an older admission."""
    import grpc
    from grpc_status import rpc_status

    from tidegate_chassis.errors import Refused
    from tidegate_chassis.rpc import to_status

    refused = Refused(grpc.StatusCode.ABORTED, "REASON_SUPERSEDED", "a newer admission has connected")
    await context.abort_with_status(rpc_status.to_status(to_status(refused)))


def supply(
    name: str = "m",
    slots: int = 2,
    state: int = lpb.INSTANCE_STATE_READY,
    age: float = 0.0,
    max_queue: int | None = None,
) -> lpb.ModelSupply:
    """A model with one instance."""
    one = lpb.InstanceSupply(
        instance_id=f"{name}-1",
        address="http://127.0.0.1:9",
        state=state,  # type: ignore[arg-type]
        slots=slots,
        age_ms=int(age * 1000),
    )
    return lpb.ModelSupply(
        model=name, state=lpb.MODEL_STATE_READY, instances=[one], max_concurrent=slots, max_queue=max_queue
    )


class Service:
    """The admission process."""

    def __init__(self, folder: Path, lease_ttl: str = "10s", listen: str = "") -> None:
        self.listen = listen or f"unix:{folder}/a.sock"
        self.lifecycle = f"unix:{folder}/l.sock"
        self.config = folder / "tidegate.yaml"
        self.config.write_text(
            f"admission:\n  listen: {self.listen}\n  lease_ttl: {lease_ttl}\n"
            f"lifecycle:\n  listen: {self.lifecycle}\n"
        )
        self.lines: list[str] = []
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def start(self, listening: bool = True) -> None:
        """Starts it, and waits until it listens."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tidegate_admission",
            "--config",
            str(self.config),
            stderr=asyncio.subprocess.PIPE,
        )
        heard = asyncio.Event()
        self._reader = asyncio.create_task(self._read(heard))
        if listening:
            async with asyncio.timeout(PATIENCE):
                await heard.wait()
            assert self._process.returncode is None, "\n".join(self.lines)

    async def _read(self, heard: asyncio.Event) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self.lines.append(line.decode())
            if "admission.listening" in self.lines[-1]:
                heard.set()
        heard.set()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def signal(self, number: int) -> None:
        """Sends a signal to it."""
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Its exit status."""
        assert self._process is not None
        assert self._reader is not None
        async with asyncio.timeout(PATIENCE):
            status = await self._process.wait()
            await self._reader
        return status

    async def kill(self) -> None:
        """kill -9."""
        if self._process is not None and self._process.returncode is None:
            self.signal(signal.SIGKILL)
            await self.ended()


class Edge:
    """One edge's session over a real socket: says what the test says, keeps what it hears."""

    def __init__(self, channel: aio.Channel, session_id: str = "edge") -> None:
        self.stub = pb_grpc.AdmissionServiceStub(channel)
        self.session_id, self.seq = session_id, 0
        self.seen = 0
        self.beats = 0
        self.heard: list[pb.Answer] = []
        self._news = asyncio.Event()
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None

    async def hello(
        self, held: Iterable[pb.HeldLease] = (), waiting: Iterable[pb.WaitingTicket] = ()
    ) -> None:
        """Opens a new stream, in two parts, and waits for its welcome."""
        self.seq += 1
        self.seen = 0
        self._call = self.stub.Session(wait_for_ready=True)
        self._reader = asyncio.create_task(self._read(self._call))
        first = pb.Hello(session_id=self.session_id, stream_seq=self.seq, holder="test", held=held)
        await self._call.write(pb.SessionRequest(hello=first))
        second = pb.Hello(session_id=self.session_id, stream_seq=self.seq, waiting=waiting, last=True)
        await self._call.write(pb.SessionRequest(hello=second))
        await self.next("welcome")

    async def _read(self, call: Any) -> None:
        with contextlib.suppress(aio.AioRpcError, asyncio.CancelledError):
            async for response in call:
                assert response.seq == self.seen + 1
                self.seen = response.seq
                self.heard += response.answers
                self._news.set()
        self._news.set()

    async def send(self, *verbs: pb.Acquire | pb.Done | pb.Move) -> None:
        """One batch of operations."""
        operations = []
        for verb in verbs:
            kind = type(verb).__name__.lower()
            operations.append(pb.Operation(**{kind: verb}))  # type: ignore[arg-type]
        await self.say(operations)

    async def beat(self, *held: int) -> None:
        """A heartbeat that states these ids."""
        self.beats += 1
        count, total = digest(held)
        beat = pb.Heartbeat(number=self.beats, held_count=count, held_digest=total, responses_seen=self.seen)
        await self._call.write(pb.SessionRequest(heartbeat=beat))

    async def say(self, operations: Iterable[pb.Operation]) -> None:
        """One batch of operations, as they are."""
        await self._call.write(pb.SessionRequest(operations=pb.Operations(operations=operations)))

    async def state(self, *held: pb.HeldLease) -> None:
        """The full held set, for the last heartbeat."""
        said = pb.HeldStatement(number=self.beats, responses_seen=self.seen, held=held)
        await self._call.write(pb.SessionRequest(held_statement=said))

    async def goodbye(self) -> None:
        """Leaves."""
        await self._call.write(pb.SessionRequest(goodbye=pb.Goodbye()))

    async def next(self, kind: str, n: int = 0) -> Any:
        """Takes out the first answer of a kind (about ticket n), waiting for it."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for answer in self.heard:
                    content = getattr(answer, kind)
                    if answer.WhichOneof("kind") == kind and (not n or content.n == n):
                        self.heard.remove(answer)
                        return content
                self._news.clear()
                await self._news.wait()

    def drop(self) -> None:
        """The connection breaks."""
        self._call.cancel()

    async def ended(self) -> Any:
        """Waits for the end of the stream; its status code."""
        async with asyncio.timeout(PATIENCE):
            if self._reader is not None:
                await self._reader
            return await self._call.code()

    async def close(self) -> None:
        """Ends the stream, if there is one."""
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)

    async def queues(self) -> pb.Queues:
        """What GetQueues says."""
        response = await self.stub.GetQueues(pb.GetQueuesRequest(), timeout=PATIENCE)
        return response.queues

    async def until(self, met: Callable[[pb.Queues], bool]) -> pb.Queues:
        """Asks for the queues until a condition holds."""
        async with asyncio.timeout(PATIENCE):
            while True:
                queues = await self.queues()
                if met(queues):
                    return queues


class Stage:
    """Everything a test needs, taken down afterwards."""

    def __init__(self, folder: Path) -> None:
        self.service = Service(folder)
        self.lifecycle = Lifecycle()  # type: ignore[abstract]  # only Coordinate is needed
        self.channels: list[aio.Channel] = []
        self.edges: list[Edge] = []

    async def start(self, *models: lpb.ModelSupply) -> None:
        """Lifecycle with these models, then admission."""
        await self.lifecycle.say(*models)
        await self.lifecycle.start(self.service.lifecycle)
        await self.service.start()

    def edge(self, session_id: str = "edge") -> Edge:
        """An edge with a channel of its own."""
        self.channels.append(rpc.channel(self.service.listen))
        self.edges.append(Edge(self.channels[-1], session_id))
        return self.edges[-1]

    async def end(self) -> None:
        """Takes everything down."""
        for edge in self.edges:
            await edge.close()
        for channel in self.channels:
            await channel.close()
        await self.service.kill()
        await self.lifecycle.stop()


def free_port() -> int:
    """A TCP port that is free now."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
