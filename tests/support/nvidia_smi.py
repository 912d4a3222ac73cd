"""A program called nvidia-smi, first on the PATH, that does what a test says."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

GIB = 1024


def card(uuid: str, used: int = 0, total: int = 24 * GIB, name: str = "NVIDIA L4") -> str:
    """A line of its answer, without the index."""
    return f"{uuid}, {name}, {total}, {used}, {total - used}, Disabled"


class NvidiaSmi:
    """A shell script; each change is seen by the next call."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def does(self, script: str) -> None:
        """Runs this from now on."""
        new = self._folder / "new"
        new.write_text(f"#!/bin/sh\necho x >> {self._folder}/calls\n{script}\n")
        new.chmod(0o755)
        new.replace(self._folder / "nvidia-smi")

    def shows(self, *cards: str) -> None:
        """Prints these cards, numbered."""
        self.prints(f"{index}, {line}" for index, line in enumerate(cards))

    def prints(self, lines: Iterable[str]) -> None:
        """Prints these lines."""
        self.does("cat <<'END'\n" + "\n".join(lines) + "\nEND")

    @property
    def calls(self) -> int:
        """How often it was run."""
        path = self._folder / "calls"
        return len(path.read_text().split()) if path.exists() else 0


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NvidiaSmi:
    """The program of one test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return NvidiaSmi(folder, monkeypatch)
