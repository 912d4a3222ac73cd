"""One JSON for operators: what lifecycle and admission say of themselves, and this edge."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message import Message
from grpc import aio

from tidegate.admission.v1 import admission_pb2, admission_pb2_grpc
from tidegate.lifecycle.v1 import lifecycle_pb2, lifecycle_pb2_grpc
from tidegate_chassis import rpc
from tidegate_chassis.plain import as_dict
from tidegate_chassis.process import VERSION
from tidegate_edge.shared import Edge

_PATIENCE = 2.0
"""Seconds that each service has to answer."""


class Status:
    """Asks both services, each with its own deadline; one that is away is told as such."""

    def __init__(self, admission: str, lifecycle: str) -> None:
        """Addresses of the two services."""
        self.version = VERSION
        self._admission, self._lifecycle = admission, lifecycle

    async def snapshot(self, edge: Edge) -> dict[str, Any]:
        """The whole of it."""
        queues, world = await asyncio.gather(
            _asked(self._admission, _queues), _asked(self._lifecycle, _status)
        )
        admission = queues | queues.pop("queues", {})
        models = {model.name: {"state": model.state} for model in edge.catalog.models()}
        for entry in world.pop("models", []):
            models.setdefault(entry["model"], {}).update(_without(entry, "model"))
        for entry in admission.pop("models", []):
            models.setdefault(entry["model"], {}).update(_without(entry, "model", "instances"))
            slots = {item["instance_id"]: item for item in entry["instances"]}
            for instance in world.get("instances", []):
                instance.update(_without(slots.get(instance["instance_id"], {}), "instance_id"))
        return {
            "version": self.version,
            "ready": not edge.ready(),
            "models": models,
            "instances": world.pop("instances", []),
            "devices": world.pop("devices", []),
            "edge": {
                "version": self.version,
                "uptime_s": round(time.monotonic() - edge.started, 1),
                "session": edge.session.session_id,
                **{name: int(value) for name, value in edge.gauges().items()},
            },
            "admission": admission,
            "lifecycle": world,
        }


def _queues(channel: aio.Channel) -> Awaitable[Message]:
    stub = admission_pb2_grpc.AdmissionServiceStub(channel)
    return stub.GetQueues(admission_pb2.GetQueuesRequest(), timeout=_PATIENCE)


def _status(channel: aio.Channel) -> Awaitable[Message]:
    stub = lifecycle_pb2_grpc.LifecycleServiceStub(channel)
    return stub.GetStatus(lifecycle_pb2.GetStatusRequest(), timeout=_PATIENCE)


async def _asked(address: str, ask: Callable[[aio.Channel], Awaitable[Message]]) -> dict[str, Any]:
    """The answer of a service. Each has a connection of its own, by the TLS files of now; leaving the channel
    cancels what hasn't ended."""
    try:
        async with rpc.channel(address) as channel:
            return {"reachable": True, **as_dict(await ask(channel))}
    except aio.AioRpcError as error:
        return {"reachable": False, "problem": error.code().name}


def _without(entry: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}
