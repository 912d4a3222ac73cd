"""Lines on stderr, in the shape of vLLM's."""

from __future__ import annotations

import os
import sys
import time


def say(message: str, *, level: str = "INFO", place: str = "simulator.py:1") -> None:
    """One line as vLLM's logger writes it."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    plain(f"(APIServer pid={os.getpid()}) {level} {stamp} [{place}] {message}")


def plain(line: str) -> None:
    """One line as it is."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
