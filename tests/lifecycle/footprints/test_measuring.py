"""Measured through the real service: real model servers, and a program that tells what they take."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode, aio

from tests.lifecycle.footprints.conftest import KIND, QUICK, Cards
from tests.lifecycle.harness import Admission, Service, alive, end, model
from tests.support.gateway import BIN
from tests.support.until import until
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[Any]:
    """The service and a client of it."""
    await service.start()
    try:
        async with service.stub() as stub, Admission(service).connected():
            yield stub
    finally:
        await service.stop()


async def event(stub: Any, kind: str, model: str, nth: int = 1) -> pb.Event:
    """The nth event of a kind, be it over or still to come."""
    call = stub.WatchEvents(pb.WatchEventsRequest(model=model, last=1000))
    seen: list[pb.Event] = []
    try:
        async with asyncio.timeout(15):
            async for answer in call:
                seen.append(answer.event)
                if [one.kind for one in seen].count(kind) == nth:
                    return seen[-1]
    except TimeoutError:
        pass
    finally:
        call.cancel()
    raise AssertionError(f"no {kind} of {model} among {[(one.kind, one.message) for one in seen]}")


async def footprints(stub: Any, model: str = "") -> list[pb.Footprint]:
    answer = await stub.ListFootprints(pb.ListFootprintsRequest(model=model), timeout=5)
    return list(answer.footprints)


async def load(stub: Any, model: str, nth: int = 1) -> None:
    """Orders its start, for the nth time, and waits until it is ready."""
    await stub.LoadModel(pb.LoadModelRequest(model=model), timeout=5)
    await event(stub, "ready", model, nth)


async def unload(stub: Any, model: str) -> None:
    """Stops it, and waits until it is gone."""
    await stub.UnloadModel(pb.UnloadModelRequest(model=model), timeout=5)
    await event(stub, "gone", model)


async def test_per_card_and_per_process(tmp_path: Path, cards: Cards) -> None:
    """A server over two cards, with a stranger on one: what its own child took of each, never the sum. The
    next start reserves that with a margin."""
    cards.stranger(1500)
    service = cards.service(tmp_path, {"big": cards.model(3000, tensor_parallel_size=2)})
    async with running(service) as stub:
        assert (await service.status()).models[0].need_source == "unknown"
        await load(stub, "big")
        told = await event(stub, "footprint", "big")
        assert told.message.startswith(
            "3000 MiB on each of 2 cards (confidence 1.00); later starts reserve 3256"
        )
        (found,) = await footprints(stub)
        assert (found.model, found.mib_per_device, found.reserve_mib) == ("big", 3000, 3256)
        assert (found.card, found.device_count, found.samples, found.source) == (KIND, 2, 3, "measured")
        assert found.current
        assert found.age_ms < 20_000
        status = await service.status()
        assert (status.models[0].need_source, status.models[0].need_mib) == ("measured", 3256)
        await unload(stub, "big")
        await load(stub, "big", 2)
        assert (await service.status()).instances[0].reserved_mib == 3256


async def test_a_model_without_a_number_is_packed_once_it_is_measured(tmp_path: Path, cards: Cards) -> None:
    """It gets a whole card, is measured, and gives back what it doesn't need: others come beside it."""
    models = {"a": cards.model(2000), "b": cards.model(2000), "c": cards.model(2000, vram="2256MiB")}
    service = cards.service(tmp_path, models)
    async with running(service) as stub:
        for name in models:
            await load(stub, name)
            await event(stub, "footprint", name)
        status = await service.status()
        assert sorted(one.reserved_mib for one in status.instances) == [2256, 2256, 2256]
        assert len({tuple(one.device_ids) for one in status.instances}) == 2  # three on two cards


async def test_without_processes_the_difference_counts(tmp_path: Path, cards: Cards) -> None:
    """Where the driver names no processes: what is used beyond what was used before the start."""
    cards.say("hide")
    cards.stranger(5000, "0")
    cards.stranger(5000, "1")
    service = cards.service(tmp_path, {"a": cards.model(2500), "b": cards.model(1200, vram="2GiB")})
    async with running(service) as stub:
        await load(stub, "a")
        assert (await event(stub, "footprint", "a")).message.startswith("2500 MiB")
        await load(stub, "b")
        assert (await event(stub, "footprint", "b")).message.startswith("1200 MiB")


async def test_an_adopted_server_without_a_base(tmp_path: Path, cards: Cards) -> None:
    """Nobody knows what was used before it started: without processes it isn't measured, with them it is."""
    service = cards.service(tmp_path, {"a": cards.model(2500)}, measure=False)
    await service.start()
    async with service.stub() as stub:
        await load(stub, "a")
        assert await footprints(stub) == []
    await service.kill()
    async with running(service) as stub:
        cards.say("hide")
        request = pb.MeasureFootprintRequest(model="a")
        with pytest.raises(aio.AioRpcError) as refusal:
            await stub.MeasureFootprint(request, timeout=20)
        assert refusal.value.code() == StatusCode.FAILED_PRECONDITION
        assert "the driver names no processes" in (refusal.value.details() or "")
        assert await footprints(stub) == []
        cards.say("")
        assert (await stub.MeasureFootprint(request, timeout=20)).footprint.mib_per_device == 2500
        (found,) = await footprints(stub, "a")
        assert found.mib_per_device == 2500


async def test_thrown_away_when_another_server_starts_beside_it(tmp_path: Path, cards: Cards) -> None:
    """What is measured while a neighbour takes memory is no footprint; a later try is."""
    models = {"a": cards.model(2000, vram="4GiB"), "b": cards.model(3000, "--load", "1", vram="4GiB")}
    service = cards.service(tmp_path, models, samples=10, spacing="100ms")
    async with running(service) as stub:
        await load(stub, "a")
        await stub.LoadModel(pb.LoadModelRequest(model="b"), timeout=5)
        told = await event(stub, "footprint_discarded", "a")
        assert "is starting on the same card" in told.message
        await event(stub, "ready", "b")
        assert (await event(stub, "footprint", "a")).message.startswith("2000 MiB")
        assert {one.mib_per_device for one in await footprints(stub)} <= {2000, 3000}


async def test_thrown_away_when_the_server_goes(tmp_path: Path, cards: Cards) -> None:
    """Evicted, unloaded or killed while it is measured: nothing is kept."""
    service = cards.service(tmp_path, {"a": cards.model(2000, vram="4GiB")}, samples=50, spacing="100ms")
    async with running(service) as stub:
        await load(stub, "a")
        (pid,) = (one.pid for one in (await service.status()).instances)
        await until(lambda: cards.asked() >= 2, "samples are taken")
        end(pid)
        told = await event(stub, "footprint_discarded", "a")
        assert told.message == "the server doesn't run any more"
        assert await footprints(stub) == []


async def test_nothing_taken_is_no_footprint(tmp_path: Path, cards: Cards) -> None:
    """A server that shows no memory is told, tried again, and not kept until it shows some."""
    service = cards.service(tmp_path, {"a": cards.model(0, vram="4GiB")})
    async with running(service) as stub:
        cards.say("hide")
        await load(stub, "a")
        told = await event(stub, "footprint_discarded", "a")
        assert told.message == "0 MiB of 0 (24576 MiB) can't be what it took"
        assert await footprints(stub) == []
        cards.say("")
        cards.take("0", (await service.status()).instances[0].pid, 1700)
        assert (await event(stub, "footprint", "a")).message.startswith("1700 MiB")


async def test_kill_9_while_it_is_measured(tmp_path: Path, cards: Cards) -> None:
    """Nothing wrong is kept; the service that comes adopts the server and measures it."""
    service = cards.service(tmp_path, {"a": cards.model(2000)}, samples=50, spacing="100ms")
    await service.start()
    async with service.stub() as stub:
        await load(stub, "a")
        await until(lambda: cards.asked() >= 3, "samples are taken")
        (pid,) = (one.pid for one in (await service.status()).instances)
    await service.kill()
    service = cards.service(tmp_path, {"a": cards.model(2000)})
    async with running(service) as stub:
        await event(stub, "footprint", "a")
        (found,) = await footprints(stub)
        assert found.mib_per_device == 2000
        assert alive(pid)


async def test_a_driver_that_hangs_delays_nobody(tmp_path: Path, cards: Cards) -> None:
    """While nvidia-smi hangs in a measurement, another model is loaded as ever."""
    models = {"a": cards.model(2000, vram="4GiB"), "b": cards.model(2000, vram="4GiB")}
    service = cards.service(tmp_path, models)
    async with running(service) as stub:
        cards.say("hang")
        await load(stub, "a")
        await until(lambda: cards.asked() >= 1, "samples are taken")
        async with asyncio.timeout(4):  # less than the program's deadline
            await stub.LoadModel(pb.LoadModelRequest(model="b"), timeout=2)
            await event(stub, "ready", "b")
        cards.say("")


async def test_what_cannot_be_measured_is_said(tmp_path: Path, cards: Cards) -> None:
    """Unknown, not running, or on a card whose memory is declared."""
    service = cards.service(tmp_path, {"a": cards.model(2000)}, measure=False)
    async with running(service) as stub:
        for name, code, words in (
            ("x", StatusCode.NOT_FOUND, "there is no model 'x'"),
            (
                "a",
                StatusCode.FAILED_PRECONDITION,
                "a doesn't run: only a server that is ready can be measured",
            ),
        ):
            with pytest.raises(aio.AioRpcError, match=words) as refusal:
                await stub.MeasureFootprint(pb.MeasureFootprintRequest(model=name), timeout=5)
            assert refusal.value.code() == code
    declared = Service(tmp_path, {"a": model("2GiB")})
    async with running(declared) as stub:
        await load(stub, "a")
        with pytest.raises(aio.AioRpcError, match="the memory of gpu0 is declared"):
            await stub.MeasureFootprint(pb.MeasureFootprintRequest(model="a"), timeout=5)
        assert await footprints(stub) == []


async def test_a_changed_model_is_measured_anew(tmp_path: Path, cards: Cards) -> None:
    """What was measured under the old configuration is kept and not used for the new one."""
    service = cards.service(tmp_path, {"a": cards.model(2000)})
    async with running(service) as stub:
        await load(stub, "a")
        await event(stub, "footprint", "a")
        cards.service(tmp_path, {"a": cards.model(2600)})
        assert service.process is not None
        service.process.send_signal(signal.SIGHUP)
        await event(stub, "gone", "a")
        await load(stub, "a", 2)
        assert (await event(stub, "footprint", "a", 2)).message.startswith("2600 MiB")
        found = {one.mib_per_device: one.current for one in await footprints(stub)}
        assert found == {2000: False, 2600: True}
        assert (await service.status()).models[0].need_mib == 2856


async def test_a_vllm_that_fills_its_card_is_packed_by_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes all of the card it was given; by its log most of that is KV cache that nobody asked for. Its
    next start gets what it needs, and takes that."""
    ledger = tmp_path / "ledger.json"
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tidegate_simulator.nvidia_smi "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TIDEGATE_SIMULATOR_LEDGER", str(ledger))
    monkeypatch.setenv("TIDEGATE_SIMULATOR_DEVICES", "24576")
    entry = {
        "engine": "vllm",
        "source": "/nowhere/model",
        "executable": str(BIN / "tidegate-simulator"),
        "max_model_len": 16384,
        "extra_args": ["--weights", "3GiB", "--ledger", str(ledger)],
    }
    service = Service(tmp_path, {"v": entry}, devices=[{"id": "0"}], footprints=QUICK)
    async with running(service) as stub:
        await load(stub, "v")
        taken = (await service.status()).instances[0].reserved_mib
        assert taken > 22_000
        await event(stub, "footprint", "v")
        (found,) = await footprints(stub)
        assert 3072 < found.mib_per_device < taken / 2
        assert found.mib_per_device < found.reserve_mib < taken / 2
        assert (await service.status()).instances[0].reserved_mib == taken  # it has it all, and keeps it
        await unload(stub, "v")
        await load(stub, "v", 2)
        assert (await service.status()).instances[0].reserved_mib == found.reserve_mib
