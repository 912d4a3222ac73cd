"""Pretended cards: an `nvidia-smi` on the PATH that reads what model servers write into a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lifecycle.harness import SERVER, Service

QUICK = {"settle": "0s", "samples": 3, "spacing": "50ms"}
KIND = "NVIDIA H200, pretended"
TOTAL = 24576

PROGRAM = f"""#!/bin/sh
cd "$(dirname "$0")" || exit 1
living() {{ read -r _ _ state _ 2>/dev/null < "/proc/${{1##*.}}/stat" && [ "$state" != Z ]; }}
case "$*" in *query-compute-apps*)
    printf . >> asked
    case "$(cat apps)" in hide) exit 0;; hang) exec sleep 30;; esac
    for file in use/*.*; do
        living "$file" && read -r mib < "$file" && name="${{file#use/}}" &&
            echo "GPU-${{name%%.*}}, ${{file##*.}}, $mib"
    done
    exit 0;;
esac
for card in 0 1; do
    used=0
    for file in use/$card.*; do
        living "$file" && read -r mib < "$file" && used=$((used + mib))
    done
    echo "$card, GPU-$card, {KIND}, {TOTAL}, $used, $(({TOTAL} - used))"
done
"""
"""A file in `use`, CARD.PID, says how many MiB a process has of a card, as long as it lives."""


class Cards:
    """Two cards of 24 GiB, and strangers that use them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.use = folder, folder / "use"
        self.use.mkdir(parents=True)
        self.say("")
        program = folder / "nvidia-smi"
        program.write_text(PROGRAM)
        program.chmod(0o755)
        self._strangers: list[subprocess.Popen[bytes]] = []

    def take(self, card: str, pid: int, mib: int) -> None:
        """That process has so much of that card from now on."""
        new = self.use / "new"
        new.write_text(f"{mib}\n")
        new.replace(self.use / f"{card}.{pid}")

    def stranger(self, mib: int, card: str = "0") -> None:
        """A process of somebody else that takes memory."""
        command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        self._strangers.append(process)
        self.take(card, process.pid, mib)

    def say(self, word: str) -> None:
        """Changes what the program does when it is asked for processes: hide, hang, or nothing."""
        new = self.folder / "apps.new"
        new.write_text(word)
        new.replace(self.folder / "apps")

    def asked(self) -> int:
        """How often it was asked for processes."""
        asked = self.folder / "asked"
        return asked.stat().st_size if asked.exists() else 0

    def model(self, hold: int, *flags: str, **keys: Any) -> dict[str, Any]:
        """A model whose child takes so much of each of its cards."""
        command = [sys.executable, str(SERVER), "--port", "{port}", "--on", "{devices}", "--hold", str(hold)]
        return {"engine": "command", "command": [*command, "--use", str(self.use), *flags], **keys}

    def service(self, folder: Path, models: dict[str, Any], **footprints: Any) -> Service:
        """A service with these two cards."""
        devices = [{"id": "0", "budget": 1}, {"id": "1", "budget": 1}]
        return Service(folder, models, devices=devices, footprints={**QUICK, **footprints})

    def close(self) -> None:
        """Ends the strangers."""
        for process in self._strangers:
            process.communicate()


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cards]:
    """An `nvidia-smi` first on the PATH that shows them."""
    found = Cards(tmp_path / "cards")
    monkeypatch.setenv("PATH", f"{found.folder}:{os.environ['PATH']}")
    yield found
    found.close()
