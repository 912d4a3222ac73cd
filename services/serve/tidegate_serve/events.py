"""`tidegate events [--model] [-f]`: what has happened to models and instances, and why."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis.plain import as_dict
from tidegate_serve import operate
from tidegate_serve.operate import LIFECYCLE, TIMEOUT, follow, table

SHOWN, SHOWN_BEFORE = 100, 10
"""Events without `--last`: by themselves, and before those that are followed."""
KEPT = 1000
"""So many the service keeps."""


def run(arguments: argparse.Namespace) -> int:
    """Carries out the command; returns the exit status."""
    return operate.run(arguments, LIFECYCLE, _follow if arguments.follow else _events)


async def _events(stub: Any, arguments: argparse.Namespace) -> None:
    last = SHOWN if arguments.last is None else arguments.last
    request = pb.WatchEventsRequest(model=arguments.model, last=last, until_now=True)
    events = [event async for event in _said(stub, request, TIMEOUT)]
    if arguments.json:
        for event in events:
            print(json.dumps(as_dict(event)))
    elif events:
        print(table([(_time(event), *_cells(event)) for event in events]))
    else:
        print("no events", file=sys.stderr)


async def _follow(stub: Any, arguments: argparse.Namespace) -> None:
    seen: tuple[int, int] | None = None

    async def read(stub: Any, arguments: argparse.Namespace) -> None:
        nonlocal seen
        last = SHOWN_BEFORE if arguments.last is None else arguments.last
        request = pb.WatchEventsRequest(model=arguments.model, last=last if seen is None else KEPT)
        async for event in _said(stub, request):
            if seen is not None and event.incarnation == seen[0] and event.n <= seen[1]:
                continue  # told before the connection broke
            seen = event.incarnation, event.n
            print(json.dumps(as_dict(event)) if arguments.json else _line(event), flush=True)

    await follow(LIFECYCLE, arguments, read)


async def _said(
    stub: Any, request: pb.WatchEventsRequest, timeout: float | None = None
) -> AsyncIterator[pb.Event]:
    call = stub.WatchEvents(request, timeout=timeout)
    try:
        async for answer in call:
            yield answer.event
    finally:
        call.cancel()


def _time(event: pb.Event) -> str:
    """When it happened, by this machine's clock."""
    now = datetime.now().astimezone()
    then = now - timedelta(milliseconds=event.age_ms)
    return then.strftime("%H:%M:%S" if then.date() == now.date() else "%Y-%m-%d %H:%M:%S")


def _cells(event: pb.Event) -> tuple[str, ...]:
    return event.kind, event.model or "-", event.instance_id or "-", event.message


def _line(event: pb.Event) -> str:
    """One that is followed: its columns are as wide as most need them."""
    kind, model, instance, message = _cells(event)
    return f"{_time(event)}  {kind:<12}  {model:<16}  {instance:<32}  {message}".rstrip()
