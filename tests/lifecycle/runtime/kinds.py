"""The kinds of runtime that the conformance suite tries, each on a data directory of its own."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

from tests.support import containers
from tidegate_lifecycle.runtimes.base import Runtime, Server, StartSpec
from tidegate_lifecycle.runtimes.docker.container import DockerOptions, Limits
from tidegate_lifecycle.runtimes.docker.daemon import Patience
from tidegate_lifecycle.runtimes.docker.runtime import DockerRuntime
from tidegate_lifecycle.runtimes.process import ProcessRuntime
from tidegate_lifecycle.runtimes.records import VARIABLE

SDK_SOCKETS = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
"""The SDK leaves sockets of connections that failed, or were cut, to the garbage collector."""
_COUNT = itertools.count(1)


class ProcessKind:
    """Local processes."""

    name = "process"

    def __init__(self, folder: Path) -> None:
        self.folder, self.data_dir = folder, folder / "data"

    def make(self, environ: dict[str, str] | None = None) -> Runtime:
        """A runtime on the data directory; as often as wanted, one at a time."""
        return ProcessRuntime(self.data_dir, os.environ if environ is None else environ)

    def spec(self, program: str, *arguments: str, model: str = "org/model:a") -> StartSpec:
        """Runs a Python program: its text, then its arguments."""
        return StartSpec(
            instance_id=f"node/{model}/{next(_COUNT)}-{uuid.uuid4().hex[:8]}",
            model=model,
            signature="s1",
            argv=(sys.executable, "-u", "-c", program, *arguments),
            env={"MODEL_SETTING": "1"},
            cwd=self.folder,
            host="127.0.0.1",
            port=8000,
            device_ids=("gpu0",),
            reserved_mib=1024,
        )

    def kill(self, server: Server) -> None:
        """Kills it as somebody else would."""
        os.kill(server.pid, signal.SIGKILL)

    def remains(self, word: str) -> list[str]:
        """What there is of an instance, or of all whose ids begin so."""
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                variables = file.read_text(errors="replace").split("\0")
                found += [text for text in variables if text.startswith(f"{VARIABLE}={word}")]
        return [text.partition("=")[2] for text in found]

    def clean(self) -> None:
        """The runtime has ended everything."""


class DockerKind(ProcessKind):
    """Containers of the real engine, in a network of their own."""

    name = "docker"

    def __init__(self, folder: Path, **options: object) -> None:
        super().__init__(folder)
        self.network = f"tidegate-test-{uuid.uuid4().hex[:8]}"
        limits = Limits(shm_bytes=64 << 20, memory_bytes=256 << 20, pids=64)
        self.options = DockerOptions(self.network, "never", limits, **options)  # type: ignore[arg-type]
        self.patience = Patience()

    def make(self, environ: dict[str, str] | None = None) -> Runtime:
        given = os.environ if environ is None else environ
        return DockerRuntime(self.data_dir, self.options, given, self.patience)

    def spec(self, program: str, *arguments: str, model: str = "org/model:a") -> StartSpec:
        made = super().spec(program, *arguments, model=model)
        changed = {
            "image": containers.PYTHON,
            "argv": ("python3", *made.argv[1:]),
            "volumes": (f"{self.folder}:{self.folder}",),
            "host": "0.0.0.0",
        }
        return StartSpec(**{**vars(made), **changed})

    def kill(self, server: Server) -> None:
        (found,) = containers.bearing(instance=server.instance_id)
        with containers.engine() as client:
            client.kill(found["Id"])

    def remains(self, word: str) -> list[str]:
        with containers.engine() as client:
            found = client.containers(all=True, filters={"label": containers.INSTANCE})
        ids: list[str] = [one["Labels"][containers.INSTANCE] for one in found]
        return [one for one in ids if one.startswith(word)]

    @property
    def owner(self) -> str:
        """The installation's name, once a runtime was opened."""
        path = self.data_dir / "installation"
        return path.read_text() if path.exists() else ""

    def clean(self) -> None:
        """Whatever a test left."""
        if self.owner:
            for one in containers.bearing(owner=self.owner):
                containers.remove(one["Id"])
        containers.remove_network(self.network)
        gc.collect()  # while its warnings are let pass
