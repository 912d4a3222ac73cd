"""The on-disk record of each process instance: how a restarted service finds what runs.

A record is written before its process exists (an intent: pid 0) and again with the pid. A crash between the
two leaves an intent, whose process is found by the instance id in its environment or by its log file.
Synchronous: called in a thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "TIDEGATE_INSTANCE"
"""Environment variable that names its instance to a model server, and the server to us."""


@dataclass(frozen=True)
class Record:
    """What is known of an instance."""

    instance_id: str
    model: str
    signature: str
    host: str
    port: int
    device_ids: list[str]
    reserved_mib: int
    log: str
    """Its log file, absolute."""
    boot: str
    """The boot of the machine it was started in."""
    pid: int = 0
    """Process id, process group and session at once; 0 = only meant to start."""
    started: int = 0
    """Start time in clock ticks since boot."""
    ready: bool = False
    """It was healthy once."""


def file_name(name: str) -> str:
    """A file name for an id or a model's name: readable, unique, of any length that names have."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


class Records:
    """A folder with one file per instance."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, record: Record) -> None:
        """Writes or replaces a record: after a crash at any instruction it is there whole, old or new."""
        path = self._path(record.instance_id)
        temporary = path.with_suffix(".new")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(asdict(record), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._sync()

    def remove(self, instance_id: str) -> None:
        """Removes a record; nothing happens when there is none."""
        self._path(instance_id).unlink(missing_ok=True)
        self._sync()

    def read(self) -> tuple[list[Record], list[Path]]:
        """All records, and the files that are none (somebody else wrote there, or the disk is at fault).

        Nothing else may be writing meanwhile: what a killed process had half written is removed.
        """
        for leftover in self.folder.glob("*.new"):
            leftover.unlink(missing_ok=True)
        records, damaged = [], []
        for path in sorted(self.folder.glob("*.json")):
            try:
                records.append(Record(**json.loads(path.read_text(encoding="utf-8"))))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError):
                damaged.append(path)
        return records, damaged

    def _path(self, instance_id: str) -> Path:
        return self.folder / f"{file_name(instance_id)}.json"

    def _sync(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
