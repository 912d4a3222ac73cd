"""A model server that is a container."""

from __future__ import annotations

import asyncio
import time

from tidegate_lifecycle.runtimes.docker.container import Inspected


class DockerServer:
    """A model server that is a container; see `Server`."""

    def __init__(self, found: Inspected, adopted: bool, ready: bool) -> None:
        self.container_id = found.id
        self.found = found
        self.adopted = adopted
        """It was started by a process before this one."""
        self.was_ready = ready
        self.age = max(0.0, time.time() - found.started) if found.started else 0.0
        self.out_of_memory = False
        """Docker told so."""
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        state = self.ended.result() if self.ended.done() else "running"
        return f"<{self.instance_id} container {self.container_id[:12]} {state}>"

    @property
    def instance_id(self) -> str:
        return self.found.instance_id

    @property
    def model(self) -> str:
        return self.found.model

    @property
    def signature(self) -> str:
        return self.found.signature

    @property
    def address(self) -> str:
        return self.found.address

    @property
    def device_ids(self) -> tuple[str, ...]:
        return self.found.device_ids

    @property
    def reserved_mib(self) -> int:
        return self.found.reserved_mib

    @property
    def pid(self) -> int:
        return self.found.pid

    async def exited(self) -> str:
        return await asyncio.shield(self.ended)

    def end(self, words: str) -> None:
        """It has ended so; only the first word counts."""
        if not self.ended.done():
            self.ended.set_result(words)
