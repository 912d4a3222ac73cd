"""Logs of containers: Docker keeps them while a container exists; its last lines outlive it in a file.

The file lies where logs of processes lie too. Its lines begin with Docker's time stamps, which tell what
somebody who follows a log has seen already.
"""

from __future__ import annotations

import asyncio
import calendar
import time
from pathlib import Path

import structlog

from tidegate_lifecycle.runtimes import logfiles
from tidegate_lifecycle.runtimes.base import Lines
from tidegate_lifecycle.runtimes.docker.daemon import Daemon, DockerFailed

log = structlog.get_logger("tidegate.docker")

KEPT_LINES = 2000
"""Lines of a container's log that outlive it."""
_MOST = 10_000
_Stamped = list[tuple[int, str]]
"""Lines with their time, in nanoseconds since the epoch."""


class LastWords:
    """Reads logs of containers and of those that were."""

    def __init__(self, daemon: Daemon, folder: Path) -> None:
        self._daemon = daemon
        self._folder = logfiles.LogFolder(folder)

    async def tail(self, model: str, container_id: str | None, lines: int) -> Lines:
        """The last lines of that container; without one those of the model's last one."""
        found = await self._container(container_id, lines) if container_id else None
        if found is None:
            found = await asyncio.to_thread(self._kept, model, lines)
        return [text for _, text in found]

    async def since(self, model: str, container_id: str | None, offset: int | None) -> tuple[Lines, int]:
        """Lines after the offset, a time in nanoseconds; None = from now on."""
        if offset is None:
            found = await self._container(container_id, 1) if container_id else None
            if found is None:
                found = await asyncio.to_thread(self._kept, model, 1)
            return [], found[-1][0] if found else 0
        found = await self._container(container_id, _MOST, offset) if container_id else None
        if found is None:
            found = await asyncio.to_thread(self._kept, model, _MOST)
        new = [(stamp, text) for stamp, text in found if stamp > offset]
        return [text for _, text in new], new[-1][0] if new else offset

    async def keep(self, model: str, instance_id: str, container_id: str, created: float) -> None:
        """Writes the last lines of a container that is about to be removed into a file."""
        found = await self._container(container_id, KEPT_LINES)
        if found is not None:
            try:
                await asyncio.to_thread(self._write, model, instance_id, created, found)
            except OSError as error:
                log.warning("log.unwritable", instance=instance_id, error=error.strerror)

    async def drop(self) -> None:
        """Drops the files but the newest few of each model."""
        try:
            await asyncio.to_thread(self._folder.drop, ())
        except OSError as error:
            log.warning("logs.unreadable", error=error.strerror)

    async def _container(self, container_id: str, lines: int, offset: int = 0) -> _Stamped | None:
        """None when Docker has no such log any more, or gives none."""
        since = offset // 1_000_000_000 or None
        try:
            data = await self._daemon.call(
                self._daemon.patience.look,
                lambda client: client.logs(container_id, timestamps=True, tail=lines, since=since),
            )
        except DockerFailed as error:
            log.debug("log.unreadable", container=container_id[:12], reason=str(error))
            return None
        return await asyncio.to_thread(_parse, data)

    def _kept(self, model: str, lines: int) -> _Stamped:
        return _parse("\n".join(self._folder.tail(model, lines)).encode())

    def _write(self, model: str, instance_id: str, created: float, found: _Stamped) -> None:
        path = self._folder.create(model, instance_id, created)
        text = "".join(f"{_stamp(at)} {line}\n" for at, line in found)
        path.touch(mode=0o600)
        path.write_text(text, encoding="utf-8")


def _parse(data: bytes) -> _Stamped:
    found: _Stamped = []
    for line in data.decode("utf-8", "replace").split("\n"):
        stamp, _, text = line.partition(" ")
        at = _nanoseconds(stamp)
        if at:
            found.append((at, logfiles.shown(text)))
    return found


def _nanoseconds(stamp: str) -> int:
    whole, dot, rest = stamp.removesuffix("Z").partition(".")
    try:
        at = calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S"))
        return at * 1_000_000_000 + (int(f"{rest[:9]:0<9}") if dot else 0)
    except ValueError:
        return 0


def _stamp(at: int) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at // 1_000_000_000))}.{at % 1_000_000_000:09d}Z"
