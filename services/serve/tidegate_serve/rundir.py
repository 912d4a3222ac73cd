"""The private directory of a running `tidegate serve`: its sockets, and where other commands find them.

`serve.json` in it says which configuration is served and at which addresses. The directory's name holds the
user and the process, so one that a killed process left behind is known, passed over, and removed by the next
start.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

_RECORD = "serve.json"


@contextlib.contextmanager
def made() -> Iterator[str]:
    """A private directory with a short path (a socket's path ends at 108 characters), removed at the end.

    Directories whose process is gone (killed) are removed first.
    """
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    if len(str(base)) > 60 or not os.access(base, os.W_OK):
        base = Path("/tmp")  # noqa: S108 - mkdtemp makes a private directory in it
    for old in _own(base):
        if not _lives(old):
            shutil.rmtree(old, ignore_errors=True)
    directory = tempfile.mkdtemp(prefix=f"{_prefix()}{os.getpid()}-", dir=base)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def record(directory: Path, config: Path, addresses: Mapping[str, str]) -> None:
    """Says what is served here: the addresses of the services, by their names."""
    said = {"config": str(config.resolve()), "addresses": dict(addresses)}
    (directory / _RECORD).write_text(json.dumps(said))


def find(config: Path) -> dict[str, str]:
    """The addresses of a running `serve` of this user with this configuration; empty when none is found."""
    wanted = str(config.resolve())
    bases = {os.environ.get("XDG_RUNTIME_DIR") or "/tmp", tempfile.gettempdir(), "/tmp"}  # noqa: S108
    bases.add(f"/run/user/{os.getuid()}")  # a login session has it, a system service has not, or vice versa
    for directory in (one for base in sorted(bases) for one in _own(Path(base)) if _lives(one)):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads((directory / _RECORD).read_text())
            if said["config"] == wanted:
                return {str(name): str(address) for name, address in said["addresses"].items()}
    return {}


def _prefix() -> str:
    return f"tidegate-{os.getuid()}-"


def _own(base: Path) -> list[Path]:
    """This user's directories; one that another user has made under such a name is none."""
    found = []
    for directory in base.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):
            if directory.lstat().st_uid == os.getuid():
                found.append(directory)
    return found


def _lives(directory: Path) -> bool:
    pid = directory.name.removeprefix(_prefix()).partition("-")[0]
    return not pid.isdigit() or Path("/proc", pid).exists()
