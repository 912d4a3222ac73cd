"""What becomes of model servers that run already when the service starts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tidegate_lifecycle.budget import Card
from tidegate_lifecycle.catalog import Catalog
from tidegate_lifecycle.devices.device import Device, find
from tidegate_lifecycle.engines import ENGINES
from tidegate_lifecycle.needs import need_of
from tidegate_lifecycle.probes import Probe
from tidegate_lifecycle.runtimes.base import Server

TRIES = 3
"""Health checks before a server that was ready counts as broken."""


@dataclass(frozen=True)
class Found:
    """A server that was found running, and the verdict."""

    server: Server
    ready: bool
    """It answers."""
    unwanted: str = ""
    """Why it is to be stopped; empty = it is adopted."""


async def judge(
    servers: Sequence[Server], catalog: Catalog, devices: Sequence[Device], probe: Probe
) -> list[Found]:
    """A verdict for each server.

    1. Its model is no longer in the catalogue, or isn't run here: it goes.
    2. It was started with another configuration, on devices that there aren't, or with other memory than
       is declared: it goes.
    3. It answers: adopted as ready. More than a model's `instances` are, too: the planner drains the surplus.
    4. It was ready and doesn't answer: it goes. One that was still starting is adopted as starting.
    """
    verdicts = await asyncio.gather(*(_judge(server, catalog, devices, probe) for server in servers))
    return sorted(verdicts, key=lambda verdict: -verdict.server.age)


async def _judge(server: Server, catalog: Catalog, devices: Sequence[Device], probe: Probe) -> Found:
    model = catalog.models.get(server.model)
    if model is None or model.external:  # 1
        return Found(server, False, "its model is not in the catalogue")
    engine = ENGINES[model.engine]
    cards = [_card(device) for name in server.device_ids if (device := find(devices, name)) is not None]
    if engine.signature(model) != server.signature:  # 2
        return Found(server, False, "its model's configuration has changed")
    if not cards or len(cards) < len(server.device_ids):
        return Found(server, False, "its devices are not in the configuration")
    need, count = need_of(model), len(cards)
    # What is estimated or measured may have become another number meanwhile: it runs with what it was given.
    reserved = max(need.on(card, count) for card in cards)
    if need.declared and reserved != server.reserved_mib:
        return Found(server, False, "its model's memory has changed")
    for attempt in range(TRIES if server.was_ready else 1):
        if attempt:
            await asyncio.sleep(0.3)
        if (await engine.ready(probe, model, server.address)).ok:
            return Found(server, True)  # 3
    if server.was_ready:  # 4
        return Found(server, False, "it doesn't answer its health check")
    return Found(server, False)


def _card(device: Device) -> Card:
    return Card(device.id, device.pool, device.total_mib, device.budget_mib)
