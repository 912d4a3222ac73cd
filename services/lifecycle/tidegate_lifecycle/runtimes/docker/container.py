"""A container as Docker takes and shows it: labels, what it is made with, what an inspection tells. Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from docker.types import DeviceRequest, LogConfig, Mount

from tidegate_lifecycle.runtimes.base import StartSpec
from tidegate_lifecycle.runtimes.records import VARIABLE

OWNER = "tidegate.owner"
"""Label: the installation that a container belongs to. Without it a container is a stranger's."""
INSTANCE = "tidegate.instance"
_MODEL, _SIGNATURE = "tidegate.model", "tidegate.signature"
_DEVICES, _RESERVED, _PORT = "tidegate.devices", "tidegate.reserved_mib", "tidegate.port"

HOST = "0.0.0.0"  # noqa: S104 - in the container's own network namespace
PORT = 8000
"""Each container has an address of its own, so all may have the same port."""
HUB_FOLDER = "/root/.cache/huggingface"
"""Where containers see the hub's cache."""
_HUB_SETTINGS = (
    *("HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
)
_LOG = LogConfig(type=LogConfig.types.JSON, config={"max-size": "8m", "max-file": "2"})
_UNKNOWN_START = "0001-"
NOWHERE = "http://0.0.0.0:0"
"""Address of a container that has none (any more): connecting fails at once."""


@dataclass(frozen=True)
class Limits:
    """What every container may use."""

    shm_bytes: int = 8 << 30
    memory_bytes: int | None = None
    """Without swap: at the limit it is killed. None = no limit."""
    cpus: float | None = None
    pids: int = 4096


@dataclass(frozen=True)
class DockerOptions:
    """Section `lifecycle.docker`, as far as it isn't a model's own."""

    network: str = "tidegate"
    pull: str = "missing"
    limits: Limits = field(default_factory=Limits)
    hub_cache: Path | None = None
    """The hub's cache, as this process sees it; None = it isn't mounted."""


@dataclass(frozen=True)
class Listed:
    """A line of a listing."""

    id: str
    instance_id: str
    running: bool
    created: float
    """Seconds since the epoch, by the daemon's clock."""


@dataclass(frozen=True)
class Inspected:
    """What an inspection tells."""

    id: str
    labels: Mapping[str, str]
    running: bool
    state: Mapping[str, Any]
    address: str
    """Base URL; `NOWHERE` when it has none."""
    pid: int
    started: float
    """Seconds since the epoch, by the daemon's clock; 0 = it never was."""

    @property
    def instance_id(self) -> str:
        """Names the instance."""
        return self.labels.get(INSTANCE, "")

    @property
    def model(self) -> str:
        """Its model."""
        return self.labels.get(_MODEL, "")

    @property
    def signature(self) -> str:
        """As given at its start."""
        return self.labels.get(_SIGNATURE, "")

    @property
    def device_ids(self) -> tuple[str, ...]:
        """The devices that it is on."""
        return tuple(filter(None, self.labels.get(_DEVICES, "").split(",")))

    @property
    def reserved_mib(self) -> int:
        """Reserved for it on each of them, in MiB."""
        text = self.labels.get(_RESERVED, "")
        return int(text) if text.isdecimal() else 0


def labels(spec: StartSpec, owner: str) -> dict[str, str]:
    """All that a restarted service needs to know of a container. No secrets: anybody may read labels."""
    return {
        OWNER: owner,
        INSTANCE: spec.instance_id,
        _MODEL: spec.model,
        _SIGNATURE: spec.signature,
        _DEVICES: ",".join(spec.device_ids),
        _RESERVED: str(spec.reserved_mib),
        _PORT: str(spec.port),
    }


def name(instance_id: str, random: str) -> str:
    """A container's name: readable, and new each time: an old one is taken until all of it is gone."""
    return f"tidegate-{re.sub(r'[^A-Za-z0-9_.-]', '-', instance_id)[:100]}-{random}"


def environment(spec: StartSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """The model's own variables; for one that loads from the hub also how the hub is reached."""
    env = {VARIABLE: spec.instance_id}
    if spec.hub:
        env |= {key: environ[key] for key in _HUB_SETTINGS if environ.get(key)} | {"HF_HOME": HUB_FOLDER}
    return env | dict(spec.env)


def host_options(spec: StartSpec, limits: Limits, network: str, mounts: Sequence[Mount]) -> dict[str, Any]:
    """Keywords of the SDK's `create_host_config`: little privilege, limits, no published ports."""
    cards = [DeviceRequest(device_ids=list(spec.cards), capabilities=[["gpu"]])] if spec.cards else None
    return {
        "network_mode": network,
        "mounts": list(mounts),
        "device_requests": cards,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "init": True,
        "restart_policy": {"Name": "no"},
        "auto_remove": False,
        "log_config": _LOG,
        "shm_size": limits.shm_bytes,
        "mem_limit": limits.memory_bytes,
        "memswap_limit": limits.memory_bytes,
        "nano_cpus": None if limits.cpus is None else int(limits.cpus * 1e9),
        "pids_limit": limits.pids,
    }


def volume(text: str, folder: Path) -> Mount:
    """A mount from `SOURCE:TARGET[:ro|rw]`.

    A source with a slash, or that begins with `.` or `~`, is a path, relative to `folder`; another one is the
    name of a volume.
    """
    source, target, *mode = text.split(":")
    read_only = mode == ["ro"]
    if "/" not in source and not source.startswith((".", "~")):
        return Mount(target, source, type="volume", read_only=read_only)
    path = os.path.normpath(folder / os.path.expanduser(source))
    return Mount(target, path, type="bind", read_only=read_only)


def listed(entry: Mapping[str, Any]) -> Listed:
    """From an entry of /containers/json."""
    running = entry.get("State") in ("running", "paused", "restarting")
    instance_id = (entry.get("Labels") or {}).get(INSTANCE, "")
    return Listed(str(entry["Id"]), instance_id, running, float(entry.get("Created") or 0))


def inspected(data: Mapping[str, Any], network: str) -> Inspected:
    """From /containers/ID/json."""
    state = data.get("State") or {}
    found = (data.get("Config") or {}).get("Labels") or {}
    ends = (data.get("NetworkSettings") or {}).get("Networks") or {}
    end: Mapping[str, Any] = ends.get(network) or next(iter(ends.values()), {})
    ip, port = end.get("IPAddress") or "", found.get(_PORT, "")
    return Inspected(
        id=str(data["Id"]),
        labels=found,
        running=bool(state.get("Running")),
        state=state,
        address=f"http://{ip}:{port}" if ip and port else NOWHERE,
        pid=int(state.get("Pid") or 0),
        started=seconds(str(state.get("StartedAt") or "")),
    )


def seconds(stamp: str) -> float:
    """Docker's time stamp (RFC 3339 with nanoseconds) in seconds since the epoch; 0 for none."""
    if not stamp or stamp.startswith(_UNKNOWN_START):
        return 0.0
    whole, _, rest = stamp.partition(".")
    try:
        moment = datetime.fromisoformat(whole.removesuffix("Z")).replace(tzinfo=UTC)
    except ValueError:
        return 0.0
    digits = re.match(r"\d*", rest)
    return moment.timestamp() + float(f"0.{digits[0]}" if digits and digits[0] else 0)
