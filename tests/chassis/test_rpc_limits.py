"""gRPC's limits: messages, silence on either side, a stop that waits, and a deadline on every call."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.proxy import Proxy
from tests.support.until import until
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc
from tidegate_chassis import rpc
from tidegate_edge.envelope import Failure
from tidegate_edge.operations import Operations
from tidegate_edge.status import Status
from tidegate_serve import cli

LIMIT = 4 * 2**20
QUICK = {"grpc.keepalive_time_ms": 300, "grpc.keepalive_timeout_ms": 300, "grpc.http2.ping_timeout_ms": 300}
NEVER = dict.fromkeys(QUICK, 2**31 - 1)
LENIENT = {"grpc.http2.min_ping_interval_without_data_ms": 10}


class Servicer(admission_pb2_grpc.AdmissionServiceServicer):
    """Answers with as many bytes as the lease's id says, or when it is told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.called = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def ListLeases(self, request: pb.ListLeasesRequest, context: Any) -> pb.ListLeasesResponse:
        size = int(request.model) if request.model.isdigit() else 0
        return pb.ListLeasesResponse(leases=[pb.Lease(lease_id="x" * size)])

    async def GetQueues(self, request: Any, context: Any) -> pb.GetQueuesResponse:
        self.called.set()
        await self.go_on.wait()
        return pb.GetQueuesResponse()

    async def WatchQueues(self, request: Any, context: Any) -> AsyncIterator[pb.WatchQueuesResponse]:
        yield pb.WatchQueuesResponse()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


@contextlib.asynccontextmanager
async def _serving(listen: str = "127.0.0.1:0") -> AsyncIterator[tuple[rpc.Server, Servicer]]:
    servicer = Servicer()  # type: ignore[abstract]  # the others answer UNIMPLEMENTED
    server = rpc.Server(listen, "listen", [])
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(servicer, server.server)
    await server.start()
    try:
        yield server, servicer
    finally:
        await server.stop(0)


async def test_messages_are_limited_on_both_sides(tmp_path: Path) -> None:
    """4 MiB, asked or answered; a larger one ends its own call alone, with words for it."""
    async with _serving(f"unix:{tmp_path}/s") as (server, _), rpc.channel(server.listen) as channel:
        stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        for size, model in ((0, "x" * LIMIT), (LIMIT, "")):
            request = pb.ListLeasesRequest(model=model or str(size))
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.ListLeases(request, timeout=10)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "larger than max" in str(caught.value.details())
        answer = await stub.ListLeases(pb.ListLeasesRequest(model=str(LIMIT - 100)), timeout=10)
        assert len(answer.leases[0].lease_id) == LIMIT - 100


async def test_a_stop_lets_running_calls_end(tmp_path: Path) -> None:
    """Health says NOT_SERVING, new calls are refused, one that runs is answered; a stream has the grace."""
    async with _serving(f"unix:{tmp_path}/s") as (server, servicer), rpc.channel(server.listen) as channel:
        stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        await server.set_serving(True)
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        running = asyncio.ensure_future(stub.GetQueues(pb.GetQueuesRequest(), timeout=30))
        stream = stub.WatchQueues(pb.WatchQueuesRequest(), timeout=30)
        await stream.read()
        await servicer.called.wait()
        stopping = asyncio.create_task(server.stop(1.5))
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING

        async def refused() -> bool:
            async with rpc.channel(server.listen) as other:
                try:
                    answered = admission_pb2_grpc.AdmissionServiceStub(other)
                    await answered.ListLeases(pb.ListLeasesRequest(), timeout=5)
                except aio.AioRpcError as error:
                    return error.code() is grpc.StatusCode.UNAVAILABLE
            return False

        await until(refused, "new calls are refused")
        assert not servicer.cancelled.is_set()
        servicer.go_on.set()
        assert await running == pb.GetQueuesResponse()
        await stopping
        await servicer.cancelled.wait()
        with pytest.raises(aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def _with(options: list[tuple[str, int]], change: dict[str, int]) -> list[tuple[str, int]]:
    assert change.keys() <= {name for name, _ in options}, "each side has these options"
    return [(name, change.get(name, value)) for name, value in options]


@pytest.mark.parametrize("side", ["client", "server"])
async def test_silence_is_noticed_on_either_side(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is up and says nothing ends its streams, by that side's own pings alone."""
    monkeypatch.setattr(rpc, "_CHANNEL", _with(rpc._CHANNEL, QUICK if side == "client" else NEVER))
    monkeypatch.setattr(rpc, "_SERVER", _with(rpc._SERVER, LENIENT | (QUICK if side == "server" else NEVER)))
    async with _serving() as (server, servicer):
        proxy = Proxy(int(server.listen.rpartition(":")[2]))
        try:
            async with rpc.channel(proxy.address) as channel:
                stream = admission_pb2_grpc.AdmissionServiceStub(channel).WatchQueues(pb.WatchQueuesRequest())
                await stream.read()
                proxy.swallow(fresh=False)
                if side == "server":
                    await asyncio.wait_for(servicer.cancelled.wait(), 20)
                    assert not stream.done()
                else:
                    with pytest.raises(aio.AioRpcError) as caught:
                        await asyncio.wait_for(stream.read(), 20)
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                    assert not servicer.cancelled.is_set()
                stream.cancel()
        finally:
            await asyncio.to_thread(proxy.close)


def test_both_sides_agree_on_keepalive() -> None:
    """Who pings more often than the other allows is thrown out: 10 s are more than 5, without a call too."""
    client, server = dict(rpc._CHANNEL), dict(rpc._SERVER)
    assert client["grpc.keepalive_time_ms"] > server["grpc.http2.min_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_permit_without_calls"] == server["grpc.keepalive_permit_without_calls"] == 1


STREAMS = {"Session", "Coordinate", "WatchCatalog", "WatchQueues", "Watch"}
"""Calls that last as long as both sides live: heartbeats and keepalive watch over them. Events and logs that
are followed are others; without --follow they have a deadline."""


class _Recorder(grpc.GenericRpcHandler):
    """Takes every call, whatever it is, and notes how long it may last."""

    def __init__(self) -> None:
        self.calls: dict[str, float | None] = {}

    def service(self, handler_call_details: Any) -> Any:
        name = handler_call_details.method.rpartition("/")[2]

        async def handler(requests: Any, context: Any) -> AsyncIterator[bytes]:
            self.calls[name] = context.time_remaining()
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
            yield b""

        return grpc.stream_stream_rpc_method_handler(handler)


COMMANDS = (
    "leases list", "leases revoke 1", "queues", "models list", "models load a", "models load a --no-wait",
    "models unload a", "models pin a", "models unpin a", "devices list", "devices drain a",
    "devices undrain a", "footprints list", "footprints measure a", "footprints export",
    "footprints delete a", "explain a", "events", "logs a",
)  # fmt: skip


async def test_every_call_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All commands, and what the edge asks for its pages: no call could hang for ever."""
    recorder = _Recorder()
    server = aio.server()
    server.add_generic_rpc_handlers((recorder,))
    address = f"unix:{tmp_path}/s"
    server.add_insecure_port(address)
    await server.start()

    def carry_out(command: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tidegate", *command.split(), "--address", address])
        return cli.main()

    main: Callable[[str], int] = carry_out
    for command in COMMANDS:
        assert await asyncio.to_thread(main, command) == 1, command
    edge: Any = type("Edge", (), {"catalog": None})
    status = Status(address, address)
    with contextlib.suppress(AttributeError):  # nothing but the two calls is of interest
        await status.snapshot(edge, edge)
    operations = Operations(status.admission, status.lifecycle)
    for path in (b"models/a/load", b"models/a/unload", b"models/a/pin", b"leases/a/revoke"):
        order = operations.find(b"/gateway/" + path)
        assert order is not None
        with pytest.raises(Failure):
            await order()
    await server.stop(0)
    assert len(recorder.calls) > 12
    assert not recorder.calls.keys() & STREAMS
    longest = 900 + 1  # a measurement's; grpc rounds up
    assert {name for name, left in recorder.calls.items() if left is None or left > longest} == set()
