"""An image of the simulator, built from deploy/ and this tree: once for each state of the tree."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import tempfile
from pathlib import Path

from docker.errors import APIError

from tests.support import containers

ROOT = Path(__file__).resolve().parents[2]
NAME = "tidegate-simulator-test"
_PARTS = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "protos", "services", "deploy")


@functools.cache
def image() -> str:
    """Its name; built when there is none of this tree. Earlier ones are removed, if nothing uses them."""
    tag = f"{NAME}:{_digest()}"
    with (Path(tempfile.gettempdir()) / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers want it too
        with containers.engine() as client:
            client.timeout = 600
            if not client.images(tag):
                said = client.build(
                    path=str(ROOT), dockerfile="deploy/simulator.Dockerfile", tag=tag, rm=True, decode=True
                )
                lines = [str(entry.get("stream") or entry.get("error") or "") for entry in said]
                assert client.images(tag), "".join(lines)[-4000:]
            for old in client.images(NAME):
                for name in set(old.get("RepoTags") or ()) - {tag}:
                    with contextlib.suppress(APIError):
                        client.remove_image(name)
    return tag


def _digest() -> str:
    found = hashlib.sha256()
    for part in _PARTS:
        for path in sorted([ROOT / part, *(ROOT / part).rglob("*")]):
            if path.is_file() and "__pycache__" not in path.parts:
                found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]
