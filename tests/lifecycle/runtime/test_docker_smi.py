"""nvidia-smi in a container, on the real engine, by an image with a stand-in for the program."""

from __future__ import annotations

import asyncio
import io
import tarfile
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path

import pytest

from tests.support import containers
from tidegate_chassis.config import ConfigError
from tidegate_lifecycle.devices import Devices, Unreadable
from tidegate_lifecycle.runtimes.docker.runtime import DockerRuntime
from tidegate_lifecycle.runtimes.docker.smi import LABEL

from .kinds import SDK_SOCKETS, DockerKind

pytestmark = [pytest.mark.docker, SDK_SOCKETS]

Image = Callable[[str], str]


@pytest.fixture
def image() -> Generator[Image]:
    """Makes images whose nvidia-smi is a shell script."""
    made: list[str] = []

    def make(script: str) -> str:
        repository, tag = "tidegate-smi-test", uuid.uuid4().hex[:12]
        name = f"{repository}:{tag}"
        text = f"#!/bin/sh\n{script}\n".encode()
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            entry = tarfile.TarInfo("nvidia-smi")
            entry.size, entry.mode = len(text), 0o755
            tar.addfile(entry, io.BytesIO(text))
        with containers.engine() as client:
            container = client.create_container(containers.PYTHON, ["true"])["Id"]
            try:
                client.put_archive(container, "/usr/local/bin", archive.getvalue())
                client.commit(container, repository=repository, tag=tag)
            finally:
                client.remove_container(container, force=True)
        made.append(name)
        return name

    yield make
    with containers.engine() as client:
        for name in made:
            client.remove_image(name, force=True)


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncGenerator[DockerRuntime]:
    """An open runtime."""
    kind = DockerKind(tmp_path)
    made = DockerRuntime(kind.data_dir, kind.options, patience=kind.patience)
    await made.open()
    await made.list()
    yield made
    await made.close()
    kind.clean()


def left() -> list[str]:
    """Containers of nvidia-smi that are there, whoever made them."""
    with containers.engine() as client:
        return [one["Id"] for one in client.containers(all=True, filters={"label": [LABEL]})]


async def test_the_cards_are_read_in_a_container(runtime: DockerRuntime, image: Image) -> None:
    """It gets all cards and no network, and nothing of it is left; two questions go one after the other."""
    name = image('echo "0, GPU-a, NVIDIA L4, 23034, 4, 23030, Disabled"')
    devices = Devices((), runtime.smi(name))
    (device,) = await devices.open()
    assert (device.uuid, device.total_mib, device.used_mib) == ("GPU-a", 23034, 4)
    answers = await asyncio.gather(*(devices.read() for _ in range(3)))
    assert [answer[0].problem for answer in answers] == ["", "", ""]
    assert await asyncio.to_thread(left) == []


async def test_its_failures_are_reasons(runtime: DockerRuntime, image: Image) -> None:
    """An exit status, a program that hangs, an image without it, an image that isn't there."""
    failing = runtime.smi(image("echo no driver here; exit 9"))
    with pytest.raises(Unreadable, match="nvidia-smi failed with status 9: no driver here"):
        await failing.ask()
    hanging = runtime.smi(image("exec sleep 600"))
    with pytest.raises(Unreadable, match=r"gave no answer in time"):
        await hanging.ask(deadline=1.0)
    without = runtime.smi(containers.PYTHON)
    with pytest.raises(Unreadable, match="the program nvidia-smi was not found in the image"):
        await without.ask()
    with pytest.raises(ConfigError, match=r"no device can be read: .* isn't on the Docker host"):
        await Devices((), runtime.smi("tidegate-none:none"), backoff=()).open()
    assert await asyncio.to_thread(left) == []


async def test_what_a_killed_process_left_is_removed(runtime: DockerRuntime, image: Image) -> None:
    """By the next question; another installation's container isn't touched."""
    smi = runtime.smi(image("echo fine"))

    def leave(owner: str) -> str:
        with containers.engine() as client:
            made = client.create_container(containers.PYTHON, ["sleep", "600"], labels={LABEL: owner})
            client.start(made["Id"])
            return str(made["Id"])

    ours, theirs = [await asyncio.to_thread(leave, owner) for owner in (runtime._ours.owner, "somebody")]
    try:
        assert await smi.ask() == "fine\n"
        assert await asyncio.to_thread(left) == [theirs]
    finally:
        for one in (ours, theirs):
            await asyncio.to_thread(containers.remove, one)
