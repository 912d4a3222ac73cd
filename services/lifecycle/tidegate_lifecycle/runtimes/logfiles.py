"""Log files of model servers: bounded while a server writes them, and read from the end.

A server writes its file itself, opened for appending. So the file can be cut at any time: the next write
goes to the new end. When it is over its limit, its last part is kept beside it (`.old`) and it is emptied;
lines written in the microseconds between the two are lost, which a log can bear. The bound is the limit, the
kept part, and what a server writes between two looks at it.

Everything here reads files: called in a thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path

from tidegate_lifecycle.runtimes.records import file_name

LIMIT = 8 << 20
"""Bytes that a log file may hold before it is cut."""
KEPT = 1 << 20
"""Bytes of its end that are kept beside it when it is cut."""
_CHUNK = 1 << 16
_LONGEST = 1 << 20
_LINE_LIMIT = 4000


def bound(path: Path, limit: int = LIMIT, kept: int = KEPT) -> bool:
    """Cuts a file that has grown over `limit` bytes on disk; True when it did."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        # A program that opened /dev/stdout anew doesn't append: cut, it leaves a hole, which takes no space.
        if min(found.st_size, found.st_blocks * 512) <= limit:
            return False
        end = os.pread(fd, kept, max(0, found.st_size - kept))
        _old(path).write_bytes(end.lstrip(b"\0"))
        os.ftruncate(fd, 0)
        return True
    except OSError:  # disk full: emptying is then what helps
        os.ftruncate(fd, 0)
        return True
    finally:
        os.close(fd)


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, raw, without line ends; those kept from before a cut included."""
    found = _tail(path, lines)
    return found if len(found) >= lines else _tail(_old(path), lines - len(found)) + found


def since(path: Path, position: int) -> tuple[list[str], int]:
    """The whole lines from a byte position on, and the next position. After a cut it begins anew."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            position = 0 if position > size else position
            file.seek(position)
            data = file.read(_LONGEST)
    except OSError:
        return [], 0
    end = data.rfind(b"\n") + 1
    if not end and len(data) >= _CHUNK:
        end = len(data)  # a line without an end is not waited for
    return _lines(data[:end]), position + end


def size(path: Path) -> int:
    """Bytes in the file; 0 when there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def remove(path: Path) -> None:
    """Removes a log and what was kept of it."""
    path.unlink(missing_ok=True)
    _old(path).unlink(missing_ok=True)


def _old(path: Path) -> Path:
    return path.with_suffix(".old")


def _tail(path: Path, lines: int) -> list[str]:
    if lines <= 0:
        return []
    data = b""
    try:
        with open(path, "rb") as file:
            position = os.fstat(file.fileno()).st_size
            while position > 0 and data.count(b"\n") <= lines and len(data) < 16 * _LONGEST:
                step = min(_CHUNK, position)
                position -= step
                file.seek(position)
                data = file.read(step) + data
    except OSError:
        return []
    return _lines(data)[-lines:]


def _lines(data: bytes) -> list[str]:
    text = data.lstrip(b"\0").decode("utf-8", "replace")
    return [shown(line) for line in text.split("\n")[: _count(text)]]


def shown(line: str) -> str:
    """A line as a terminal shows it: a progress bar goes back with \\r, what it showed last is its line."""
    return line.rstrip("\r").rsplit("\r", 1)[-1][:_LINE_LIMIT]


def _count(text: str) -> int:
    parts = text.count("\n") + 1
    return parts - 1 if text.endswith("\n") or not text else parts


KEPT_PER_MODEL = 5
"""Log files of ended servers that are kept of each model."""


class LogFolder:
    """All logs: a folder per model, in it a file per instance. The newest is last by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self, model: str, instance_id: str, at: float | None = None) -> Path:
        """The path for an instance's log, in a folder that exists; `at`: its start, now when not given."""
        folder = self.folder / file_name(model)
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{int((time.time() if at is None else at) * 1000):013d}-{file_name(instance_id)}.log"

    def tail(self, model: str, lines: int) -> list[str]:
        """The last lines of the model's newest log."""
        path = self._newest(model)
        return tail(path, lines) if path else []

    def since(self, model: str, offset: int | None) -> tuple[list[str], int]:
        """Whole lines since the offset (None = from the end), and the next offset.

        An offset holds the file's number and a position, so that a newer file is read from its start.
        """
        path = self._newest(model)
        if path is None:
            return [], 0
        number = int(path.name.split("-")[0])
        if offset is None:
            return [], number << 40 | size(path)
        lines, position = since(path, offset & (1 << 40) - 1 if offset >> 40 == number else 0)
        return lines, number << 40 | position

    def drop(self, used: Collection[str]) -> None:
        """Removes old logs that aren't in `used`, but the newest few of each model."""
        for folder in self.folder.iterdir():
            files = sorted(path for path in folder.glob("*.log") if str(path) not in used)
            for path in files[:-KEPT_PER_MODEL]:
                remove(path)

    def _newest(self, model: str) -> Path | None:
        return max((self.folder / file_name(model)).glob("*.log"), default=None)
