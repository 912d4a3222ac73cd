"""What /proc tells about processes. Everything here reads files, so it is called in a thread.

A pid alone names nobody: it is used again. A process is named by its pid, its start time and the boot.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Stat:
    """One process, as /proc/<pid>/stat shows it."""

    pid: int
    state: str
    """One letter; Z and X are dead."""
    group: int
    """Its process group."""
    session: int
    """Its session: the pid of the process that called setsid."""
    started: int
    """Start time in clock ticks since boot (field 22)."""

    @property
    def dead(self) -> bool:
        """A zombie holds no memory and no port; only its number is still taken."""
        return self.state in "ZX"


def boot_id() -> str:
    """Names this boot of the machine; start times of different boots can't be compared."""
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()


def stat(pid: int) -> Stat | None:
    """A process, or None when there is none (any more)."""
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:  # ESRCH too: it ended while we read
        return None
    fields = text[text.rindex(b")") + 2 :].split()  # the name before it may hold spaces and brackets
    return Stat(pid, fields[0].decode(), int(fields[2]), int(fields[3]), int(fields[19]))


def processes() -> list[Stat]:
    """All processes that this user can see."""
    pids = (int(name) for name in os.listdir(_PROC) if name.isdigit())
    return [found for found in map(stat, pids) if found]


def has_variable(pid: int, assignment: str) -> bool:
    """True when the process was started with `NAME=value` in its environment.

    A program that writes its own title (setproctitle) overwrites this; see `writes_to` for the other clue.
    """
    try:
        return assignment.encode() in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def writes_to(pid: int, file: Path) -> bool:
    """True when the process has the file as its standard output or standard error."""
    for fd in (1, 2):
        try:
            if os.readlink(_PROC / str(pid) / "fd" / str(fd)).removesuffix(" (deleted)") == str(file):
                return True
        except OSError:
            continue
    return False


def age(started: int) -> float:
    """Seconds since a process of this boot was started."""
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started / _TICKS)
