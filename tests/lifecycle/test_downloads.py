"""Models whose GGUF files are on a hub of our own, in the real service: one transfer, resumed, checked."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lifecycle.harness import Admission, Service
from tests.support.gateway import wait_for
from tests.support.hub import Hub
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
CONTENT = os.urandom(3_000_000)
FILE = "m-Q4_K_M.gguf"
REPO = "org/m-GGUF"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that HF_ENDPOINT names."""
    hub = Hub()
    hub.repos[REPO] = {FILE: CONTENT, "m-Q8_0.gguf": b"other", "README.md": b"# m"}
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with hub.running():
        yield hub


class Rig:
    """The service with models on the hub, and where its files are."""

    def __init__(self, folder: Path, *sources: str, **keys: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.starts = folder, folder / "starts"
        program = folder / "llama-server"
        program.write_text(
            f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec {sys.executable} -m tests.lifecycle.llama_server "$@"\n'
        )
        program.chmod(0o755)
        extra = ["--sha256", hashlib.sha256(CONTENT).hexdigest(), "--starts", str(self.starts)]
        shape = {
            "engine": "llamacpp",
            "executable": str(program),
            "extra_args": extra,
            "vram": "1GiB",
            **keys,
        }
        models = {f"m{n}": {**shape, "source": source} for n, source in enumerate(sources)}
        cards = [{"id": f"gpu{n}", "memory": "24GiB", "budget": 1} for n in range(len(sources))]
        self.service = Service(folder, models, hf_cache=str(folder / "cache"), devices=cards)

    def begun(self) -> list[Path]:
        """The file that each start was given."""
        return [Path(line) for line in self.starts.read_text().split()] if self.starts.exists() else []

    def partial(self) -> int:
        """Bytes that an unfinished download has left."""
        return sum(path.stat().st_size for path in (self.folder / "cache").rglob("*.incomplete"))

    async def model(self, name: str = "m0") -> pb.ModelStatus:
        return next(one for one in (await self.service.status()).models if one.model == name)

    async def events(self, *kinds: str) -> list[tuple[str, str]]:
        """Those of the kinds so far."""
        found = []
        async with self.service.stub() as stub, asyncio.timeout(10):
            call = stub.WatchEvents(pb.WatchEventsRequest(last=1000), timeout=10)
            async for response in call:
                event = response.event
                found += [(event.kind, event.message)] if event.kind in kinds else []
                if event.kind in ("ready", "start_failed", "gone"):
                    call.cancel()
                    return found
        raise AssertionError(found)


def ranges(hub: Hub) -> list[str]:
    """What transfers of content asked for, in order."""
    return [asked for method, path, asked in hub.requests if method == "GET" and path.startswith("/far/")]


def told(admission: Admission, name: str = "m0") -> str:
    """What admission was told of a model in words."""
    return admission.models[name].message if name in admission.models else ""


def why(admission: Admission, name: str) -> str:
    """Why its start failed, if that was told."""
    failed = name in admission.models and admission.models[name].reason == pb.REASON_START_FAILED
    return told(admission, name) if failed else ""


async def until(condition: Any, what: str) -> None:
    await asyncio.to_thread(wait_for, condition, what)


@pytest.fixture
async def running() -> AsyncIterator[list[Rig]]:
    """Services that are stopped at the end, their servers with them."""
    rigs: list[Rig] = []
    yield rigs
    for rig in rigs:
        if rig.service.process is not None:
            await rig.service.stop()


async def test_one_transfer_for_all_who_want_it(hub: Hub, tmp_path: Path, running: list[Rig]) -> None:
    """Two models with one file, 20 callers each, two cuts: every byte is sent once, and checked."""
    hub.fault(FILE).cut = [1_000_000, 500_000]
    rig = Rig(tmp_path, REPO, f"{REPO}/{FILE}")
    running.append(rig)
    await rig.service.start()
    async with Admission(rig.service).connected() as admission:
        admission.say(m0=20, m1=20)
        await asyncio.gather(admission.ready("m0"), admission.ready("m1"))
    assert hub.served[FILE] == len(CONTENT)
    assert [
        asked for method, path, asked in hub.requests if method == "GET" and path.startswith("/far/")
    ] == [*("", "bytes=1000000-", "bytes=1500000-")]
    commit = tmp_path / "cache" / "hub" / "models--org--m-GGUF" / "snapshots" / hub.commit(REPO)
    assert rig.begun() == [commit / FILE] * 2
    assert not hub.leaked


async def test_progress_is_told(hub: Hub, tmp_path: Path, running: list[Rig]) -> None:
    """While it comes: bytes in the status, words for callers; a tenth at a time in the events."""
    fault = hub.fault(FILE)
    fault.hold_after = 1_500_000
    rig = Rig(tmp_path, REPO)
    running.append(rig)
    await rig.service.start()
    async with Admission(rig.service).connected() as admission:
        admission.say(m0=1)
        await admission.until(lambda: "50 % of 2.9 MiB" in told(admission))
        status = await rig.model()
        assert (status.download.done_bytes, status.download.total_bytes) == (1_500_000, len(CONTENT))
        assert status.download.bytes_per_second > 0
        assert status.state == pb.MODEL_STATE_LOADING
        assert status.message.startswith("its files are being downloaded: 50 % of 2.9 MiB")
        assert not rig.begun()
        fault.go.set()
        await admission.ready("m0")
    assert not (await rig.model()).HasField("download")
    kinds = await rig.events("starting", "download_started", "downloading", "downloaded")
    assert [kind for kind, _ in kinds][:2] == ["starting", "download_started"]
    assert kinds[1][1] == "0 % of 2.9 MiB"
    assert ("downloading", "50 %") in [(kind, text[:4]) for kind, text in kinds]
    assert kinds[-1][0] == "downloaded"


async def test_a_killed_service_goes_on_where_it_was(hub: Hub, tmp_path: Path, running: list[Rig]) -> None:
    """kill -9 in mid-download: the next process asks for the rest alone."""
    fault = hub.fault(FILE)
    fault.hold_after = 1_000_000
    rig = Rig(tmp_path, REPO)
    running.append(rig)
    await rig.service.start()
    async with Admission(rig.service).connected() as admission:
        admission.say(m0=1)
        await until(lambda: rig.partial() >= 900_000, "a part of the file")
        await rig.service.kill()
    kept = rig.partial()
    fault.go.set()
    await rig.service.start()
    async with Admission(rig.service, incarnation=8).connected() as admission:
        admission.say(m0=1)
        await admission.ready("m0")
    assert ranges(hub) == ["", f"bytes={kept}-"]
    assert rig.partial() == 0


async def test_an_unload_ends_the_download(hub: Hub, tmp_path: Path, running: list[Rig]) -> None:
    """The start is given up at once, nothing is launched; a later start goes on with what came."""
    fault = hub.fault(FILE)
    fault.hold_after = 1_000_000
    rig = Rig(tmp_path, REPO)
    running.append(rig)
    await rig.service.start()
    async with Admission(rig.service).connected() as admission, rig.service.stub() as stub:
        await stub.LoadModel(pb.LoadModelRequest(model="m0"), timeout=5)
        await until(lambda: rig.partial() >= 900_000, "a part of the file")
        await stub.UnloadModel(pb.UnloadModelRequest(model="m0"), timeout=5)
        await admission.gone("m0", 5)
        assert not rig.begun()
        kept = rig.partial()
        fault.go.set()
        await stub.LoadModel(pb.LoadModelRequest(model="m0"), timeout=5)
        await admission.ready("m0")
    assert [asked for asked in ranges(hub) if asked] == [f"bytes={kept}-"]


async def test_a_stopping_service_does_not_wait_for_a_download(
    hub: Hub, tmp_path: Path, running: list[Rig]
) -> None:
    """SIGTERM in mid-download: it is gone at once, with status 0, and the part is kept."""
    hub.fault(FILE).hold_after = 1_000_000
    rig = Rig(tmp_path, REPO)
    running.append(rig)
    await rig.service.start()
    async with Admission(rig.service).connected() as admission:
        admission.say(m0=1)
        await until(lambda: rig.partial() >= 900_000, "a part of the file")
        assert await asyncio.wait_for(rig.service.stop(), 6) == 0
    assert rig.partial() >= 900_000


async def test_wrong_bytes_are_refused(hub: Hub, tmp_path: Path, running: list[Rig]) -> None:
    """A file that isn't what the hub announced never reaches a server; callers are told; then it works."""
    hub.fault(FILE).wrong = 1
    rig = Rig(tmp_path, REPO)
    running.append(rig)
    await rig.service.start()
    async with Admission(rig.service).connected() as admission:
        admission.say(m0=1)
        words = await admission.until(lambda: why(admission, "m0"))
        assert "m-Q4_K_M.gguf of org/m-GGUF isn't what was announced (it has another SHA-256)" in words
        assert not rig.begun()
        assert rig.partial() == 0
        await admission.ready("m0")
    assert len(rig.begun()) == 1


async def test_a_gated_model_asks_for_a_token(hub: Hub, tmp_path: Path, running: list[Rig]) -> None:
    """Without one its start fails with what to do; the model's own environment may give it."""
    hub.gated[REPO] = "hf_the_right_one"
    rig = Rig(tmp_path / "a", REPO)
    running.append(rig)
    await rig.service.start()
    async with Admission(rig.service).connected() as admission:
        admission.say(m0=1)
        words = await admission.until(lambda: why(admission, "m0"))
        assert "set HF_TOKEN in the service's environment" in words
    other = Rig(tmp_path / "b", REPO, env={"HF_TOKEN": "hf_the_right_one"})
    running.append(other)
    await other.service.start()
    async with Admission(other.service).connected() as admission:
        admission.say(m0=1)
        await admission.ready("m0")
    assert not hub.leaked, "the token is shown to the hub alone"
    assert "hf_the_right_one" not in other.service.log.read_text()


async def test_what_is_there_needs_no_hub(hub: Hub, tmp_path: Path, running: list[Rig]) -> None:
    """After a restart without a hub the model starts from the cache; one that isn't there says why."""
    rig = Rig(tmp_path, REPO, f"{REPO}:Q8_0")
    running.append(rig)
    await rig.service.start()
    async with Admission(rig.service).connected() as admission:
        admission.say(m0=1)
        await admission.ready("m0")
        await rig.service.stop()
    hub.close()
    await rig.service.start()
    async with Admission(rig.service, incarnation=8).connected() as admission:
        admission.say(m0=1, m1=1)
        await admission.ready("m0")
        words = await admission.until(lambda: why(admission, "m1"))
        assert "the hub can't be reached" in words
