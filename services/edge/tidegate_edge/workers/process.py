"""One worker's process, as the master sees it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from dataclasses import dataclass, field

from tidegate_edge.workers.link import Link
from tidegate_edge.workers.sums import Families


@dataclass(eq=False)
class Worker:
    """One process. `families` is what it told last of its metrics; `last`: it will tell no more."""

    number: int
    cell: int
    process: asyncio.subprocess.Process
    link: Link
    started: float
    listening: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    retiring: bool = False
    last: bool = False
    families: Families = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def state(self) -> str:
        """For people."""
        return "retiring" if self.retiring else "serving" if self.listening.is_set() else "starting"

    @property
    def ending(self) -> str:
        """How it has ended, for people."""
        status = self.process.returncode
        if status is not None and status < 0:
            return f"signal {signal.Signals(-status).name}"
        return f"status {status}"

    def kill(self) -> None:
        """Ends it at once. May be called again."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
