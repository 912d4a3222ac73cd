"""The longest callback of each service, in processor time: measured on request, over a whole test run.

uvloop runs its callbacks out of Python's reach, so that the services run on asyncio's own loop meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = "TIDEGATE_CALLBACKS"
"""Environment: where each process writes its longest callback so far."""


def measure(folder: Path, service: str) -> None:
    """From now on, in this process."""
    sys.modules["uvloop"] = None  # type: ignore[assignment]
    run = asyncio.Handle._run
    longest = 0.001
    path = folder / f"{service}-{os.getpid()}.json"

    def timed(handle: Any) -> None:
        nonlocal longest
        began = time.thread_time()
        run(handle)
        took = time.thread_time() - began
        if took > longest:
            longest = took
            path.write_text(json.dumps([took, service, _words(handle)]))

    asyncio.Handle._run = timed  # type: ignore[method-assign, assignment]


def _words(handle: Any) -> str:
    """A task's coroutine, with what it waits for now, or the function."""
    task = getattr(handle._callback, "__self__", None)
    return repr(task.get_coro() if isinstance(task, asyncio.Task) else handle)[:300]


def longest(folder: Path) -> dict[str, tuple[float, str]]:
    """By service: seconds of processor time of its longest callback, and which."""
    found: dict[str, tuple[float, str]] = {}
    for path in folder.glob("*.json"):
        took, service, what = json.loads(path.read_text())
        found[service] = max(found.get(service, (0.0, "")), (took, what))
    return found
