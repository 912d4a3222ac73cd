"""Where this service stands: on the Docker host itself, or in a container of its own; and the network.

In a container it can reach model servers only over a network that it is on itself, and its paths aren't the
host's: both are read from its own container.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import structlog
from docker.api.client import APIClient
from docker.types import Mount

from tidegate_chassis.config import ConfigError, Problem
from tidegate_lifecycle.runtimes.docker.daemon import Absent, Daemon, Declined

log = structlog.get_logger("tidegate.docker")

MADE = "tidegate.network"
"""Label of networks that were made here: only these are ever removed."""
_PROJECT = "com.docker.compose.project"
_DRIVER = "bridge"


@dataclass(frozen=True)
class Own:
    """This service's own container."""

    networks: tuple[str, ...]
    """Names of the networks that it is on."""
    project: str = ""
    """Its compose project; empty = none."""
    mounts: Mapping[str, str] = field(default_factory=dict)
    """What it sees where: path in the container → path on the host."""


def own_ids() -> list[str]:
    """Ids that may be this process' own container's. Reads files: called in a thread."""
    texts = []
    for file in ("/proc/self/mountinfo", "/proc/self/cgroup"):
        try:
            texts.append(Path(file).read_text())
        except OSError:
            texts.append("")
    return clues(texts[0], texts[1], socket.gethostname())


def clues(mountinfo: str, cgroup: str, hostname: str) -> list[str]:
    """Ids of containers that a process may be in, best first: 1. by the file that Docker mounts as its
    /etc/hostname; 2. by its control group (version 1); 3. by its hostname, if nobody gave it another one."""
    found = re.findall(r"/containers/([0-9a-f]{64})/hostname /etc/hostname ", mountinfo)  # 1
    found += re.findall(r"/(?:docker[/-])?([0-9a-f]{64})(?:\.scope)?$", cgroup, re.MULTILINE)  # 2
    found += [hostname] if re.fullmatch(r"[0-9a-f]{12}", hostname) else []  # 3
    return list(dict.fromkeys(found))


async def own_container(daemon: Daemon, ids: Sequence[str]) -> Own | None:
    """This service's own container; None when it runs on the host, or shares the host's network."""
    for one in ids:
        try:
            data = await daemon.call(
                daemon.patience.look, partial(APIClient.inspect_container, container=one)
            )
        except Absent:
            continue
        if str(data["Id"]).startswith(one):
            return _own(data)
    return None


def _own(data: Mapping[str, Any]) -> Own | None:
    networks = tuple((data.get("NetworkSettings") or {}).get("Networks") or {})
    if networks == ("host",):
        networks = ()
    mounts = {
        str(one["Destination"]): str(one["Source"]) for one in data.get("Mounts") or () if one.get("Source")
    }
    project = ((data.get("Config") or {}).get("Labels") or {}).get(_PROJECT, "")
    return Own(networks, project, mounts)


def pick(wanted: str, own: Own) -> str:
    """The network of one's own container that is meant: 1. that name; 2. with its compose project before it;
    3. the only one that ends so. ConfigError when it is on none of them."""
    if wanted in own.networks:  # 1
        return wanted
    prefixed = f"{own.project}_{wanted}"
    if own.project and prefixed in own.networks:  # 2
        return prefixed
    ending = [name for name in own.networks if name.endswith(f"_{wanted}")]
    if len(ending) == 1:  # 3
        return ending[0]
    on = ", ".join(own.networks) or "none"
    raise _unfit(
        f"this service's own container isn't on {wanted!r}, but on {on}; connect it, or name one of its own"
    )


def _unfit(text: str) -> ConfigError:
    return ConfigError([Problem("lifecycle.docker.network", text)])


async def settle_network(daemon: Daemon, wanted: str, own: Own | None) -> str:
    """The name of the network for model servers; it exists afterwards. ConfigError when it can't be used."""
    if own is not None and own.networks:
        return pick(wanted, own)
    found = await daemon.call(daemon.patience.look, lambda client: client.networks(names=[wanted]))
    exact = [one for one in found if one["Name"] == wanted]
    if len(exact) > 1:
        raise _unfit(f"there are {len(exact)} networks named {wanted!r}; remove all but one, or name another")
    driver = exact[0].get("Driver") if exact else _DRIVER
    if driver != _DRIVER:
        text = f"{wanted!r} is a network of the driver {driver}, whose containers can't be reached from here"
        raise _unfit(f"{text}; name a bridge network, or one that doesn't exist: it is made")
    if not exact:
        await make_network(daemon, wanted)
    return wanted


async def make_network(daemon: Daemon, name: str) -> None:
    """Makes it, unless somebody else has just done so."""
    try:
        await daemon.call(
            daemon.patience.start,
            lambda client: client.create_network(
                name, driver="bridge", check_duplicate=True, labels={MADE: "1"}
            ),
        )
        log.info("network.made", network=name)
    except Declined as error:
        if error.status != 409:
            raise


async def drop_network(daemon: Daemon, name: str) -> None:
    """Removes a network that was made here and that nobody uses; otherwise nothing happens."""
    found = await daemon.call(daemon.patience.look, lambda client: client.networks(names=[name]))
    for one in found:
        if one["Name"] == name and MADE in (one.get("Labels") or {}):
            try:
                await daemon.call(daemon.patience.end, partial(APIClient.remove_network, net_id=one["Id"]))
                log.info("network.removed", network=name)
            except Declined:  # somebody uses it, or has removed it
                continue


def on_host(mount: Mount, own: Own | None) -> Mount:
    """A mount with its source as the host sees it. A path that isn't in one's own mounts is the host's."""
    if own is None or mount["Type"] != "bind":
        return mount
    source = host_path(mount["Source"], own)
    return (
        mount
        if source is None
        else Mount(mount["Target"], source, type="bind", read_only=bool(mount["ReadOnly"]))
    )


def host_path(path: str, own: Own) -> str | None:
    """Where a path of one's own container lies on the host, by the innermost mount; None = nowhere."""
    for parent in (PurePosixPath(path), *PurePosixPath(path).parents):
        source = own.mounts.get(str(parent))
        if source is not None:
            return str(PurePosixPath(source) / PurePosixPath(path).relative_to(parent))
    return None
