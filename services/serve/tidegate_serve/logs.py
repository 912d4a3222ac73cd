"""`tidegate logs MODEL [-f]`: what a model's server prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_serve import operate
from tidegate_serve.operate import LIFECYCLE, TIMEOUT, follow

REMEMBERED = 1000
"""Lines by which the place in a log is found again after the service was lost."""


def run(arguments: argparse.Namespace) -> int:
    """Carries out the command; returns the exit status."""
    return operate.run(arguments, LIFECYCLE, _follow if arguments.follow else _logs)


async def _logs(stub: Any, arguments: argparse.Namespace) -> None:
    found = False
    async for lines in _said(stub, pb.TailLogRequest(model=arguments.model, lines=arguments.lines), TIMEOUT):
        found = found or bool(lines)
        _print(lines, arguments)
    if not found:
        print(f"there is no log of {arguments.model} yet", file=sys.stderr)


async def _follow(stub: Any, arguments: argparse.Namespace) -> None:
    seen: deque[str] = deque(maxlen=REMEMBERED)
    again = False

    async def read(stub: Any, arguments: argparse.Namespace) -> None:
        nonlocal again
        lines = REMEMBERED if again else arguments.lines
        first = again
        again = True
        async for said in _said(stub, pb.TailLogRequest(model=arguments.model, lines=lines, follow=True)):
            news = unseen(list(seen), said) if first else said
            first = False
            _print(news, arguments)
            seen.extend(news)

    await follow(LIFECYCLE, arguments, read)


async def _said(
    stub: Any, request: pb.TailLogRequest, timeout: float | None = None
) -> AsyncIterator[Sequence[str]]:
    call = stub.TailLog(request, timeout=timeout)
    try:
        async for answer in call:
            yield list(answer.lines)
    finally:
        call.cancel()


def _print(lines: Sequence[str], arguments: argparse.Namespace) -> None:
    for line in lines:
        print(json.dumps({"model": arguments.model, "line": line}) if arguments.json else line)
    sys.stdout.flush()


def unseen(seen: Sequence[str], lines: Sequence[str]) -> Sequence[str]:
    """What of `lines`, the end of a log, comes after `seen`, its end some time ago.

    The latest place where the last lines of `seen` stand, as far as `lines` goes back, is where it goes on;
    without one the log is another, and all of it is new.
    """
    for end in range(len(lines), 0, -1):
        known = min(end, len(seen))
        if known and lines[end - known : end] == seen[len(seen) - known :]:
            return lines[end:]
    return lines
