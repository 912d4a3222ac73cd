"""What is downloaded for a model, and what its server is given."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from tests.support import hub as support
from tests.support.gateway import wait_for
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.engines.base import Files, Placement
from tidegate_lifecycle.engines.llamacpp import LlamaCppEngine
from tidegate_lifecycle.engines.vllm import VllmEngine
from tidegate_lifecycle.hub import addresses, client, prepare, transfer
from tidegate_lifecycle.hub.cache import Cache
from tidegate_lifecycle.hub.prepare import Preparer, Progress, nothing
from tidegate_lifecycle.hub.words import HubFailed

CONTENT = os.urandom(200_000)
PARTS = [f"Q8_0/m-Q8_0-{n:05}-of-00002.gguf" for n in (1, 2)]
REPO = "org/m-GGUF"
LLAMA = Model("m", engine="llamacpp", source=REPO)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[support.Hub]:
    """A hub with a split model, a projector and a file by itself."""
    monkeypatch.setattr(client, "RETRIES", ())
    monkeypatch.setattr(transfer, "PAUSES", (0.01,))
    hub = support.Hub()
    hub.repos[REPO] = {
        PARTS[0]: CONTENT,
        PARTS[1]: b"second",
        "mmproj-F16.gguf": b"eyes",
        "x/y-Q2_K.gguf": b"y",
    }
    hub.plain["/files/u-Q4_0.gguf"] = CONTENT
    with hub.running():
        yield hub


def preparer(served: support.Hub, folder: Path, seen_at: str = "") -> Preparer:
    return Preparer(Cache.at(folder), seen_at, {"HF_ENDPOINT": served.url})


def read(path: str) -> bytes:
    return Path(path).read_bytes()


def content(files: Files) -> bytes:
    return read(files.model)


def snapshot(served: support.Hub, folder: Path) -> Path:
    return folder / "hub" / "models--org--m-GGUF" / "snapshots" / served.commit(REPO)


async def test_a_split_model_and_its_projector(served: support.Hub, tmp_path: Path) -> None:
    """All parts and the projector are there; progress counts them together; later starts ask nobody."""
    reports: list[Progress] = []
    mine = preparer(served, tmp_path)
    files = await mine.prepare(LLAMA, reports.append)
    there = snapshot(served, tmp_path)
    assert files == Files(str(there / PARTS[0]), str(there / "mmproj-F16.gguf"))
    assert (there / PARTS[0]).read_bytes() == CONTENT
    assert (there / PARTS[1]).read_bytes() == b"second"
    total = len(CONTENT) + 10
    assert reports[0] == Progress(0, total)
    assert reports[-1] == Progress(total, total)
    asked, told = len(served.requests), len(reports)
    assert await mine.prepare(LLAMA, reports.append) == files
    assert (len(served.requests), len(reports)) == (asked, told)
    (there / PARTS[1]).resolve().unlink()
    await mine.prepare(LLAMA, reports.append)
    assert (there / PARTS[1]).read_bytes() == b"second", "what was deleted is fetched again"


async def test_what_the_servers_are_given(served: support.Hub, tmp_path: Path) -> None:
    """llama-server the file and the projector, vLLM the file and its tokenizer."""
    files = await preparer(served, tmp_path).prepare(LLAMA, print)
    placement = Placement("h", 1, (), 0, files)
    argv = LlamaCppEngine({}).command(LLAMA, placement).argv
    assert argv[:5] == ("llama-server", "-m", files.model, "--mmproj", files.projector)
    vllm = replace(LLAMA, engine="vllm", source=f"{REPO}/{PARTS[0]}", tokenizer="org/base")
    files = await preparer(served, tmp_path).prepare(vllm, print)
    assert files.projector == ""
    argv = VllmEngine({}, gpu=False).command(vllm, Placement("h", 1, (), 0, files)).argv
    assert argv[:3] == ("vllm", "serve", files.model)
    assert argv[-2:] == ("--tokenizer", "org/base")


@pytest.mark.parametrize("flag", ["--no-mmproj", "--mmproj=x.gguf"])
async def test_a_projector_that_is_not_wanted(served: support.Hub, tmp_path: Path, flag: str) -> None:
    """The model's own arguments say otherwise: none is downloaded."""
    files = await preparer(served, tmp_path).prepare(replace(LLAMA, extra_args=(flag,)), print)
    assert files.projector == ""
    assert not served.transfers("mmproj-F16.gguf")


async def test_in_a_container_the_cache_lies_elsewhere(served: support.Hub, tmp_path: Path) -> None:
    """The path that the server is given is the container's; without a cache there is nothing to give."""
    files = await preparer(served, tmp_path, "/root/.cache/huggingface").prepare(LLAMA, print)
    folder = f"/root/.cache/huggingface/hub/models--org--m-GGUF/snapshots/{served.commit(REPO)}"
    assert files == Files(f"{folder}/{PARTS[0]}", f"{folder}/mmproj-F16.gguf")
    assert await nothing(LLAMA, print) == Files()


async def test_who_may_use_the_cache_may_use_what_is_downloaded(served: support.Hub, tmp_path: Path) -> None:
    """Root in a container has no capabilities: where others may write, they may beside our files too."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    (tmp_path / "other").mkdir()
    before = os.umask(0o077)
    try:
        await preparer(served, tmp_path / "cache", "/hub").prepare(LLAMA, print)
        await preparer(served, tmp_path / "other", "/hub").prepare(LLAMA, print)
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "cache").rglob("*") if path.name != "CACHEDIR.TAG"]
    assert {oct(path.stat().st_mode & 0o777) for path in made if path.is_dir()} == {"0o777"}
    assert {oct(path.stat().st_mode & 0o777) for path in made if path.is_file()} == {"0o666"}
    blobs = (tmp_path / "other" / "hub" / "models--org--m-GGUF" / "blobs").iterdir()
    assert {oct(path.stat().st_mode & 0o777) for path in blobs} == {"0o644"}, (
        "as readable as the cache, no more"
    )


@pytest.mark.parametrize(
    "model",
    [
        Model("m", engine="vllm", source="org/model", extra_args=("--revision=v1",)),
        Model("m", engine="vllm", source="org/model", env={"HF_HOME": "/elsewhere"}),
        Model("m", engine="vllm", source="./folder"),
        Model("m", engine="llamacpp", source="/models/m.gguf"),
        Model("m", engine="llamacpp", source="gpt2"),
        Model("m", engine="command", command=("x",)),
    ],
)
async def test_what_is_left_to_the_server(served: support.Hub, tmp_path: Path, model: Model) -> None:
    """Other revisions or caches, local files, what is no repository, other engines: nobody is asked."""
    assert await preparer(served, tmp_path).prepare(model, print) == Files()
    assert not served.requests


async def test_the_weights_that_vllm_loads(served: support.Hub, tmp_path: Path) -> None:
    """They lie in the cache where the hub's own library finds them, and vLLM is told which cache that is."""
    shards = {f"model-{n:05}-of-00002.safetensors": os.urandom(50_000) for n in (1, 2)}
    served.repos["org/big"] = {**shards, "config.json": b"{}", "pytorch_model.bin": b"old"}
    served.fault("model-00002-of-00002.safetensors").cut = [20_000]
    model = Model("m", engine="vllm", source="org/big")
    reports: list[Progress] = []
    mine = preparer(served, tmp_path)
    files = await mine.prepare(model, reports.append)
    assert files == Files(hub_cache=str(tmp_path / "hub"))
    assert reports[-1] == Progress(100_000, 100_000)
    made = VllmEngine({}, gpu=False).command(model, Placement("h", 1, (), 0, files))
    assert made.argv[:3] == ("vllm", "serve", "org/big")
    assert made.env["HF_HUB_CACHE"] == str(tmp_path / "hub")
    served.close()
    for name, weights in shards.items():
        found = huggingface_hub.try_to_load_from_cache("org/big", name, cache_dir=tmp_path / "hub")
        assert isinstance(found, str)
        assert read(found) == weights
    assert await mine.prepare(model, print) == files, "a swap needs no hub"


async def test_weights_that_the_hub_does_not_give(served: support.Hub, tmp_path: Path) -> None:
    """A gated repository, one that isn't there, no hub at all: vLLM shall try, and tells its own reason."""
    served.repos["org/gated"] = {"model.safetensors": b"x"}
    served.gated["org/gated"] = "hf_other"
    for repo in ("org/gated", "org/none"):
        model = Model("m", engine="vllm", source=repo)
        assert await preparer(served, tmp_path).prepare(model, print) == Files()
    served.close()
    assert await preparer(served, tmp_path).prepare(Model("m", engine="vllm", source="a/b"), print) == Files()


async def test_a_file_by_its_address(served: support.Hub, tmp_path: Path) -> None:
    """Size and ETag are asked for, a cut is resumed, and it is there for the next process without asking."""
    served.fault("/files/u-Q4_0.gguf").cut = [50_000]
    model = replace(LLAMA, source=f"{served.url}/files/u-Q4_0.gguf")
    reports: list[Progress] = []
    files = await preparer(served, tmp_path).prepare(model, reports.append)
    assert Path(files.model).name == "u-Q4_0.gguf"
    assert content(files) == CONTENT
    assert tmp_path in Path(files.model).parents
    assert reports[-1] == Progress(len(CONTENT), len(CONTENT))
    assert served.served["/files/u-Q4_0.gguf"] == len(CONTENT)
    asked = len(served.requests)
    assert await preparer(served, tmp_path).prepare(model, print) == files
    assert len(served.requests) == asked


async def test_an_address_that_gives_nothing(served: support.Hub, tmp_path: Path) -> None:
    """A missing file and a server that isn't there, in words without the address."""
    for url, match in (
        (f"{served.url}/files/none.gguf", "none.gguf can't be downloaded: its server answers 404"),
        ("http://127.0.0.1:9/u.gguf", "u.gguf can't be downloaded: its server can't be reached"),
    ):
        with pytest.raises(HubFailed, match=match) as caught:
            await preparer(served, tmp_path).prepare(replace(LLAMA, source=url), print)
        assert "127.0.0.1" not in str(caught.value)


def test_the_parts_of_a_split_address() -> None:
    """Their numbers are in the name; a query stays."""
    assert addresses.parts("https://h/a/m.gguf?x=1") == ["https://h/a/m.gguf?x=1"]
    assert addresses.parts("https://h/m-00002-of-00003.gguf?x=1") == [
        f"https://h/m-0000{n}-of-00003.gguf?x=1" for n in (1, 2, 3)
    ]


async def test_the_token_goes_to_the_hub_alone(served: support.Hub, tmp_path: Path) -> None:
    """An address of the hub gets it, another one doesn't."""
    hub = client.Hub(Cache.at(tmp_path), {"HF_ENDPOINT": served.url, "HF_TOKEN": "hf_secret"})
    assert hub.headers_for(f"{served.url}/org/m/resolve/main/m.gguf") == {"Authorization": "Bearer hf_secret"}
    assert hub.headers_for("https://elsewhere/m.gguf") == {}


async def test_two_callers_of_one_file(served: support.Hub, tmp_path: Path) -> None:
    """One transfer; when one caller leaves the other still gets the file; when both leave it stops."""
    fault = served.fault(PARTS[0])
    fault.hold_after = 50_000
    mine = preparer(served, tmp_path)
    others = [replace(LLAMA, name=f"m{n}", env={"N": str(n)}) for n in range(2)]
    tasks = [asyncio.create_task(mine.prepare(model, print)) for model in others]
    partial = tmp_path / "hub" / "models--org--m-GGUF" / "blobs"
    await asyncio.to_thread(wait_for, lambda: list(partial.glob("*.incomplete")), "the transfer")
    await asyncio.to_thread(wait_for, lambda: served.served.get(PARTS[0]) == 50_000, "a part")
    tasks[0].cancel()
    await asyncio.wait({tasks[0]})
    fault.go.set()
    assert content(await tasks[1]) == CONTENT
    assert served.served[PARTS[0]] == len(CONTENT)


async def test_a_disk_that_does_not_answer(
    served: support.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hung or odd file system fails this start, in words, and not the service."""
    mine = preparer(served, tmp_path)
    await mine.prepare(LLAMA, print)
    monkeypatch.setattr(prepare, "_there", _hang)
    monkeypatch.setattr(prepare, "_DISK", 0.05)
    with pytest.raises(HubFailed, match="the hub's cache can't be used"):
        await mine.prepare(LLAMA, print)


def _hang(paths: object) -> bool:
    return not threading.Event().wait(5)


async def test_nobody_waits_any_more(served: support.Hub, tmp_path: Path) -> None:
    """The caller is free at once, the thread ends by itself, and the next caller goes on from there."""
    fault = served.fault(PARTS[0])
    fault.hold_after = 50_000
    mine = preparer(served, tmp_path)
    task = asyncio.create_task(mine.prepare(LLAMA, print))
    await asyncio.to_thread(wait_for, lambda: served.served.get(PARTS[0]) == 50_000, "a part")
    task.cancel()
    await asyncio.wait({task}, timeout=1)
    assert task.cancelled()
    again = asyncio.create_task(mine.prepare(LLAMA, print))
    fault.go.set()
    assert content(await again) == CONTENT
    resumed = [asked for _, path, asked in served.requests if path.endswith(PARTS[0]) and asked]
    assert resumed, "it was begun anew"


async def test_without_the_hub_the_cache_must_have_all(served: support.Hub, tmp_path: Path) -> None:
    """All there: it starts. A part missing, or the quantization: the hub's own reason is told."""
    await preparer(served, tmp_path).prepare(LLAMA, print)
    served.close()
    assert (await preparer(served, tmp_path).prepare(LLAMA, print)).model.endswith(PARTS[0])
    for source in (f"{REPO}:Q2_K", f"{REPO}/x/y-Q2_K.gguf"):
        with pytest.raises(HubFailed, match="the hub can't be reached"):
            await preparer(served, tmp_path).prepare(replace(LLAMA, source=source), print)
    (snapshot(served, tmp_path) / PARTS[1]).unlink()
    with pytest.raises(HubFailed, match="the hub can't be reached"):
        await preparer(served, tmp_path).prepare(LLAMA, print)
