"""Images: there, or pulled with progress in the log, or a reason why not."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import structlog
from docker.api.client import APIClient
from docker.utils import parse_repository_tag

from tidegate_lifecycle.runtimes.base import StartFailed
from tidegate_lifecycle.runtimes.docker import words
from tidegate_lifecycle.runtimes.docker.daemon import Absent, Daemon, DockerFailed, spawn, translated

log = structlog.get_logger("tidegate.docker")

TOLD_EVERY = 5.0
"""Seconds between two lines about a pull."""


class Images:
    """Makes sure that images are on the Docker host. An image is pulled once at a time, whoever asks."""

    def __init__(self, daemon: Daemon, pull: str) -> None:
        self._daemon = daemon
        self._pull = pull
        """missing, always or never."""
        self._pulls: dict[str, asyncio.Task[None]] = {}

    async def ensure(self, image: str) -> None:
        """Returns when the image is there; StartFailed with the reason when it can't be.

        A pull goes on when its caller is cancelled: the next start finds it further.
        """
        if self._pull != "always" and await self._present(image):
            return
        if self._pull == "never":
            text = f"the image {image} isn't on the Docker host, and lifecycle.docker.pull is never"
            raise StartFailed(text)
        task = self._pulls.get(image)
        if task is None:
            task = self._pulls[image] = asyncio.create_task(self._fetch(image), name=f"pull {image}")
            task.add_done_callback(lambda done: self._done(image, done))
        await asyncio.shield(task)

    def close(self) -> None:
        """Waits for no pull any more."""
        for task in self._pulls.values():
            task.cancel()

    def _done(self, image: str, task: asyncio.Task[None]) -> None:
        self._pulls.pop(image, None)
        if not task.cancelled():
            task.exception()  # seen, even if everybody who waited has gone

    async def _present(self, image: str) -> bool:
        try:
            await self._daemon.call(self._daemon.patience.look, partial(APIClient.inspect_image, image=image))
        except Absent:
            return False
        return True

    async def _fetch(self, image: str) -> None:
        """In a thread of its own: a pull takes minutes, and the other calls need theirs."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def end(error: Exception | None) -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def pull() -> None:
            error: Exception | None = None
            try:
                self._fetch_blocking(image)
            except Exception as found:  # noqa: BLE001 - the waiting task gets it
                error = found
            try:
                loop.call_soon_threadsafe(end, error)
            except RuntimeError:  # the loop is closed: nobody waits
                return

        log.info("image.pulling", image=image)
        began = loop.time()
        spawn(pull, "tidegate-docker-pull")
        try:
            await done
        except DockerFailed as error:
            raise StartFailed(f"the image {image} can't be pulled: {error}") from error
        log.info("image.pulled", image=image, seconds=round(loop.time() - began, 1))

    def _fetch_blocking(self, image: str) -> None:
        repository, tag = parse_repository_tag(image)
        try:
            with contextlib.closing(self._daemon.client(self._daemon.patience.pull)) as client:
                follow(image, client.pull(repository, tag=tag or "latest", stream=True, decode=True))
        except DockerFailed:
            raise
        except Exception as error:
            raise translated(error) from error


def follow(image: str, entries: Iterable[Mapping[str, Any]]) -> None:
    """Reads a pull's progress to its end, telling now and then how far it is; DockerFailed when it fails."""
    layers: dict[str, tuple[int, int]] = {}
    told = time.monotonic()
    for entry in entries:
        if entry.get("error"):
            raise DockerFailed(words.why(str(entry["error"])))
        detail = entry.get("progressDetail") or {}
        if entry.get("status") == "Downloading" and detail.get("total"):
            layers[str(entry.get("id"))] = int(detail.get("current") or 0), int(detail["total"])
        elif entry.get("status") in ("Download complete", "Pull complete") and str(entry.get("id")) in layers:
            total = layers[str(entry.get("id"))][1]
            layers[str(entry.get("id"))] = total, total
        if layers and time.monotonic() - told >= TOLD_EVERY:
            told = time.monotonic()
            have, total = (sum(part) for part in zip(*layers.values(), strict=True))
            log.info("image.progress", image=image, mib=have >> 20, of_mib=total >> 20)
