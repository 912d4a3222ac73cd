"""The hub's client against a hub of our own: listings, small files, and errors that say what to do."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hub as support
from tests.support.gateway import wait_for
from tidegate_lifecycle.hub import client as module
from tidegate_lifecycle.hub.cache import Cache, RepoFile
from tidegate_lifecycle.hub.client import Hub
from tidegate_lifecycle.hub.words import HubFailed, Missing, Refused, Unreachable, Unwritable

REPO = "org/model"
CONFIG = json.dumps({"num_hidden_layers": 2}).encode()
WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[support.Hub]:
    """A hub with one repository."""
    monkeypatch.setattr(module, "RETRIES", (0.01, 0.01))
    hub = support.Hub()
    hub.repos[REPO] = {"config.json": CONFIG, "sub/model.safetensors": WEIGHTS}
    with hub.running():
        yield hub


def client(served: support.Hub, folder: Path, **environ: str) -> Hub:
    return Hub(Cache.at(folder), {"HF_ENDPOINT": served.url + "/", **environ})


async def test_a_repository_is_listed_with_sizes_and_hashes(served: support.Hub, tmp_path: Path) -> None:
    """One request gives the commit and every file's size; the address is HF_ENDPOINT's."""
    listing = await client(served, tmp_path).listing(REPO)
    assert listing.commit == served.commit(REPO)
    assert not listing.cached
    assert listing.find("config.json") == RepoFile("config.json", len(CONFIG))
    found = listing.find("sub/model.safetensors")
    assert found is not None
    assert found.size == len(WEIGHTS)
    assert len(found.sha256) == 64
    assert len(served.requests) == 1


async def test_a_small_file_is_read_and_kept(served: support.Hub, tmp_path: Path) -> None:
    """config.json comes from the hub once; when that is gone, from the cache, and so does the listing."""
    hub = client(served, tmp_path)
    assert await hub.read(REPO, "config.json") == CONFIG
    assert await hub.read(REPO, "config.json") == CONFIG
    assert served.transfers("config.json") == 1
    served.close()
    assert await hub.read(REPO, "config.json") == CONFIG
    listing = await hub.listing(REPO)
    assert listing.cached
    assert listing.files == (RepoFile("config.json", len(CONFIG)),)


async def test_nothing_is_asked_when_told_to_stay_offline(served: support.Hub, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE: what the cache holds is there, the rest is refused in words, without a request."""
    await client(served, tmp_path).read(REPO, "config.json")
    before = len(served.requests)
    offline = client(served, tmp_path, HF_HUB_OFFLINE="1")
    assert await offline.read(REPO, "config.json") == CONFIG
    assert (await offline.listing(REPO)).cached
    with pytest.raises(Unreachable, match="org/other is not in the cache and HF_HUB_OFFLINE is set"):
        await offline.listing("org/other")
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE is set"):
        await offline.read(REPO, "tokenizer.json")
    assert len(served.requests) == before


async def test_a_hub_in_trouble_is_asked_again(served: support.Hub, tmp_path: Path) -> None:
    """A 503 is no failure until it has stayed; then the words name it."""
    hub = client(served, tmp_path)
    served.fault("api").statuses = [503, 502]
    assert (await hub.listing(REPO)).find("config.json")
    served.fault("api").statuses = [503, 503, 503]
    with pytest.raises(Unreachable, match="it answers 503"):
        await hub.listing(REPO)
    served.fault("api").statuses = [429, 429, 429]
    with pytest.raises(Unreachable, match="limits the number of requests"):
        await hub.listing(REPO)


async def test_a_gated_repository_asks_for_the_token(served: support.Hub, tmp_path: Path) -> None:
    """Without a token, with a wrong one, with the right one: each in words, none with the token in them."""
    served.gated[REPO] = "hf_right_token"
    with pytest.raises(Refused, match=r"gated or private and the service has no token.*HF_TOKEN"):
        await client(served, tmp_path).read(REPO, "config.json")
    with pytest.raises(Refused, match="refuses org/model to the service's token") as caught:
        await client(served, tmp_path, HF_TOKEN="hf_wrong_token").read(REPO, "config.json")
    assert "hf_wrong" not in str(caught.value)
    right = client(served, tmp_path, HF_TOKEN="hf_right_token")
    assert await right.read(REPO, "config.json") == CONFIG
    remote = await right.remote(await right.listing(REPO), "sub/model.safetensors")
    assert (remote.size, len(remote.etag)) == (len(WEIGHTS), 64)


async def test_what_is_not_there_is_named(served: support.Hub, tmp_path: Path) -> None:
    """A repository or a file that doesn't exist; a name that can't be one; no address shows."""
    hub = client(served, tmp_path)
    for attempt, match in (
        (hub.listing("org/none"), "the hub has no repository org/none"),
        (hub.listing("a/b/c"), "the hub has no repository a/b/c"),
        (hub.read(REPO, "none.json"), "org/model has no file none.json"),
    ):
        with pytest.raises(Missing, match=match) as caught:
            await attempt
        assert "127.0.0.1" not in str(caught.value)


async def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens: the words say what to check."""
    monkeypatch.setattr(module, "RETRIES", (0.01,))
    hub = Hub(Cache.at(tmp_path), {"HF_ENDPOINT": "http://127.0.0.1:9"})
    with pytest.raises(Unreachable, match="check the network and HF_ENDPOINT"):
        await hub.listing(REPO)


async def test_a_hub_that_hangs(served: support.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline holds whatever the hub does, and the cache answers if it can."""
    hub = client(served, tmp_path)
    assert await hub.read(REPO, "config.json") == CONFIG
    monkeypatch.setattr(module, "DEADLINE", 0.3)
    held = served.fault("config.json")
    held.hold_after = 0
    with pytest.raises(Unreachable, match="can't be reached"):
        await client(served, tmp_path / "other").read(REPO, "config.json")
    held.go.set()
    monkeypatch.setattr(module, "within", _never)
    assert (await hub.listing(REPO)).cached


async def _never(deadline: float, function: object, name: str) -> None:
    raise TimeoutError


async def test_a_cache_that_cannot_be_written(served: support.Hub, tmp_path: Path) -> None:
    """A cache folder that is a file: the words name the setting, not the path."""
    (tmp_path / "hub").write_text("")
    with pytest.raises(HubFailed) as caught:
        await client(served, tmp_path).read(REPO, "config.json")
    assert isinstance(caught.value, Unwritable)
    assert "lifecycle.hf_cache" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


async def test_an_answer_that_is_none_of_a_hub(served: support.Hub, tmp_path: Path) -> None:
    """A portal that answers everything with a page; an ETag that would be a path: in words, no crash."""
    served.plain[f"/api/models/{REPO}/revision/main"] = b"<html>log in</html>"
    hub = client(served, tmp_path)
    with pytest.raises(HubFailed, match="what the hub answers for org/model can't be read"):
        await hub.listing(REPO)
    del served.plain[f"/api/models/{REPO}/revision/main"]
    served.fault("sub/model.safetensors").etag = "../../evil"
    with pytest.raises(HubFailed, match=r"gives no ETag for sub/model\.safetensors"):
        await hub.remote(await hub.listing(REPO), "sub/model.safetensors")


async def test_the_event_loop_is_never_blocked(served: support.Hub, tmp_path: Path) -> None:
    """While the hub takes its time, other tasks run."""
    held = served.fault("config.json")
    held.hold_after = 0
    reading = asyncio.create_task(client(served, tmp_path).read(REPO, "config.json"))
    await asyncio.to_thread(wait_for, lambda: served.transfers("config.json"), "the transfer")
    assert not reading.done()
    held.go.set()
    assert await reading == CONFIG


def test_the_library_is_loaded_when_a_model_needs_it() -> None:
    """Half a second of imports that a service without hub models never pays."""
    code = "import sys, tidegate_lifecycle.__main__, tidegate_lifecycle.hub.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"huggingface_hub", "httpx2"} & set(done.stdout.split())


def test_the_cache_is_where_the_library_looks(tmp_path: Path) -> None:
    """HF_HUB_CACHE before HF_HOME before XDG_CACHE_HOME."""
    assert Cache.of({"XDG_CACHE_HOME": "/x"}) == Cache(Path("/x/huggingface"), Path("/x/huggingface/hub"))
    assert Cache.of({"XDG_CACHE_HOME": "/x", "HF_HOME": "/h"}).hub == Path("/h/hub")
    assert Cache.of({"HF_HOME": "/h", "HF_HUB_CACHE": "/c"}) == Cache(Path("/h"), Path("/c"))
