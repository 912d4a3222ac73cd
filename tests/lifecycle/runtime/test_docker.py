"""Containers on the real engine: how they are made, and what others do to them; networks, images, mounts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncGenerator, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import containers
from tidegate_chassis.config import ConfigError
from tidegate_lifecycle.runtimes.base import StartFailed
from tidegate_lifecycle.runtimes.docker import place
from tidegate_lifecycle.runtimes.docker.container import HUB_FOLDER, DockerOptions, Limits
from tidegate_lifecycle.runtimes.docker.images import follow
from tidegate_lifecycle.runtimes.docker.runtime import DockerRuntime

from .conftest import eventually, in_time
from .kinds import SDK_SOCKETS, DockerKind

pytestmark = [pytest.mark.docker, SDK_SOCKETS]

SLEEP = "import time; print('up'); time.sleep(600)"


@pytest.fixture
def kind(tmp_path: Path) -> Generator[DockerKind]:
    """A data directory and a network's name; nothing of it is left."""
    made = DockerKind(tmp_path)
    yield made
    made.clean()


@pytest.fixture
async def runtime(kind: DockerKind) -> AsyncGenerator[DockerRuntime]:
    """An open runtime; what it started is ended."""
    async with opened(kind) as made:
        yield made


@contextlib.asynccontextmanager
async def opened(kind: DockerKind, **keywords: Any) -> AsyncGenerator[DockerRuntime]:
    made = DockerRuntime(kind.data_dir, kind.options, os.environ, kind.patience, **keywords)
    await made.open()
    await made.list()
    try:
        yield made
    finally:
        await asyncio.gather(*(made.stop(server, 0) for server in await made.list()))
        await made.close()


def inspected(instance_id: str) -> dict[str, Any]:
    """The one container of an instance, as Docker tells it."""
    (found,) = containers.bearing(instance=instance_id)
    with containers.engine() as client:
        data: dict[str, Any] = client.inspect_container(found["Id"])
        return data


def created(image: str = containers.PYTHON, **keywords: Any) -> str:
    """A container that somebody else made, running."""
    with containers.engine() as client:
        command = ["python3", "-c", SLEEP]
        host = client.create_host_config(**keywords.pop("host", {}))
        made = client.create_container(image, command, host_config=host, **keywords)
        client.start(made["Id"])
        return str(made["Id"])


def status(container_id: str) -> str:
    """What Docker says of it."""
    with containers.engine() as client:
        data = client.inspect_container(container_id)
        return str(data["State"]["Status"])


async def test_a_container_has_little_privilege_its_limits_and_no_secret_in_its_labels(
    tmp_path: Path, kind: DockerKind
) -> None:
    """No capability, no new privileges, no published port; limits, cards by UUID, hub's cache; no secret but
    in the environment."""
    cache = tmp_path / "hub"
    limits = Limits(shm_bytes=96 << 20, memory_bytes=300 << 20, cpus=0.5, pids=77)
    kind.options = DockerOptions(kind.network, "never", limits, cache)
    environ = {**os.environ, "HF_ENDPOINT": "http://hub", "AWS_SECRET": "no", "https_proxy": "http://p"}
    runtime = DockerRuntime(kind.data_dir, kind.options, environ)
    await runtime.open()
    (tmp_path / "weights").mkdir()
    wanted = replace(
        kind.spec(SLEEP),
        env={"HF_TOKEN": "hf_s3cret"},
        hub=True,
        cards=("GPU-1", "GPU-2"),
        volumes=("./weights:/weights:ro",),
    )
    server = await runtime.start(wanted)
    data = await asyncio.to_thread(inspected, server.instance_id)
    host, config = data["HostConfig"], data["Config"]
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Init"] is True
    assert not host["Privileged"]
    assert (host["Memory"], host["MemorySwap"], host["NanoCpus"]) == (300 << 20, 300 << 20, 500_000_000)
    assert (host["PidsLimit"], host["ShmSize"]) == (77, 96 << 20)
    assert (host["RestartPolicy"]["Name"], host["AutoRemove"]) == ("no", False)
    assert host["NetworkMode"] == kind.network
    assert not host["PortBindings"]
    assert not host["PublishAllPorts"]
    assert host["DeviceRequests"][0]["DeviceIDs"] == ["GPU-1", "GPU-2"]
    assert host["DeviceRequests"][0]["Capabilities"] == [["gpu"]]
    mounts = {one["Destination"]: (one["Source"], one["RW"]) for one in data["Mounts"]}
    assert mounts == {HUB_FOLDER: (str(cache), True), "/weights": (str(tmp_path / "weights"), False)}
    assert "s3cret" not in str(config["Labels"]) + str(config["Cmd"]) + data["Name"]
    env = dict(text.split("=", 1) for text in config["Env"])
    assert (env["HF_TOKEN"], env["HF_ENDPOINT"], env["HF_HOME"]) == ("hf_s3cret", "http://hub", HUB_FOLDER)
    assert env["https_proxy"] == "http://p"
    assert "AWS_SECRET" not in env
    await runtime.stop(server, 0)
    plain = await runtime.start(replace(kind.spec(SLEEP), env={}))
    data = await asyncio.to_thread(inspected, plain.instance_id)
    assert not data["HostConfig"]["DeviceRequests"]
    assert "HF_ENDPOINT" not in str(data["Config"]["Env"])
    await runtime.stop(plain, 0)
    await runtime.close()


async def test_a_server_is_reached_by_its_address_on_the_private_network(
    kind: DockerKind, runtime: DockerRuntime
) -> None:
    """It listens on every address inside; from here its own address and port answer."""
    host, port = await runtime.endpoint()
    program = f"import http.server as h; h.test(h.SimpleHTTPRequestHandler, port={port}, bind={host!r})"
    server = await runtime.start(kind.spec(program))

    address = httpx.URL(server.address)

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((address.host, address.port or 0), 1):
            return True
        return False

    await eventually(answers)


async def test_the_end_of_a_container_by_others_hands_is_seen_with_its_cause(
    kind: DockerKind, runtime: DockerRuntime
) -> None:
    """Killed, removed, out of memory, by its own exit: each is told in its words within two seconds."""
    killed, removed, stopped = await asyncio.gather(*(runtime.start(kind.spec(SLEEP)) for _ in range(3)))
    await asyncio.to_thread(kind.kill, killed)
    assert await in_time(killed.exited(), 2) == "signal 9"
    (found,) = await asyncio.to_thread(lambda: containers.bearing(instance=removed.instance_id))
    await asyncio.to_thread(containers.remove, found["Id"])
    assert await in_time(removed.exited(), 2) == "removed by hand"
    await runtime.stop(removed, 5)
    greedy = "x = b''\nwhile True: x += b'x' * (8 << 20)"
    hungry = await runtime.start(kind.spec(greedy))
    assert await in_time(hungry.exited(), 20) == "killed: out of memory"
    (left,) = await runtime.list()
    assert left is stopped


async def test_strangers_are_never_touched(kind: DockerKind, runtime: DockerRuntime) -> None:
    """Containers without our label, or with another installation's, outlive every list, look and stop."""
    labels = {containers.OWNER: "another", containers.INSTANCE: "x"}
    strangers = await asyncio.to_thread(lambda: [created(), created(labels=labels)])
    try:
        server = await runtime.start(kind.spec(SLEEP))
        assert await runtime.list() == [server]
        await runtime._look()
        await runtime.stop(server, 0)
        assert [await asyncio.to_thread(status, one) for one in strangers] == ["running", "running"]
    finally:
        for one in strangers:
            await asyncio.to_thread(containers.remove, one)


async def test_an_orphan_of_ours_is_removed(kind: DockerKind, runtime: DockerRuntime) -> None:
    """What bears our label and was started by nobody here goes, and soon."""
    labels = {containers.OWNER: kind.owner, containers.INSTANCE: "late"}
    await asyncio.to_thread(lambda: created(labels=labels))
    await eventually(lambda: not containers.bearing(owner=kind.owner))


async def test_a_name_that_is_taken_is_made_anew(kind: DockerKind) -> None:
    """A stranger may have the very name: another one is taken, his container stays."""
    wanted = kind.spec(SLEEP)
    given = iter(["aaaaaa", "bbbbbb"])
    name = f"tidegate-{wanted.instance_id.replace('/', '-').replace(':', '-')}-aaaaaa"
    stranger = await asyncio.to_thread(lambda: created(name=name))
    try:
        async with opened(kind, random=lambda: next(given)) as runtime:
            await runtime.start(wanted)
            data = await asyncio.to_thread(inspected, wanted.instance_id)
            assert data["Name"].endswith("-bbbbbb")
            assert await asyncio.to_thread(status, stranger) == "running"
    finally:
        await asyncio.to_thread(containers.remove, stranger)


# Networks


def networks(name: str) -> list[dict[str, Any]]:
    with containers.engine() as client:
        return [one for one in client.networks(names=[name]) if one["Name"] == name]


async def test_a_network_is_made_used_made_again_and_removed(kind: DockerKind) -> None:
    """Made before serving; removed by hand, a start makes it anew; unused at the end, it goes."""
    async with opened(kind) as runtime:
        (made,) = await asyncio.to_thread(networks, kind.network)
        assert "tidegate.network" in made["Labels"]
        await asyncio.to_thread(containers.remove_network, kind.network)
        server = await runtime.start(kind.spec(SLEEP))
        assert server.address != "http://0.0.0.0:0"
    assert not await asyncio.to_thread(networks, kind.network)


async def test_a_network_of_others_is_used_and_left(kind: DockerKind) -> None:
    """Somebody's bridge network does; it isn't ours to remove."""

    def make() -> None:
        with containers.engine() as client:
            client.create_network(kind.network)

    await asyncio.to_thread(make)
    async with opened(kind) as runtime:
        await runtime.start(kind.spec(SLEEP))
    assert len(await asyncio.to_thread(networks, kind.network)) == 1


async def test_a_network_whose_containers_cannot_be_reached_is_refused(kind: DockerKind) -> None:
    """The error names the key, the network and what to do."""
    kind.options = replace(kind.options, network="host")
    runtime = DockerRuntime(kind.data_dir, kind.options)
    with pytest.raises(ConfigError, match=r"lifecycle.docker.network: 'host' .* name a bridge network"):
        await runtime.open()
    await runtime.close()


@pytest.fixture
def own(kind: DockerKind, tmp_path: Path) -> Generator[str]:
    """A container that stands for the one that the service runs in: in a compose project, with a mount."""
    network = f"proj_{kind.network}"
    (tmp_path / "outside").mkdir()
    with containers.engine() as client:
        client.create_network(network)
    labels = {"com.docker.compose.project": "proj"}
    host = {"network_mode": network, "binds": [f"{tmp_path / 'outside'}:/inside"]}
    made = created(labels=labels, host=host)
    yield made
    containers.remove(made)
    containers.remove_network(network)


async def test_in_a_container_the_network_and_paths_are_its_own(
    kind: DockerKind, own: str, tmp_path: Path
) -> None:
    """Its network is found behind the compose prefix; what it sees is mounted from where the host has it."""
    (tmp_path / "outside" / "note").write_text("seen through the mount")
    async with opened(kind, own_ids=lambda: [own[:12]]) as runtime:
        program = "print(open('/weights/note').read()); import time; time.sleep(600)"
        wanted = replace(kind.spec(program), volumes=("/inside:/weights:ro",))
        server = await runtime.start(wanted)
        data = await asyncio.to_thread(inspected, server.instance_id)
        assert list(data["NetworkSettings"]["Networks"]) == [f"proj_{kind.network}"]
        while not (said := await runtime.tail(server.model, 5)):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.02)
        assert said == ["seen through the mount"]
    assert not await asyncio.to_thread(networks, kind.network)


async def test_a_process_in_a_container_knows_which(kind: DockerKind, runtime: DockerRuntime) -> None:
    """What a container shows its process names it, by mounts, group or hostname; on the host nothing does."""
    program = """
import pathlib, socket, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "mountinfo").write_text(pathlib.Path("/proc/self/mountinfo").read_text())
(folder / "hostname").write_text(socket.gethostname())
time.sleep(600)
"""
    server = await runtime.start(kind.spec(program, str(kind.folder)))
    hostname, mountinfo = kind.folder / "hostname", kind.folder / "mountinfo"
    await eventually(lambda: hostname.exists() and bool(hostname.read_text()))
    (found,) = await asyncio.to_thread(lambda: containers.bearing(instance=server.instance_id))
    assert place.clues(mountinfo.read_text(), "", "myhost") == [found["Id"]]
    assert place.clues("", f"1:name=systemd:/docker/{found['Id']}\n", "") == [found["Id"]]
    assert found["Id"].startswith(place.clues("", "0::/", hostname.read_text())[0])
    assert await asyncio.to_thread(place.own_ids) == []


async def test_in_a_container_a_network_that_it_is_not_on_is_refused(kind: DockerKind, own: str) -> None:
    """Model servers there couldn't be reached; the error says where the service is."""
    kind.options = replace(kind.options, network="elsewhere")
    runtime = DockerRuntime(kind.data_dir, kind.options, own_ids=lambda: [own])
    with pytest.raises(ConfigError, match=f"isn't on 'elsewhere', but on proj_{kind.network}; connect it"):
        await runtime.open()
    await runtime.close()


# Images and mounts


async def test_an_image_that_is_missing_is_said(kind: DockerKind, runtime: DockerRuntime) -> None:
    """With pull never; and with a pull that fails, for the registry's reason."""
    missing = replace(kind.spec(SLEEP), image=f"no-such-image-{uuid.uuid4().hex[:8]}:1")
    with pytest.raises(StartFailed, match=r"isn't on the Docker host, and lifecycle.docker.pull is never"):
        await runtime.start(missing)
    assert not containers.bearing(owner=kind.owner)


async def test_a_missing_folder_of_volumes_is_said_without_its_path(
    kind: DockerKind, runtime: DockerRuntime
) -> None:
    """The words name the key; nothing remains."""
    wanted = replace(kind.spec(SLEEP), volumes=("/no/such/secret:/x",))
    with pytest.raises(
        StartFailed, match=r"a folder of `volumes` .* doesn't exist on the Docker host"
    ) as told:
        await runtime.start(wanted)
    assert "secret" not in str(told.value)
    assert not containers.bearing(owner=kind.owner)


def test_a_pull_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers are added up, and told now and then."""
    monkeypatch.setattr("tidegate_lifecycle.runtimes.docker.images.TOLD_EVERY", 0.0)

    def layer(name: str, current: int) -> dict[str, Any]:
        detail = {"current": current << 20, "total": 100 << 20}
        return {"status": "Downloading", "id": name, "progressDetail": detail}

    entries: Iterable[dict[str, Any]] = [
        layer("a", 10), layer("b", 30), {"status": "Download complete", "id": "a"}, layer("b", 50)
    ]  # fmt: skip
    follow("img:1", entries)
    told = [line for line in capsys.readouterr().out.splitlines() if "image.progress" in line]
    assert "mib=150" in told[-1]
    assert "of_mib=200" in told[-1]
