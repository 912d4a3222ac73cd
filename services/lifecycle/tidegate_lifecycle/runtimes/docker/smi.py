"""nvidia-smi in a container, a new one for each question: where only Docker has the driver's tools."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Sequence

from docker.api.client import APIClient
from docker.errors import APIError
from docker.types import DeviceRequest, LogConfig

from tidegate_lifecycle.devices.smi import DEADLINE, PROGRAM, Unreadable, checked
from tidegate_lifecycle.runtimes.base import StartFailed
from tidegate_lifecycle.runtimes.docker.daemon import Daemon, Declined, DockerFailed
from tidegate_lifecycle.runtimes.docker.images import Images

LABEL = "tidegate.smi"
"""Label: the installation that a container with nvidia-smi belongs to. It is no model server."""
MEMORY = 256 << 20
"""Bytes that it may use."""
SLACK = 10.0
"""Seconds more than the program's own deadline: for making, starting and removing the container."""


class ContainerSmi:
    """One container at a time, gone once it has answered; the next one removes what a kill -9 left."""

    every = 1.0

    def __init__(
        self, daemon: Daemon, images: Images, image: str, owner: Callable[[], str], random: Callable[[], str]
    ) -> None:
        self._daemon, self._images, self._image = daemon, images, image
        self._owner, self._random = owner, random
        self._one = asyncio.Lock()

    async def ask(self, *arguments: str, deadline: float = DEADLINE) -> str:
        """See `Smi.ask`; a pull of its image isn't counted."""
        async with self._one:
            try:
                await self._images.ensure(self._image)
                output, status = await self._daemon.call(
                    deadline + SLACK, lambda client: self._run(client, arguments, deadline)
                )
            except (DockerFailed, StartFailed) as error:
                raise Unreadable(f"nvidia-smi in a container of {self._image}: {error}") from error
        return checked(output, status)

    async def close(self) -> None:
        """Nothing to leave: each container is removed by the call that made it."""

    def _run(self, client: APIClient, arguments: Sequence[str], deadline: float) -> tuple[str, int]:
        """In a thread, to its end, whoever still waits for it: output and exit status."""
        self._sweep(client)
        made = client.create_container(
            self._image,
            name=f"tidegate-nvidia-smi-{self._random()}",
            labels={LABEL: self._owner()},
            entrypoint=[PROGRAM],
            command=list(arguments),
            use_config_proxy=False,
            host_config=client.create_host_config(
                device_requests=[DeviceRequest(count=-1, capabilities=[["gpu", "utility"]])],
                network_mode="none",
                pid_mode="host",  # else it sees no processes on the cards
                cap_drop=["ALL"],
                security_opt=["no-new-privileges:true"],
                mem_limit=MEMORY,
                pids_limit=64,
                log_config=LogConfig(type=LogConfig.types.JSON, config={"max-size": "1m"}),
            ),
        )
        container = str(made["Id"])
        try:
            client.start(container)
            status = int(client.wait(container, timeout=math.ceil(deadline))["StatusCode"])
            output = client.logs(container, stdout=True, stderr=True)
            return bytes(output).decode(errors="replace"), status
        finally:
            _remove(client, container)

    def _sweep(self, client: APIClient) -> None:
        for old in client.containers(all=True, filters={"label": [f"{LABEL}={self._owner()}"]}):
            if not _remove(client, str(old["Id"])):
                text = f"an earlier container ({old['Id'][:12]}) can't be removed: it hangs in the driver"
                raise Declined(text, 409, text)


def _remove(client: APIClient, container: str) -> bool:
    with contextlib.suppress(APIError):
        client.remove_container(container, v=True, force=True)
    return not client.containers(all=True, filters={"id": container})
