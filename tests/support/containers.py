"""The Docker engine that tests use: whether there is one, what is on it, and how it is left clean."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Iterator
from typing import Any

import docker
from docker.api.client import APIClient
from docker.errors import APIError, DockerException

PYTHON = "python:3.11-slim-bookworm"
OWNER = "tidegate.owner"
INSTANCE = "tidegate.instance"


@functools.cache
def why_not() -> str:
    """Why no Docker engine can be used here; empty = one can."""
    if not _listening(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")):
        return "no Docker engine can be reached"
    try:
        with engine() as client:
            if not client.images(PYTHON):
                return f"the image {PYTHON} is not on the Docker engine (docker pull {PYTHON})"
    except DockerException:
        return "no Docker engine can be reached"
    return ""


def _listening(host: str) -> bool:
    """Whether somebody does; the SDK would leave its socket open where nobody does."""
    if not host.startswith("unix://"):
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(host.removeprefix("unix://"))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def engine() -> Iterator[APIClient]:
    """A client of its own."""
    client = docker.from_env(timeout=60).api
    try:
        yield client
    finally:
        client.close()


def bearing(**labels: str) -> list[dict[str, Any]]:
    """All containers with these labels (`owner`, `instance`), running or not."""
    names = {"owner": OWNER, "instance": INSTANCE}
    wanted = [f"{names[key]}={value}" for key, value in labels.items()]
    with engine() as client:
        found: list[dict[str, Any]] = client.containers(all=True, filters={"label": wanted})
        return found


def remove(container_id: str) -> None:
    """Removes a container by hand, by force."""
    with engine() as client, contextlib.suppress(APIError):
        client.remove_container(container_id, force=True, v=True)


def remove_network(name: str) -> None:
    """Removes a network, if there is one."""
    with engine() as client, contextlib.suppress(APIError):
        client.remove_network(name)
