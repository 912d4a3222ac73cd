"""What must be remembered of containers and can't be in their labels, which never change: small files.

The name of this installation is on every container's label; that a server was ready is a file of its own.
Synchronous: called in a thread.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection
from pathlib import Path

from tidegate_lifecycle.runtimes.records import file_name


class Notes:
    """A folder with an empty file for each container that was ready."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._folder = data_dir / "containers"

    def open(self) -> str:
        """Makes the folder and gives the installation's name: random, made once. OSError when it can't."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(self._folder))
        path = self._data_dir / "installation"
        if not path.exists():
            temporary = path.with_suffix(".new")
            with open(temporary, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(8))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fd = os.open(self._data_dir, os.O_RDONLY | os.O_DIRECTORY)
            os.fsync(fd)  # the name must outlive the containers that bear it
            os.close(fd)
        return path.read_text(encoding="ascii").strip()

    def mark(self, instance_id: str) -> None:
        """It was ready."""
        self._path(instance_id).touch(mode=0o600)

    def marked(self, instance_id: str) -> bool:
        """Whether it was."""
        return self._path(instance_id).exists()

    def forget(self, instance_id: str) -> None:
        """It is gone."""
        self._path(instance_id).unlink(missing_ok=True)

    def sweep(self, living: Collection[str]) -> None:
        """Forgets all others."""
        known = {self._path(instance_id) for instance_id in living}
        for path in self._folder.iterdir():
            if path not in known:
                path.unlink(missing_ok=True)

    def _path(self, instance_id: str) -> Path:
        return self._folder / file_name(instance_id)
