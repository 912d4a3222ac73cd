"""What a runtime is: it starts, stops, lists, adopts and watches model servers.

The reconciler talks to this alone; which runtime is behind it is a setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class StartFailed(Exception):
    """A model server couldn't even begin. Its text is for callers: no paths, no environment."""


@dataclass(frozen=True)
class StartSpec:
    """What to start."""

    instance_id: str
    """Names the instance; has a random part and is never used again."""
    model: str
    signature: str
    """Hash of its configuration: tells a restarted process whether the server is still the right one."""
    argv: tuple[str, ...]
    """The command, an argument vector; never passed through a shell."""
    env: Mapping[str, str]
    """Added to the clean environment that every server gets."""
    cwd: Path
    host: str
    port: int
    """Where it will listen, from `Runtime.endpoint`."""
    device_ids: tuple[str, ...]
    """What outlasts this process knows its devices by: UUIDs, or ids of declared ones."""
    reserved_mib: int
    """Memory reserved for it on each of its devices, in MiB."""
    image: str = ""
    """Containers: the image that it runs in."""
    image_entrypoint: bool = False
    """Containers: `argv` are arguments for the image's own entrypoint, not a whole command."""
    volumes: tuple[str, ...] = ()
    """Containers: `SOURCE:TARGET[:ro]`; paths are relative to `cwd`."""
    cards: tuple[str, ...] = ()
    """Containers: how the driver names its devices; empty = declared ones, which nobody can hand over."""
    hub: bool = False
    """Containers: it loads from the hub, so that it gets the hub's cache."""

    @property
    def address(self) -> str:
        """Base URL of the server."""
        return f"http://{self.host}:{self.port}"


Lines = list[str]
"""Lines of a log, without line ends. (In a class that has a method `list`, the type needs another name.)"""


class Server(Protocol):
    """A model server that runs, or has just ended; started by this process or by one before it."""

    @property
    def instance_id(self) -> str:
        """Names the instance."""

    @property
    def model(self) -> str:
        """Its model."""

    @property
    def signature(self) -> str:
        """As given at its start."""

    @property
    def address(self) -> str:
        """Base URL."""

    @property
    def device_ids(self) -> tuple[str, ...]:
        """The devices that it is on."""

    @property
    def reserved_mib(self) -> int:
        """Reserved for it on each of them, in MiB."""

    @property
    def pid(self) -> int:
        """Its process; 0 where the runtime has none to tell."""

    @property
    def age(self) -> float:
        """Seconds since it was started, when this handle was made."""

    @property
    def was_ready(self) -> bool:
        """`mark_ready` was recorded for it."""

    async def exited(self) -> str:
        """Waits until it has ended, and says how: "exit status 3", "signal 9", "ended" when unknown.

        Any number may wait, and a wait may be cancelled.
        """


Servers = list[Server]
"""Some model servers."""


class Runtime(Protocol):
    """Starts and watches model servers. Called on the event loop, which it never blocks."""

    async def open(self) -> None:
        """Checks that the runtime can be used. ConfigError when it can't, with what to do about it."""

    async def close(self) -> None:
        """Lets go of everything, and leaves model servers running."""

    async def endpoint(self) -> tuple[str, int]:
        """A host and a free port that no server has and that wasn't promised lately."""

    async def start(self, spec: StartSpec) -> Server:
        """Starts a server; StartFailed when it can't even begin.

        A kill -9 of this process at any instant leaves no server that the next `list` doesn't find. When
        the caller is cancelled, what was started is stopped first.
        """

    async def mark_ready(self, server: Server) -> None:
        """Remembers, beyond a restart of this process, that the server was ready."""

    async def stop(self, server: Server, grace: float) -> None:
        """Ends a server and everything it started: asks, and kills after `grace` seconds (0 = at once).

        Returns when all of it is gone, however long the kernel takes. One that is gone already is no
        error. A second call joins the first; it can hasten it, never slow it down.
        """

    async def processes(self, server: Server) -> frozenset[int]:
        """Pids of all that the server consists of, as the host has them; empty = they can't be told."""

    async def list(self) -> Servers:
        """The servers that run, whoever started them; what is left of dead ones is swept away."""

    async def tail(self, model: str, lines: int) -> Lines:
        """The last lines of the model's newest log, raw; also when its server has ended."""

    async def log_since(self, model: str, offset: int | None) -> tuple[Lines, int]:
        """Lines written since `offset`, and the next offset; None = from now on. An offset is opaque."""

    async def maintain(self) -> None:
        """Housekeeping, called every ten seconds or so: bounds log files and drops old ones."""
