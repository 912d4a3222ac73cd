"""One JSON for operators: what lifecycle and admission say of themselves, and this edge."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

import grpc
from google.protobuf.message import Message

from tidegate.admission.v1 import admission_pb2, admission_pb2_grpc
from tidegate.lifecycle.v1 import lifecycle_pb2, lifecycle_pb2_grpc
from tidegate_chassis import rpc
from tidegate_chassis.plain import as_dict
from tidegate_chassis.process import VERSION
from tidegate_edge.guard import Guard
from tidegate_edge.shared import Edge

_PATIENCE = 2.0
"""Seconds that each service has to answer."""


class Status:
    """Asks both services, each with its own deadline; one that is away is told as such."""

    def __init__(self, admission: str, lifecycle: str) -> None:
        """Addresses of the two services; `admission` and `lifecycle` are their stubs."""
        self.version = VERSION
        self._channels = [rpc.channel(admission), rpc.channel(lifecycle)]
        self.admission = admission_pb2_grpc.AdmissionServiceStub(self._channels[0])
        self.lifecycle = lifecycle_pb2_grpc.LifecycleServiceStub(self._channels[1])

    async def close(self) -> None:
        """Closes the channels."""
        for channel in self._channels:
            await channel.close()

    async def snapshot(self, edge: Edge, guard: Guard) -> dict[str, Any]:
        """The whole of it."""
        queues, world = await asyncio.gather(
            _asked(self.admission.GetQueues(admission_pb2.GetQueuesRequest(), timeout=_PATIENCE)),
            _asked(self.lifecycle.GetStatus(lifecycle_pb2.GetStatusRequest(), timeout=_PATIENCE)),
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
                **{name: int(value) for name, value in (edge.gauges() | guard.gauges()).items()},
                "keys_problems": list(guard.problems),
            },
            "admission": admission,
            "lifecycle": world,
        }


async def _asked(call: Awaitable[Message]) -> dict[str, Any]:
    try:
        return {"reachable": True, **as_dict(await call)}
    except grpc.RpcError as error:
        return {"reachable": False, "problem": str(error.code().name)}
    finally:
        call.cancel()  # type: ignore[attr-defined]


def _without(entry: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}
