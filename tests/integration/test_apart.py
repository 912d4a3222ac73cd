"""The three services one by one over TCP, as in production: any order, health and reflection."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.support.gateway import BIN, Gateway, free_port, simulated, wait_for

NAMES = {
    "admission": "tidegate.admission.v1.AdmissionService",
    "lifecycle": "tidegate.lifecycle.v1.LifecycleService",
}


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[tuple[Gateway, dict[str, subprocess.Popen[bytes]], dict[str, str]]]:
    """A configuration with TCP addresses; what the test starts of it is stopped."""
    listen = {name: f"127.0.0.1:{free_port()}" for name in NAMES}
    sections = {name: {"listen": address} for name, address in listen.items()}
    one = Gateway(tmp_path, {"models": {"a": simulated()}, **sections})
    running: dict[str, subprocess.Popen[bytes]] = {}
    yield one, running, listen
    for process in running.values():
        process.terminate()
    assert {name: process.wait(12) for name, process in running.items()} == dict.fromkeys(running, 0)
    one.close()


def _start(one: Gateway, service: str) -> subprocess.Popen[bytes]:
    with one.log_path.open("ab") as log:
        return subprocess.Popen(
            [BIN / "tidegate", service, "--config", one.config_path],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=one.environ,
        )


def _health(address: str, service: str) -> int:
    try:
        with grpc.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest(service=service)
            return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status)
    except grpc.RpcError:
        return -1


def test_services_start_in_any_order(
    apart: tuple[Gateway, dict[str, subprocess.Popen[bytes]], dict[str, str]],
) -> None:
    """The edge alone lives and isn't ready; with the others it serves; each tells its health and its API."""
    one, running, listen = apart
    running["edge"] = _start(one, "edge")
    wait_for(lambda: "listening" in one.log(), "the edge listens")
    assert one.http.get("/health").status_code == 200
    assert one.http.get("/ready").status_code == 503
    running["admission"] = _start(one, "admission")
    running["lifecycle"] = _start(one, "lifecycle")
    wait_for(lambda: one.http.get("/ready").status_code == 200, "the edge is ready")
    assert one.chat("a").status_code == 200
    for service, name in NAMES.items():
        assert _health(listen[service], name) == health_pb2.HealthCheckResponse.SERVING
        with grpc.insecure_channel(listen[service]) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = list(stub.ServerReflectionInfo(iter([request]), timeout=5))
        assert name in {service.name for service in answer.list_services_response.service}
