"""Footprints of processes that take real VRAM, by the real nvidia-smi: only where there is a card."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lifecycle.footprints.test_measuring import event, footprints, load, running, unload
from tests.lifecycle.harness import Service
from tests.support.gateway import free_port
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.devices import Device, Devices, HostSmi
from tidegate_lifecycle.footprints.apps import apps, own_use

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

SERVER = Path(__file__).with_name("vram.py")
CONTEXT_MIB = 1536
"""What a CUDA context takes beside what is asked for, at most: some hundred MiB, by card and driver."""
SAME_MIB = 64
"""By so much the driver's figure for a card at rest may differ between two looks."""


def server(mib: int, **keys: Any) -> dict[str, Any]:
    """A model whose server takes so much of its card."""
    command = [sys.executable, str(SERVER), "--port", "{port}", "--mib", str(mib)]
    return {"engine": "command", "command": command, "start_timeout": "60s", **keys}


@contextmanager
def taking(mib: int, device: Device) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that takes VRAM."""
    command = [sys.executable, str(SERVER), "--port", str(free_port()), "--mib", str(mib)]
    with subprocess.Popen(command, env={"CUDA_VISIBLE_DEVICES": device.visible_as}) as process:
        try:
            yield process
        finally:
            process.kill()


async def used_mib(device: Device) -> int:
    """What the driver shows as used of the card now."""
    (now,) = [one for one in await Devices(()).open() if one.uuid == device.uuid]
    assert now.used_mib is not None
    return now.used_mib


async def until_used(device: Device, low: int, high: int) -> int:
    """Waits until the driver shows something between the two."""
    used = -1
    async with asyncio.timeout(60):
        while not low <= used <= high:
            used = await used_mib(device)
    return used


async def card() -> Device:
    """The card with the most free memory: others may work on this machine."""
    return max(await Devices(()).open(), key=lambda one: one.total_mib - (one.used_mib or 0))


async def test_what_a_process_takes_is_told_of_it_and_comes_back() -> None:
    """The driver's list names the process; after its end the card is as it was."""
    device = await card()
    before = await used_mib(device)
    with taking(2048, device) as process:
        await until_used(device, before + 2048, before + 2048 + CONTEXT_MIB)
        own = own_use(await apps(HostSmi()), device.uuid, {process.pid})
    await until_used(device, 0, before + SAME_MIB)
    if own is None:
        pytest.skip(
            "the driver's list doesn't show this PID namespace's processes (a container without the host's)"
        )
    assert 2048 <= own <= 2048 + CONTEXT_MIB


async def test_a_server_is_measured_and_its_memory_comes_back(tmp_path: Path) -> None:
    """By its processes or by the difference: what it took, a context included. Its end gives all of it back,
    by the driver's word; its next start reserves what was measured."""
    device = await card()
    before = await used_mib(device)
    quick = {"settle": "1s", "samples": 5, "spacing": "200ms"}
    devices = [{"id": device.uuid or str(device.index), "budget": 0.99}]
    service = Service(tmp_path, {"m": server(3072)}, devices=devices, footprints=quick)
    async with running(service) as stub:
        await load(stub, "m")
        await event(stub, "footprint", "m")
        (found,) = await footprints(stub)
        assert 3072 <= found.mib_per_device <= 3072 + CONTEXT_MIB
        assert found.confidence >= 0.9
        assert found.card == device.name
        again = await stub.MeasureFootprint(pb.MeasureFootprintRequest(model="m"), timeout=60)
        assert abs(again.footprint.mib_per_device - found.mib_per_device) <= SAME_MIB
        await unload(stub, "m")
        await until_used(device, 0, before + SAME_MIB)
        await load(stub, "m", 2)
        (instance,) = (await service.status()).instances
        assert instance.reserved_mib == again.footprint.reserve_mib
    await until_used(device, 0, before + SAME_MIB)


async def test_two_servers_on_one_card_are_told_apart(tmp_path: Path) -> None:
    """Each has its own number, whoever came first; neither is the sum."""
    device = await card()
    quick = {"settle": "1s", "samples": 3, "spacing": "200ms"}
    devices = [{"id": device.uuid or str(device.index), "budget": 0.99}]
    models = {"small": server(1024, vram="4GiB"), "large": server(4096, vram="8GiB")}
    service = Service(tmp_path, models, devices=devices, footprints=quick)
    async with running(service) as stub:
        for name, mib in (("small", 1024), ("large", 4096)):
            await load(stub, name)
            await event(stub, "footprint", name)
            (found,) = await footprints(stub, name)
            assert mib <= found.mib_per_device <= mib + CONTEXT_MIB
