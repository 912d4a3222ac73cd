"""What operators type: footprints listed, measured, moved to another installation and forgotten."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode, aio

from tests.lifecycle.footprints.conftest import KIND, TOTAL, Cards
from tests.lifecycle.footprints.test_measuring import footprints, load, running
from tests.lifecycle.harness import Service
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb

FILL = {"engine": "vllm", "source": "org/m", "max_model_len": 4096, "max_num_seqs": 8}


async def tidegate(service: Service, action: str, *arguments: str, text: str = "") -> tuple[int, str, str]:
    """`tidegate footprints ACTION`: its status, output and errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tidegate_serve.cli",
        "footprints",
        action,
        *arguments,
        "--address",
        service.socket,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(text.encode()), 30)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_measured_listed_moved_and_forgotten(tmp_path: Path, cards: Cards) -> None:
    """From one installation to another: there it holds at once, and shows as imported."""
    models = {"a": cards.model(3000, aliases=["alias"]), "b": cards.model(100)}
    first = cards.service(tmp_path, models, measure=False)
    async with running(first) as stub:
        await load(stub, "a")
        status, output, _ = await tidegate(first, "measure", "alias")
        assert (status, output) == (
            0,
            "a takes 2.9GiB (3 samples, confidence 1.00); later starts reserve 3.2GiB\n",
        )
        status, output, _ = await tidegate(first, "list", "--model", "alias")
        assert output.splitlines()[1].split()[:1] == ["a"]
        assert f"1 x {KIND}" in output
        status, output, errors = await tidegate(first, "export", "--output", str(tmp_path / "out.json"))
        assert (status, output) == (0, "")
        assert errors == f"1 footprints are in {tmp_path / 'out.json'}\n"
    other = tmp_path / "other"
    other.mkdir()
    second = cards.service(other, models, measure=False)
    async with running(second) as stub:
        status, output, _ = await tidegate(second, "import", str(tmp_path / "out.json"))
        assert (status, output) == (0, "1 imported\n")
        (found,) = await footprints(stub, "alias")
        assert (found.mib_per_device, found.reserve_mib, found.source) == (3000, 3256, "imported")
        assert found.current
        needs = {one.model: one.need_source for one in (await second.status()).models}
        assert needs == {"a": "measured", "b": "unknown"}
        status, output, _ = await tidegate(second, "delete", "alias", "--json")
        assert (status, json.loads(output)) == (0, {"deleted": 1})
        assert await tidegate(second, "list") == (0, "no footprints\n", "")
        assert (await second.status()).models[0].need_source == "unknown"


def old_record(**change: object) -> dict[str, Any]:
    """As vllm_gateway writes it."""
    stamp = {"mode": "budget", "max_model_len": 4096, "max_num_seqs": 8, "effective_tp": 1, "util_basis": 0.0}
    record = {"per_gpu_mib": 19882.0, "effective_tp": 1, "measured_at": 1.7e9}
    return {**record, "signature": {**stamp, **change}}


async def test_memory_footprints_json(tmp_path: Path, cards: Cards) -> None:
    """What holds for a model as it is configured now is taken in, for each kind of card; the rest is said."""
    models = {
        "m": FILL,
        "n": {**FILL, "source": "org/n"},
        "c": cards.model(1, aliases=["org/c"]),
    }
    service = cards.service(tmp_path, models)
    text = json.dumps(
        {
            "org/m": old_record(),
            "org/n": old_record(max_model_len=16800),
            "org/c": 5000,
            "org/gone": old_record(),
            "org/zero": 0,
        }
    )
    async with running(service) as stub:
        status, output, errors = await tidegate(service, "import", "-", text=text)
        assert (status, errors) == (0, "")
        assert output.splitlines() == [
            "2 imported",
            "left out: org/zero: 0 MiB is no footprint",
            "left out: org/n: it was measured with max_model_len 16800, n has 4096",
            "left out: org/gone: no model has that name or source",
        ]
        first, second = await footprints(stub)
        assert (first.model, first.mib_per_device, first.card) == ("c", 5000, KIND)
        assert (second.model, second.mib_per_device, second.reserve_mib) == ("m", 19882, 20877)
        assert second.age_ms > 365 * 86_400_000
        needs = {one.model: (one.need_source, one.need_mib) for one in (await service.status()).models}
        assert needs == {"c": ("measured", 5256), "m": ("measured", 20877), "n": ("unknown", 0)}
        status, _, errors = await tidegate(service, "import", "-", text='{"org/gone": 7000}')
        assert (status, errors) == (1, "tidegate: nothing was imported\n")


WRONG = [
    ("nonsense", "- is no JSON: Expecting value"),
    ("[1]", "- holds neither footprints nor records"),
    ('{"footprints": [{"model": 1}]}', "footprints.0: Failed to parse model field"),
    (
        '{"footprints": [{"model": "a"}]}',
        "footprints.0.mib_per_device: 0 is not allowed; give 1 to 10485760",
    ),
    (
        '{"footprints": [{"model": "a", "mib_per_device": 5, "confidence": 2}]}',
        "footprints.0.confidence: 2.0 is not allowed; give 0 to 1",
    ),
    (
        '{"footprints": [{"model": "a", "mib_per_device": 5, "signature": "x/y"}]}',
        "footprints.0.signature: 'x/y' is not allowed; give hexadecimal digits",
    ),
]


async def test_what_cannot_be_imported_is_said(tmp_path: Path, cards: Cards) -> None:
    """The field, its value and what is allowed; nothing is taken in."""
    service = cards.service(tmp_path, {"a": cards.model(1)})
    async with running(service) as stub:
        for text, words in WRONG:
            status, output, errors = await tidegate(service, "import", "-", text=text)
            assert (status, output) == (1, "")
            assert words in errors
        assert await footprints(stub) == []


async def test_a_footprint_by_hand_and_of_another_configuration(tmp_path: Path, cards: Cards) -> None:
    """Without a signature it holds for the model as it is; with another one it is kept and not used."""
    service = cards.service(tmp_path, {"a": cards.model(1)})
    async with running(service) as stub:
        request = pb.ImportFootprintsRequest(
            footprints=[
                pb.Footprint(model="a", mib_per_device=30_000, signature="ab", card=KIND, device_count=1),
                pb.Footprint(model="a", mib_per_device=4000, device_count=2),
                pb.Footprint(model="x", mib_per_device=4000),
            ]
        )
        answer = await stub.ImportFootprints(request, timeout=5)
        assert (answer.imported, list(answer.left_out)) == (2, ["x: there is no such model"])
        found = {one.signature == "ab": one for one in await footprints(stub)}
        assert (found[True].current, found[True].reserve_mib) == (False, max(30_000, TOTAL))
        assert (found[False].current, found[False].device_count, found[False].card) == (True, 2, KIND)
        with pytest.raises(
            aio.AioRpcError, match="there is no footprint of 'a' with the signature"
        ) as refusal:
            await stub.DeleteFootprint(pb.DeleteFootprintRequest(model="a", signature="cd"), timeout=5)
        assert refusal.value.code() == StatusCode.NOT_FOUND
        await stub.DeleteFootprint(pb.DeleteFootprintRequest(model="a", signature="ab"), timeout=5)
        assert len(await footprints(stub)) == 1


async def test_a_store_that_cannot_be_written(tmp_path: Path, cards: Cards) -> None:
    """An import fails with words; a measurement counts until the service ends; nothing else suffers."""
    service = cards.service(tmp_path, {"a": cards.model(2000)}, measure=False)
    (tmp_path / "data" / "footprints.db").mkdir(parents=True)
    async with running(service) as stub:
        status, _, errors = await tidegate(service, "import", "-", text='{"a": 5000}')
        assert status == 1
        assert "footprints.db in lifecycle.data_dir can't be used: unable to open database file" in errors
        await load(stub, "a")
        status, _, errors = await tidegate(service, "measure", "a")
        assert status == 1
        assert "2000 MiB (confidence 1.00); later starts reserve 2256; not kept: footprints.db" in errors
        (found,) = await footprints(stub)
        assert found.mib_per_device == 2000
