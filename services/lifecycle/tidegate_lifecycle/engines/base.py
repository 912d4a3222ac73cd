"""What an engine is: how a model server's command is phrased, and how it is read.

An engine knows no runtime: it gives an argument vector and an environment, whoever runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.engines.flags import Flags
from tidegate_lifecycle.probes import Health, Probe

READY_TIMEOUT = 2.0
"""Seconds that a server may take to answer a readiness check."""
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables with the hub's token: passed on to servers that load from the hub, and to no others."""


@dataclass(frozen=True)
class Command:
    """What to run."""

    argv: tuple[str, ...]
    """An argument vector, never seen by a shell."""
    env: Mapping[str, str]
    """Added to the base environment."""
    hub: bool = False
    """It loads from the hub: in a container it gets the hub's cache."""
    image_entrypoint: bool = False
    """In a container: `argv` are arguments for the image's own entrypoint, not a whole command."""


@dataclass(frozen=True)
class Files:
    """A model's files as its server sees them, if they were downloaded for it."""

    model: str = ""
    """The first, or only, one; empty = the server gets at the model's source by itself."""
    projector: str = ""
    """What a model that sees images needs beside it; empty = none."""
    hub_cache: str = ""
    """Where the hub's library in the server shall look; empty = where it does anyway."""


@dataclass(frozen=True)
class Placement:
    """Where a server will be."""

    host: str
    port: int
    devices: tuple[Device, ...]
    reserved_mib: int
    """Memory reserved for it per card, in MiB; 0 = unknown."""
    files: Files = Files()


class Engine(Protocol):
    """One kind of model server."""

    name: str
    flags: Flags
    """Those that `extra_args` may not contain."""
    stop_grace: float
    """Seconds that it may take to end by itself once asked to."""

    def command(self, model: Model, placement: Placement) -> Command:
        """How to start the model there. ValueError for an engine whose servers run elsewhere."""

    def signature(self, model: Model) -> str:
        """Hash of everything that shapes the running server: with another one it isn't the same server."""

    def default_slots(self, model: Model) -> int | None:
        """Requests in flight that suit the server; None = admission's default."""

    async def ready(self, probe: Probe, model: Model, address: str) -> Health:
        """Whether it can serve this model now."""


def visible_devices(model: Model, placement: Placement) -> dict[str, str]:
    """The model's environment, with the cards that it may see; declared ones can't be named to CUDA."""
    if model.image:  # a container has no other cards, and there they are numbered anew
        return dict(model.env)
    names = [device.visible_as for device in placement.devices]
    cards = {"CUDA_VISIBLE_DEVICES": ",".join(names)} if names and all(names) else {}
    return {**model.env, **cards}


def in_image(model: Model) -> dict[str, object]:
    """What shapes a server in a container beside its command, for its signature; a process has none of it."""
    return {"image": model.image, "volumes": list(model.volumes)} if model.image else {}


def hub_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The hub's token, if there is one."""
    return {name: environ[name] for name in HUB_TOKENS if environ.get(name)}
