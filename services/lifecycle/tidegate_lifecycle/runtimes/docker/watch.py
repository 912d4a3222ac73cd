"""What happens to containers, as it happens: Docker's stream of events, read by a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from tidegate_lifecycle.runtimes.docker.container import INSTANCE, OWNER
from tidegate_lifecycle.runtimes.docker.daemon import Daemon, spawn, translated

log = structlog.get_logger("tidegate.docker")

AGAIN_IN = (0.2, 2.0)
"""Seconds before the stream is opened again: after the first failure, and at most."""


@dataclass(frozen=True)
class Event:
    """Something happened to a container of ours."""

    action: str
    """create, start, die, oom, destroy, kill ..."""
    container_id: str
    instance_id: str


class Watch:
    """The stream of events of one owner's containers, opened again whenever it ends.

    Nothing is missed: after each opening `connected` is called, and whoever wants to know all looks then.
    """

    def __init__(
        self, daemon: Daemon, owner: str, happened: Callable[[Event], None], connected: Callable[[bool], None]
    ) -> None:
        self._daemon, self._owner = daemon, owner
        self._happened, self._connected = happened, connected
        self._loop = asyncio.get_running_loop()
        self._closing = threading.Event()
        self._stream: Any = None
        self._thread = spawn(self._run, "tidegate-docker-events")

    def close(self) -> None:
        """Ends it. Blocks for a moment: called in a thread."""
        self._closing.set()
        stream = self._stream
        if stream is not None:
            with contextlib.suppress(Exception):  # it may have ended by itself in this very moment
                stream.close()
        self._thread.join(1.0)  # one that a hung daemon holds is left behind

    def _run(self) -> None:
        pause, said = AGAIN_IN[0], ""
        while not self._closing.is_set():
            try:
                with contextlib.closing(self._daemon.client(self._daemon.patience.look)) as client:
                    filters = {"type": "container", "label": f"{OWNER}={self._owner}"}
                    self._stream = client.events(decode=True, filters=filters)
                    if self._closing.is_set():
                        self._stream.close()
                        return
                    self._tell(self._connected, True)
                    pause, said = AGAIN_IN[0], ""
                    for entry in self._stream:
                        self._tell(self._happened, _event(entry))
                reason = "the stream of events ended"
            except Exception as error:  # noqa: BLE001 - whatever it was, the stream is opened again
                reason = str(translated(error))
            self._tell(self._connected, False)
            if reason != said and not self._closing.is_set():
                log.warning("docker.events_lost", reason=reason)
            said = reason
            self._closing.wait(pause)
            pause = min(AGAIN_IN[1], pause * 2)

    def _tell(self, what: Callable[[Any], None], value: object) -> None:
        if not self._closing.is_set():
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(what, value)


def _event(entry: Mapping[str, Any]) -> Event:
    actor = entry.get("Actor") or {}
    action = str(entry.get("Action") or entry.get("status") or "").partition(":")[0]
    return Event(action, str(actor.get("ID") or ""), (actor.get("Attributes") or {}).get(INSTANCE, ""))
