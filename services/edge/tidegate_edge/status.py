"""One JSON for operators: what lifecycle and admission say of themselves, and this edge."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from google.protobuf.message import Message
from grpc import aio

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
        """Addresses of the two services, which are asked as `admission` and `lifecycle`."""
        self.version = VERSION
        self.admission = rpc.Peer(admission, admission_pb2_grpc.AdmissionServiceStub)
        self.lifecycle = rpc.Peer(lifecycle, lifecycle_pb2_grpc.LifecycleServiceStub)

    async def snapshot(self, edge: Edge, guard: Guard) -> dict[str, Any]:
        """The whole of it."""
        workers, queues, world = await asyncio.gather(
            edge.peers.told(),
            _asked(self.admission.ask("GetQueues", admission_pb2.GetQueuesRequest(), _PATIENCE)),
            _asked(self.lifecycle.ask("GetStatus", lifecycle_pb2.GetStatusRequest(), _PATIENCE)),
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
                **_together(edge, workers),
                **{name: int(value) for name, value in guard.gauges().items()},
                "keys_problems": list(guard.problems),
                "workers": workers,
            },
            "admission": admission,
            "lifecycle": world,
        }


def _together(edge: Edge, workers: list[dict[str, Any]]) -> dict[str, int | float]:
    """The numbers of all workers, summed; the uptime is the longest."""
    sums = {
        name: sum(worker.get(name, 0) for worker in workers) for name in edge.gauges() if name != "workers"
    }
    return {"uptime_s": max((worker.get("uptime_s", 0.0) for worker in workers), default=0.0), **sums}


async def _asked(answer: Awaitable[Message]) -> dict[str, Any]:
    try:
        return {"reachable": True, **as_dict(await answer)}
    except aio.AioRpcError as error:
        return {"reachable": False, "problem": error.code().name}


def _without(entry: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}
