"""This installation's containers: made, started, found, signalled and removed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import structlog
from docker.api.client import APIClient
from docker.types import Mount

from tidegate_lifecycle.runtimes.base import StartSpec
from tidegate_lifecycle.runtimes.docker import container as containers
from tidegate_lifecycle.runtimes.docker import place
from tidegate_lifecycle.runtimes.docker.container import DockerOptions, Inspected, Listed
from tidegate_lifecycle.runtimes.docker.daemon import Absent, Daemon, Declined, DockerFailed

log = structlog.get_logger("tidegate.docker")

RETRY = (0.05, 2.0)
"""Seconds between two tries to end or remove a container: the first pause, and the longest."""


class Ours:
    """The containers that bear one installation's label. Calls raise DockerFailed."""

    def __init__(
        self,
        daemon: Daemon,
        options: DockerOptions,
        environ: Mapping[str, str],
        random: Callable[[], str],
        owner: str = "",
        network: str = "",
        own: place.Own | None = None,
    ) -> None:
        self._daemon = daemon
        self._options, self._environ, self._random = options, environ, random
        self.owner, self.network, self.own = owner, network, own

    async def create(self, spec: StartSpec) -> str:
        """The new container's id. A name that is taken (an old one is being removed) is made anew."""
        for attempt in range(3):
            try:
                return await self._daemon.call(self._daemon.patience.start, self._creation(spec))
            except Declined as error:
                if error.status != 409 or attempt == 2:
                    raise
        raise AssertionError

    def _creation(self, spec: StartSpec) -> Callable[[APIClient], str]:
        name = containers.name(spec.instance_id, self._random())
        host = containers.host_options(spec, self._options.limits, self.network, self._mounts(spec))
        command: dict[str, Any] = {"entrypoint": list(spec.argv[:1]), "command": list(spec.argv[1:])}
        if spec.image_entrypoint:
            command = {"command": list(spec.argv)}

        def create(client: APIClient) -> str:
            made = client.create_container(
                spec.image,
                name=name,
                labels=containers.labels(spec, self.owner),
                environment=containers.environment(spec, self._environ),
                host_config=client.create_host_config(**host),
                use_config_proxy=False,
                **command,
            )
            return str(made["Id"])

        return create

    def _mounts(self, spec: StartSpec) -> list[Mount]:
        mounts = [containers.volume(text, spec.cwd) for text in spec.volumes]
        if spec.hub and self._options.hub_cache is not None:
            mounts.insert(0, Mount(containers.HUB_FOLDER, str(self._options.hub_cache), type="bind"))
        return [place.on_host(mount, self.own) for mount in mounts]

    async def run(self, container_id: str) -> None:
        """Starts it; a network that was removed meanwhile is made anew."""
        for attempt in range(2):
            try:
                await self._daemon.call(
                    self._daemon.patience.start, partial(APIClient.start, container=container_id)
                )
                return
            except Declined as error:
                lost = self.own is None and f"network {self.network} not found" in error.said
                if attempt or not lost:
                    raise
                await place.make_network(self._daemon, self.network)

    async def listing(self, instance_id: str = "") -> Sequence[Listed]:
        """Our containers, running or not; those of one instance when it is given."""
        wanted = [f"{containers.OWNER}={self.owner}"]
        wanted += [f"{containers.INSTANCE}={instance_id}"] if instance_id else []
        entries = await self._daemon.call(
            self._daemon.patience.look, lambda client: client.containers(all=True, filters={"label": wanted})
        )
        return [containers.listed(entry) for entry in entries]

    async def inspect(self, container_id: str) -> Inspected:
        """What Docker tells of it now."""
        data = await self._daemon.call(
            self._daemon.patience.look, partial(APIClient.inspect_container, container=container_id)
        )
        return containers.inspected(data, self.network)

    async def processes(self, container_id: str) -> frozenset[int]:
        """Pids of its processes, as the host has them."""
        shown = await self._daemon.call(
            self._daemon.patience.look, partial(APIClient.top, container=container_id, ps_args="-eo pid")
        )
        rows = shown.get("Processes") or []
        return frozenset(int(row[0]) for row in rows if row and row[0].isdecimal())

    async def signal(self, container_id: str, name: str) -> None:
        """Sends it a signal."""
        await self._daemon.call(
            self._daemon.patience.end, partial(APIClient.kill, container=container_id, signal=name)
        )

    async def remove(self, container_id: str) -> None:
        """Removes a container, by force, and returns when there is none, however long the daemon takes."""
        pause, said = RETRY[0], ""
        while True:
            try:
                await self._daemon.call(
                    self._daemon.patience.end,
                    partial(APIClient.remove_container, container=container_id, v=True, force=True),
                )
            except Absent:
                return
            except DockerFailed as error:  # 409: somebody else is removing it just now
                if str(error) != said and getattr(error, "status", 0) != 409:
                    log.warning("container.unremovable", container=container_id[:12], reason=str(error))
                said = str(error)
            else:
                return
            await asyncio.sleep(pause)
            pause = min(RETRY[1], pause * 2)
