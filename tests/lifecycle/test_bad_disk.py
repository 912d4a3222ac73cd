"""A data directory that is full, or that can no longer be written: a file system of its own for each test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lifecycle.harness import Admission, Service, alive, model
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb

Make = Callable[..., Service]


class Disk:
    """A small file system in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")
        self._ballast = folder / "ballast"

    def _mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments, str(self.folder)], check=True, capture_output=True)

    def fill(self) -> None:
        """Not a byte is free any more."""
        fd = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        while os.statvfs(self.folder).f_bavail:
            os.write(fd, b"x" * 4096)
        os.close(fd)

    def empty(self) -> None:
        """There is room again."""
        self._ballast.unlink()

    def lock(self) -> None:
        """From now on nothing can be made, opened for writing or removed there; what is open stays so."""
        self._mount("--bind", str(self.folder))
        self._mount("-o", "remount,bind,ro")

    def unlock(self) -> None:
        """It can be written again."""
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True, capture_output=True)

    def close(self) -> None:
        """It is gone, whoever still uses it; locked or not."""
        while self.folder.is_mount():
            self.unlock()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk, where this user may mount one."""
    try:
        made = Disk(tmp_path / "disk")
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("a file system of its own can't be mounted here: that takes root")
    yield made
    made.close()


@pytest.fixture
def service(disk: Disk, make: Make) -> Service:
    """A service with its data on that disk."""
    models = {name: model("4GiB", idle_timeout="0s") for name in ("a", "b", "c")}
    return make(models, data_dir=str(disk.folder / "data"))


async def refused(admission: Admission, name: str) -> str:
    """Why a model's start failed."""
    found = await admission.until(lambda: (m := admission.models[name]).reason and m)
    assert found.reason == pb.REASON_START_FAILED
    return str(found.message)


async def test_a_full_disk_stops_nothing_that_runs(disk: Disk, service: Service) -> None:
    """Running models serve on; a start says why it can't be, and is one again as soon as there is room; a
    restart of the service finds everything."""
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        a = await admission.ready("a")
        pid = (await service.status()).instances[0].pid
        disk.fill()
        admission.say(b=1)
        assert "data directory can't be written: No space left on device" in await refused(admission, "b")
        admission.roster = ["edge-1", "edge-9"]
        admission.lease(a.instance_id, 1)
        await service.elapse(1.0)
        assert admission.instance("a")
        assert alive(pid)
        await service.said("store.unwritable")
        disk.empty()
        b = await admission.ready("b")
    await service.kill()
    await service.start()
    async with Admission(service).connected() as admission:
        assert (await admission.until(lambda: admission.instance("a"))).instance_id == a.instance_id
        assert (await admission.until(lambda: admission.instance("b"))).instance_id == b.instance_id


async def test_a_stop_on_a_full_disk(disk: Disk, service: Service) -> None:
    """A server that dies, and one that is unloaded, are gone; the room of their records is free."""
    await service.start()
    async with Admission(service).connected() as admission, service.stub() as stub:
        admission.say(a=1, b=1)
        await admission.ready("a")
        await admission.ready("b")
        disk.fill()
        await stub.UnloadModel(pb.UnloadModelRequest(model="a"), timeout=5)
        await admission.gone("a")
        assert await service.stop() == 0
        disk.empty()


async def test_a_service_does_not_start_on_a_full_disk(disk: Disk, service: Service) -> None:
    """It says which directory is full, and touches no model server; with room it adopts them."""
    await service.start()
    async with Admission(service).connected() as admission:
        admission.say(a=1)
        a = await admission.ready("a")
    pid = (await service.status()).instances[0].pid
    await service.kill()
    disk.fill()
    status, said = await service.run()
    assert status == 78, said
    assert "lifecycle.data_dir" in said
    assert "full" in said or "No space left" in said
    assert alive(pid)
    disk.empty()
    await service.start()
    async with Admission(service).connected() as admission:
        assert (await admission.until(lambda: admission.instance("a"))).instance_id == a.instance_id


async def test_a_read_only_disk_stops_nothing_that_runs(disk: Disk, service: Service) -> None:
    """As a full one: what runs serves on and can be stopped, a start says why it can't be, a restart of the
    service is refused by name while it lasts and finds everything afterwards."""
    await service.start()
    async with Admission(service).connected() as admission, service.stub() as stub:
        admission.say(a=1, c=1)
        a = await admission.ready("a")
        await admission.ready("c")
        disk.lock()
        admission.say(b=1)
        assert "data directory can't be written: Read-only file system" in await refused(admission, "b")
        await stub.UnloadModel(pb.UnloadModelRequest(model="c"), timeout=5)
        await admission.gone("c")
        assert admission.instance("a")
        pid = (await service.status()).instances[0].pid
    await service.kill()
    status, said = await service.run()
    assert status == 78, said
    assert "lifecycle.data_dir" in said
    assert "Read-only file system" in said
    assert alive(pid)
    disk.unlock()
    await service.start()
    async with Admission(service).connected() as admission:
        assert (await admission.until(lambda: admission.instance("a"))).instance_id == a.instance_id
        assert not admission.models["c"].instances
