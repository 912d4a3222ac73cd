"""gRPC as every service uses it: health, errors with reasons, sockets, and addresses that are taken."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc
from tidegate_chassis import rpc
from tidegate_chassis.config import ConfigError
from tidegate_chassis.errors import Refused
from tidegate_chassis.process import GapMeter

SERVICE = "tidegate.admission.v1.AdmissionService"


class Servicer(admission_pb2_grpc.AdmissionServiceServicer):
    """Refuses, fails and streams."""

    async def RevokeLease(self, request: pb.RevokeLeaseRequest, context: Any) -> pb.RevokeLeaseResponse:
        raise Refused(grpc.StatusCode.NOT_FOUND, "REASON_INVALID", "no such lease", retry_after=1.5)

    async def ListLeases(self, request: pb.ListLeasesRequest, context: Any) -> pb.ListLeasesResponse:
        raise RuntimeError("a secret path /home/x")

    async def Session(self, request: Any, context: Any) -> AsyncIterator[pb.SessionResponse]:
        yield pb.SessionResponse()

    async def Acquire(self, request: Any, context: Any) -> Any: ...

    async def Renew(self, request: Any, context: Any) -> Any: ...

    async def Release(self, request: Any, context: Any) -> Any: ...

    async def GetQueues(self, request: Any, context: Any) -> Any: ...

    async def WatchQueues(self, request: Any, context: Any) -> AsyncIterator[pb.WatchQueuesResponse]:
        yield pb.WatchQueuesResponse()
        raise Refused(grpc.StatusCode.ABORTED, "REASON_SUPERSEDED", "a newer one")


async def _server(listen: str) -> rpc.Server:
    server = rpc.Server(listen, "admission.listen", [SERVICE])
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(Servicer(), server.server)
    await server.start()
    return server


async def test_errors_carry_their_reason(tmp_path: Path) -> None:
    """A refusal arrives with its reason; an unexpected exception arrives without a word of itself."""
    server = await _server(f"unix:{tmp_path}/a.sock")
    async with rpc.channel(server.listen) as channel:
        stub = admission_pb2_grpc.AdmissionServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.RevokeLease(pb.RevokeLeaseRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert rpc.reason_of(caught.value) == "REASON_INVALID"
        assert rpc.describe(caught.value) == "NOT_FOUND REASON_INVALID"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListLeases(pb.ListLeasesRequest(), timeout=5)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in str(caught.value.details())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stub.WatchQueues(pb.WatchQueuesRequest(), timeout=5):
                pass
        assert rpc.reason_of(caught.value) == "REASON_SUPERSEDED"
    await server.stop(0)


async def test_health_is_not_serving_until_told(tmp_path: Path) -> None:
    """A service is NOT_SERVING until it says otherwise, by its own name and as a whole."""
    server = await _server(f"unix:{tmp_path}/a.sock")
    async with rpc.channel(server.listen) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.set_serving(True)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.stop(0)


async def test_a_unix_socket_is_private_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    """The socket has mode 0600; one that a killed process left is taken over, a living one is not."""
    path = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    server = await _server(f"unix:{path}")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with pytest.raises(ConfigError, match=r"admission\.listen.*in use"):
        await _server(f"unix:{path}")
    await server.stop(0)
    assert not path.exists()


async def test_a_taken_port_is_an_error() -> None:
    """A second server on a port says which setting and how to find the first one."""
    server = await _server("127.0.0.1:0")
    with pytest.raises(ConfigError, match=r"admission\.listen.*ss -ltnp"):
        await _server(server.listen)
    await server.stop(0)


def test_a_gap_is_what_exceeds_the_interval() -> None:
    """A loop that was away is told for how long; one in time is told nothing."""
    meter = GapMeter(0.5)
    assert [meter.observe(now) for now in (10, 10.5, 11.0, 14.5)] == [0, 0, 0, 3.0]
