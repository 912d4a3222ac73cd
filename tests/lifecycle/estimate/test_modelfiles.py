"""Models' files where they lie: folders, GGUF files, the hub's cache, a hub, an address."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lifecycle.estimate import published as p
from tests.support import hub as support
from tests.support.gguf import LLAMA, header
from tidegate_lifecycle import modelfiles as module
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.estimate.shape import UnknownError
from tidegate_lifecycle.hub import client
from tidegate_lifecycle.hub.cache import Cache
from tidegate_lifecycle.modelfiles import LaterError, ModelFiles

GGUF = header({**LLAMA, "tokenizer.ggml.tokens": ["word"] * 1000})
REPO = "org/model"


def tensors(size: int, dtype: str = "BF16") -> bytes:
    """A safetensors file of one tensor."""
    table = json.dumps({"__metadata__": {}, "w": {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}})
    return struct.pack("<Q", len(table)) + table.encode() + bytes(size)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def repository(config: dict[str, Any] = p.LLAMA_3_8B) -> dict[str, bytes]:
    """A model in two files, with its index, and copies that nobody loads."""
    index = {
        "metadata": {"total_size": 7},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "model-00001-of-00002.safetensors": tensors(3000),
        "model-00002-of-00002.safetensors": tensors(1000),
        "model.fp16.safetensors": bytes(777),
        "consolidated.00.pth": bytes(888),
    }


def vllm(source: str | Path, **keys: Any) -> Model:
    return Model("m", engine="vllm", source=str(source), **keys)


def llama(source: str | Path, **keys: Any) -> Model:
    return Model("m", engine="llamacpp", source=str(source), **keys)


@pytest.fixture
def reader(tmp_path: Path) -> ModelFiles:
    """Without a hub, in a folder of its own."""
    return ModelFiles(Cache.at(tmp_path / "hf"), tmp_path, {"HF_HUB_OFFLINE": "1"})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[support.Hub]:
    """A hub with one repository."""
    monkeypatch.setattr(client, "RETRIES", (0.01,))
    hub = support.Hub()
    hub.repos[REPO] = repository()
    with hub.running():
        yield hub


def at(served: support.Hub, folder: Path, **environ: str) -> ModelFiles:
    return ModelFiles(Cache.at(folder / "hf"), folder, {"HF_ENDPOINT": served.url, **environ})


def size_of(files: dict[str, bytes], suffix: str) -> int:
    return sum(len(content) for name, content in files.items() if name.endswith(suffix))


async def test_a_folder_is_read_by_its_index(reader: ModelFiles, tmp_path: Path) -> None:
    """Config, and the files that the index names; relative to the configuration's folder."""
    files = repository()
    write(tmp_path / "models/a", files)
    shape = await reader.shape(vllm("./models/a"))
    assert shape.weights == size_of(files, "-of-00002.safetensors")
    assert (shape.layers, shape.kv_heads, shape.native_length) == (32, 8, 8192)


async def test_a_folder_with_a_single_file_and_links(reader: ModelFiles, tmp_path: Path) -> None:
    """No index; files are links, as in the hub's cache; the type of the weights is in their header."""
    config = {**p.LLAMA_3_8B, "torch_dtype": None}
    blobs = write(tmp_path / "blobs", {"x": tensors(5000, "F32"), "y": json.dumps(config).encode()})
    folder = tmp_path / "snapshot"
    folder.mkdir()
    os.symlink(blobs / "x", folder / "model.safetensors")
    os.symlink(blobs / "y", folder / "config.json")
    shape = await reader.shape(vllm(folder))
    assert shape.weights == len(tensors(5000, "F32")) // 2


async def test_old_weights_count_when_there_are_no_others(reader: ModelFiles, tmp_path: Path) -> None:
    """pytorch_model.bin, and nothing of the training."""
    files = {"pytorch_model.bin": bytes(99), "training_args.bin": bytes(50)}
    write(tmp_path / "m", {"config.json": json.dumps(p.LLAMA_3_8B).encode(), **files})
    assert (await reader.shape(vllm(tmp_path / "m"))).weights == 99


async def test_a_gguf_file_and_one_in_parts(reader: ModelFiles, tmp_path: Path) -> None:
    """The first part has the header, all of them the weights."""
    parts = {"big-00001-of-00002.gguf": GGUF + bytes(500), "big-00002-of-00002.gguf": bytes(300)}
    write(tmp_path, {"small.gguf": GGUF + bytes(100), **parts})
    small = await reader.shape(llama("small.gguf"))
    assert (small.weights, small.layers, small.native_length) == (len(GGUF) + 100, 32, 8192)
    big = await reader.shape(vllm(tmp_path / "big-00001-of-00002.gguf"))
    assert big.weights == len(GGUF) + 800


async def test_a_path_in_a_container_is_looked_up_through_its_volumes(
    reader: ModelFiles, tmp_path: Path
) -> None:
    """The innermost mount counts; where only the container sees it, that is said."""
    write(tmp_path / "disk/deep", {"m.gguf": GGUF})
    volumes = ("./nothing:/models", f"{tmp_path}/disk:/models/in:ro", "data:/named")
    keys: dict[str, Any] = {"image": "img", "volumes": volumes}
    assert (await reader.shape(llama("/models/in/deep/m.gguf", **keys))).weights == len(GGUF)
    for path, words in (
        ("/elsewhere/m.gguf", "lies in no folder of `volumes`: only the container sees it"),
        ("/named/m.gguf", "lies in the Docker volume data: only the container sees it"),
        ("/models/m.gguf", "nothing/m.gguf isn't there"),
    ):
        with pytest.raises(UnknownError, match=words):
            await reader.shape(llama(path, **keys))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "config.json isn't there"),
        ({"config.json": b"{"}, "config.json is no JSON"),
        ({"config.json": b"[]"}, "config.json is no JSON object"),
        ({"config.json": b"[" * 100_000}, "config.json is no JSON"),
        ({"config.json": b"{}"}, "it has no weights in safetensors or .bin files"),
        ({"config.json": b"{}", "model.safetensors": b"x"}, "isn't given"),
    ],
)
async def test_a_folder_that_tells_nothing(
    files: dict[str, bytes], words: str, reader: ModelFiles, tmp_path: Path
) -> None:
    """Why not, in words."""
    (tmp_path / "m").mkdir()
    with pytest.raises(UnknownError, match=words):
        await reader.shape(vllm(write(tmp_path / "m", files)))


async def test_files_that_cant_be_read(reader: ModelFiles, tmp_path: Path) -> None:
    """Not there, no GGUF, and a folder where a file is wanted."""
    write(tmp_path, {"x.gguf": b"PK", "d/y": b""})
    for model, words in (
        (llama("none.gguf"), "none.gguf isn't there"),
        (llama("x.gguf"), "ends within its header"),
        (llama(tmp_path / "d"), "is a folder; llama.cpp wants a GGUF file"),
    ):
        with pytest.raises(UnknownError, match=words):
            await reader.shape(model)


async def test_a_repository_of_the_hub_is_read_without_its_weights(
    served: support.Hub, tmp_path: Path
) -> None:
    """Sizes come from the listing, and two small files are fetched; later the cache tells the same."""
    reader = at(served, tmp_path)
    shape = await reader.shape(vllm(REPO))
    assert shape.weights == size_of(served.repos[REPO], "-of-00002.safetensors")
    assert shape.layers == 32
    assert not [path for path in served.served if path.endswith(".safetensors")]


async def test_a_gguf_of_the_hub_is_read_as_far_as_its_header(served: support.Hub, tmp_path: Path) -> None:
    """Of a large file the beginning; all parts count, and for llama.cpp what it needs to see images."""
    weights = bytes(40_000_000)
    served.repos["org/x-GGUF"] = {
        "x-Q4_K_M-00001-of-00002.gguf": GGUF + weights,
        "x-Q4_K_M-00002-of-00002.gguf": bytes(100),
        "x-Q8_0.gguf": bytes(50),
        "mmproj-F16.gguf": bytes(7000),
    }
    total = len(GGUF) + len(weights) + 100
    reader = at(served, tmp_path)
    assert (await reader.shape(vllm("org/x-GGUF:Q4_K_M"))).weights == total
    assert (await reader.shape(llama("org/x-GGUF"))).weights == total + 7000
    assert sum(served.served.values()) < 30_000_000


async def test_a_gguf_at_an_address(served: support.Hub, tmp_path: Path) -> None:
    """Its size as the server gives it."""
    served.plain["/files/m.gguf"] = GGUF + bytes(1000)
    shape = await at(served, tmp_path).shape(llama(f"{served.url}/files/m.gguf"))
    assert (shape.weights, shape.layers) == (len(GGUF) + 1000, 32)
    with pytest.raises(UnknownError, match="404"):
        await at(served, tmp_path).shape(llama(f"{served.url}/files/none.gguf"))


async def test_a_gated_repository_needs_the_token(served: support.Hub, tmp_path: Path) -> None:
    """Of the service, or of the model's environment."""
    served.gated[REPO] = "hf_secret"
    with pytest.raises(UnknownError, match="the service has no token"):
        await at(served, tmp_path).shape(vllm(REPO))
    assert (await at(served, tmp_path, HF_TOKEN="hf_secret").shape(vllm(REPO))).layers == 32
    other = at(served, tmp_path / "b")
    assert (await other.shape(vllm(REPO, env={"HF_TOKEN": "hf_secret"}))).layers == 32


async def test_a_hub_that_is_away_is_worth_another_try(served: support.Hub, tmp_path: Path) -> None:
    """And no guess; what the cache has is used."""
    known = at(served, tmp_path)
    await known.shape(vllm(REPO))
    served.close()
    with pytest.raises(LaterError, match="can't be reached"):
        await at(served, tmp_path / "b").shape(vllm(REPO))
    with pytest.raises(UnknownError):  # its weights aren't in the cache
        await known.shape(vllm(REPO))


async def test_a_snapshot_in_the_cache_tells_without_a_hub(reader: ModelFiles, tmp_path: Path) -> None:
    """As another program downloaded it."""
    repo = tmp_path / "hf/hub/models--org--model"
    write(repo, {"refs/main": b"c0ffee"})
    write(repo / "snapshots/c0ffee", repository())
    shape = await reader.shape(vllm(REPO))
    assert shape.weights == size_of(repository(), "-of-00002.safetensors")


async def test_a_disk_that_hangs_costs_the_deadline_alone(
    reader: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes on, and the reason is said."""
    os.mkfifo(tmp_path / "m.gguf")  # whoever opens it waits for a writer
    monkeypatch.setattr(module, "DEADLINE", 0.05)
    with pytest.raises(LaterError, match="took more than"):
        await reader.shape(llama("m.gguf"))
    with (tmp_path / "m.gguf").open("wb"):  # lets the thread end
        pass
