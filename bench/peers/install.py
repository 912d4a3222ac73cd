"""The peers, each in an environment of its own under `bench/out/peers`; nothing of the system is changed.

Debian packages are unpacked there, with what they need and the system lacks, unless they are installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "bench" / "out" / "peers"
PYTHON = {"vllm-router": "vllm-router==0.1.17", "sglang-router": "sglang-router==0.3.2",
          "litellm": "litellm[proxy]==1.106.0"}  # fmt: skip
NODE = {"portkey": {"dependencies": {"@portkey-ai/gateway": "1.15.2"},
                    "overrides": {"@hono/node-server": "1.13.8"}}}  # fmt: skip
"""Packages: Portkey fails with every stream under the newest of the servers that it allows."""
DEBIAN = ("nginx", "haproxy", "wrk")
_VERSION = re.compile(r"\d+(?:\.\d+)+")
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu",
              "lib/aarch64-linux-gnu", "usr/lib")  # fmt: skip
_PATIENCE = 600.0
"""Seconds that one installation may take."""


class Missing(Exception):
    """A peer can't be had here; its text says why."""


@dataclass(frozen=True)
class Peer:
    """An installed program."""

    path: Path
    """What is run: a program, or the folder of an environment."""
    version: str
    environ: dict[str, str]
    """What it needs of the environment, beside what is there."""


def install(name: str) -> Peer:
    """Installs a peer unless it is there. Raises Missing."""
    try:
        if name in PYTHON:
            return _python(name, PYTHON[name])
        if name in NODE:
            return _node(name, NODE[name])
        return _debian(name)
    except (OSError, subprocess.SubprocessError) as error:
        raise Missing(f"{name} can't be installed: {_said(error)}") from None


def _python(name: str, wanted: str) -> Peer:
    folder = OUT / name
    if not _is_done(folder, wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=_PATIENCE)
        _run([str(folder / "bin" / "pip"), "install", "--quiet", wanted])
        (folder / ".done").write_text(wanted)
    return Peer(folder, wanted.partition("==")[2], {})


def _node(name: str, package: dict[str, dict[str, str]]) -> Peer:
    if shutil.which("npm") is None or shutil.which("node") is None:
        raise Missing(f"{name} needs node and npm")
    folder, wanted = OUT / name, json.dumps(package)
    if not _is_done(folder, wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "package.json").write_text(wanted)
        _run(["npm", "install", "--no-audit", "--no-fund"], cwd=folder)
        (folder / ".done").write_text(wanted)
    return Peer(folder, next(iter(package["dependencies"].values())), {})


def _debian(name: str) -> Peer:
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found:
        return _program(Path(found), {})
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Missing(f"{name} isn't installed, and there is no apt-get to have it from")
    folder = OUT / name
    if not _is_done(folder, name):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        plan = _run(["apt-get", "install", "--simulate", "--no-install-recommends", name])
        needed = re.findall(r"^Inst (\S+)", plan, re.MULTILINE)
        _run(["apt-get", "download", *needed], cwd=folder)
        for package in folder.glob("*.deb"):
            _run(["dpkg", "-x", str(package), str(folder)])
        (folder / ".done").write_text(name)
    libraries = ":".join(str(folder / part) for part in _LIBRARIES if (folder / part).is_dir())
    program = next(path for path in (folder / "usr/sbin" / name, folder / "usr/bin" / name) if path.exists())
    return _program(program, {"LD_LIBRARY_PATH": libraries})


def _program(path: Path, environ: dict[str, str]) -> Peer:
    said = subprocess.run(
        [str(path), "-v"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environ,
        timeout=10,
    )
    version = _VERSION.search(said.stdout)
    if version is None:
        raise Missing(f"{path.name} doesn't run: {said.stdout.strip()[-200:]}")
    return Peer(path, version[0], environ)


def _is_done(folder: Path, wanted: str) -> bool:
    mark = folder / ".done"
    return mark.exists() and mark.read_text() == wanted


def _run(command: list[str], cwd: Path | None = None) -> str:
    print(f"installing: {' '.join(command)}", flush=True)
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_PATIENCE)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def _said(error: Exception) -> str:
    """The last line of what a command said, else the error itself."""
    said = getattr(error, "stderr", None)
    return said.strip().splitlines()[-1][:200] if said and said.strip() else str(error)
