"""Estimates through the real service: models whose `vram` nobody gave."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lifecycle.estimate import published as p
from tests.lifecycle.harness import SERVER, Admission, Service
from tests.support.gguf import LLAMA, header
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb

GIB = 2**30


def sparse(file: Path, content: bytes, size: int) -> None:
    """A file that looks large."""
    file.write_bytes(content)
    os.truncate(file, size)


@pytest.fixture
def llama(tmp_path: Path) -> dict[str, Any]:
    """A model of 8 GiB whose server is the tiny one, called as llama-server is."""
    sparse(tmp_path / "m.gguf", header(LLAMA), 8 * GIB)
    program = tmp_path / "llama-server"
    program.write_text(
        "#!/bin/sh\n"
        'while [ $# -gt 0 ]; do [ "$1" = --port ] && port=$2; shift; done\n'
        f'exec {sys.executable} {SERVER} --port "$port"\n'
    )
    program.chmod(0o755)
    return {"engine": "llamacpp", "source": "./m.gguf", "executable": str(program)}


def fails_once(llama: dict[str, Any], tried: Path) -> None:
    """Its first server runs out of memory."""
    program = Path(llama["executable"])
    once = f"#!/bin/sh\nif mkdir {tried}; then echo 'CUDA out of memory' >&2; exit 1; fi\n"
    program.write_text(program.read_text().replace("#!/bin/sh\n", once))


@pytest.fixture
async def services() -> AsyncIterator[list[Service]]:
    """Those that a test started; at the end they and their servers are gone."""
    started: list[Service] = []
    yield started
    for service in started:
        assert await service.stop() == 0


async def explained(service: Service, name: str) -> str:
    async with service.stub() as stub:
        answer = await stub.PlanPlacement(pb.PlanPlacementRequest(model=name), timeout=5)
    return str(answer.need)


async def test_models_are_packed_by_their_estimates_from_the_first_start(
    tmp_path: Path, llama: dict[str, Any], services: list[Service]
) -> None:
    """Two of 10.9 GiB run beside each other on a card of 24, though both are wanted the moment the service is
    there; a third one waits for room; each number can be explained."""
    models = {name: {**llama, "always_on": name < "c"} for name in "abc"}
    service = Service(tmp_path, models)
    services.append(service)
    await service.start()
    async with Admission(service).connected() as admission:
        await admission.until(lambda: admission.instance("a") and admission.instance("b"))
        admission.say(c=1)
        refused = await admission.until(lambda: (m := admission.models["c"]).reason and m)
        assert refused.reason == pb.REASON_NO_CAPACITY
        assert "needs 10.9 GiB" in refused.message
    status = await service.status()
    assert [item.reserved_mib for item in status.instances] == [11_162, 11_162]
    assert {(one.need_source, one.need_mib) for one in status.models} == {("estimated", 11_162)}
    assert await explained(service, "c") == (
        "needs 10.9 GiB (estimated: 8 GiB weights and 1 GiB KV cache for 1 sequence of 8,192 tokens, the "
        "model's own maximum; divided by the number of cards, a tenth more, and 1 GiB on each card)"
    )


async def test_a_changed_model_is_estimated_anew(
    tmp_path: Path, llama: dict[str, Any], services: list[Service]
) -> None:
    """By a reload: its need follows its settings, and a model that is new in the file has one too."""
    service = Service(tmp_path, {"a": llama})
    services.append(service)
    await service.start()

    async def needs(wanted: dict[str, int]) -> None:
        async with asyncio.timeout(20):
            while True:
                if {one.model: one.need_mib for one in (await service.status()).models} == wanted:
                    return
                await asyncio.sleep(0.02)

    await needs({"a": 11_162})
    document = yaml.safe_load(service.config.read_text())
    document["models"] = {"a": {**llama, "max_model_len": 4096}, "b": llama}
    service.config.write_text(yaml.safe_dump(document))
    assert service.process is not None
    service.process.send_signal(signal.SIGHUP)
    await needs({"a": 10_599, "b": 11_162})  # half of the KV cache: 563 MiB less


async def test_an_estimate_that_was_too_low_is_raised(
    tmp_path: Path, llama: dict[str, Any], services: list[Service]
) -> None:
    """A server that runs out of memory with 10.9 GiB fails, says so, and is next given a quarter more."""
    fails_once(llama, tmp_path / "tried")
    service = Service(tmp_path, {"a": llama})
    services.append(service)
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        failed = await admission.until(lambda: (told := admission.models.get("a")) and told.reason and told)
        assert "out of device memory" in failed.message
        await admission.until(lambda: admission.instance("a"))
    (running,) = (await service.status()).instances
    assert running.reserved_mib == 13_953
    assert "raised by a quarter once: a start ran out of memory" in await explained(service, "a")


async def test_what_cant_be_estimated_is_said_and_gets_a_whole_card(
    tmp_path: Path, llama: dict[str, Any], services: list[Service]
) -> None:
    """A damaged file; and a model that is too large in any case is refused with what it needs at least."""
    (tmp_path / "bad.gguf").write_bytes(b"PK")
    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(p.LLAMA_31_8B))
    sparse(folder / "model.safetensors", b"", p.LLAMA_3_8B_BYTES)
    models = {
        "bad": {**llama, "source": "./bad.gguf"},
        "big": {"engine": "vllm", "source": str(folder), "max_num_seqs": 64},
        "cut": {"engine": "vllm", "source": str(folder), "max_num_seqs": 64, "max_model_len": 8192},
    }
    service = Service(tmp_path, models)
    services.append(service)
    await service.start()

    async with asyncio.timeout(20):
        while True:
            if not any(["is being read" in await explained(service, name) for name in models]):
                break
            await asyncio.sleep(0.02)
    assert await explained(service, "bad") == (
        "needs a whole device (its need isn't known: the GGUF file ends within its header; set vram)"
    )
    assert (await explained(service, "big")).startswith("needs 35.1 GiB (estimated: 15 GiB")
    assert (await explained(service, "cut")).endswith(
        "; 87.9 GiB were asked for, 18.6 would do for one sequence)"
    )
    status = {one.model: one for one in (await service.status()).models}
    assert (status["bad"].need_source, status["bad"].need_mib) == ("unknown", 0)
    assert status["big"].reason == pb.REASON_NEVER_FITS
    assert "needs 35.1 GiB" in status["big"].message  # one sequence: 15 GiB and 16 GiB, a tenth more, and 1
    assert (status["cut"].need_source, status["cut"].need_mib) == ("estimated", 24 * 1024)
