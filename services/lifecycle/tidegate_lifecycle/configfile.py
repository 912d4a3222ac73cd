"""Watches the configuration file: it is checked when it has changed, and the reconciler is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from tidegate_chassis.watch import FileWatch
from tidegate_lifecycle.messages import ConfigRefused, Message, Reloaded
from tidegate_lifecycle.reload import needs_restart
from tidegate_lifecycle.settings import Loaded, policy, reload

log = structlog.get_logger("tidegate.config")

AT_START = ("edge", "admission", "tenants", "tls")
"""Sections that are read at the start of a service alone, most of them by other ones."""


class ConfigFile:
    """One file, and what it said last. It is read in a thread."""

    def __init__(self, started: Loaded, post: Callable[[Message], None]) -> None:
        """`started` is what the service was started with."""
        self._started, self._post = started, post
        self._path = started.document.path
        self._said = started.document.sections
        self._refused: tuple[str, ...] = ()

    async def run(self, asked: asyncio.Event) -> None:
        """Until cancelled. `asked`, which is cleared, has the file read at once, changed or not."""
        watch = FileWatch(self._path)
        while True:
            at_once = await watch.changed(asked)
            await self._examine(at_once)

    async def _examine(self, at_once: bool) -> None:
        """1. It says what it said before (a comment has changed, say): nothing to tell, unless asked to.
        2. It can't be used: what is wrong with it. 3. What it says now."""
        loaded, found = await asyncio.to_thread(reload, self._path, self._started)
        errors = tuple(str(problem) for problem in found if not problem.warning)
        same = errors == self._refused and (loaded is None or loaded.document.sections == self._said)
        if same and not at_once:  # 1
            return
        self._refused = errors
        if loaded is None:  # 2
            log.error("the configuration file is refused; what was in effect stays", problems=errors)
            self._post(ConfigRefused(errors))
            return
        self._said = loaded.document.sections  # 3
        for problem in found:
            log.warning("odd in the configuration file", problem=str(problem))
        keys = self._needs_restart(loaded)
        if keys:
            log.warning("only a restart puts these keys into effect", keys=keys)
        self._post(Reloaded(loaded.catalog, policy(loaded.lifecycle), keys))

    def _needs_restart(self, loaded: Loaded) -> tuple[str, ...]:
        started = self._started
        before, after = started.document, loaded.document
        keys = needs_restart(started.lifecycle, loaded.lifecycle, "lifecycle")
        if loaded.needs_devices and not started.needs_devices and "lifecycle.devices" not in keys:
            keys += ("lifecycle.devices",)  # they weren't looked at, because no model was to run here
        keys += needs_restart(started.telemetry, loaded.telemetry, "telemetry")
        return keys + tuple(name for name in AT_START if before.section(name) != after.section(name))
