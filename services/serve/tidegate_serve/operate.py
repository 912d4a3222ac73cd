"""What all commands share that ask a running service: where it is, its answer or the error in words, tables.

Each noun has a module of its own (`leases`, `queues`, `models`, ...) whose `run` hands its function to `run`
here; how a command looks stands in `commands`, which imports nothing slow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc import aio

from tidegate.admission.v1.admission_pb2_grpc import AdmissionServiceStub
from tidegate.lifecycle.v1.lifecycle_pb2 import GetStatusRequest
from tidegate.lifecycle.v1.lifecycle_pb2_grpc import LifecycleServiceStub
from tidegate_chassis import rpc, tls
from tidegate_chassis.config import ConfigError, Problem, read, require
from tidegate_chassis.kinds import Address
from tidegate_chassis.plain import as_dict
from tidegate_serve import rundir

TIMEOUT = 5.0
"""Seconds in which a service must answer."""
FAILED, UNUSABLE = 1, 2
"""Exit statuses: the service can't be reached or said no; the command can't be used as it was given."""


class UsageError(Exception):
    """The command line, or the file it names, can't be used."""


class Failed(Exception):
    """The service said no, or what was asked for came to nothing; in words for people."""


@dataclass(frozen=True)
class Service:
    """A service that commands ask."""

    name: str
    """Its section of the configuration."""
    default: str
    """Where it listens when nothing says so."""
    stub: Callable[[aio.Channel], Any]


ADMISSION = Service("admission", "127.0.0.1:7071", AdmissionServiceStub)
LIFECYCLE = Service("lifecycle", "127.0.0.1:7072", LifecycleServiceStub)

LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
"""How calls to a service end that stops, dies or stands still."""

Command = Callable[[Any, argparse.Namespace], Awaitable[None]]
"""What one command does with a service's stub. It prints, or raises Failed or the call's error."""


def run(arguments: argparse.Namespace, service: Service, command: Command) -> int:
    """Carries out one command; returns the exit status."""
    try:
        at = address(service, arguments)
        _secure(arguments)
    except (UsageError, ConfigError) as error:
        print(f"tidegate: {error}", file=sys.stderr)
        return UNUSABLE
    try:
        asyncio.run(_call(at, service, command, arguments))
    except (Failed, aio.AioRpcError) as error:
        text = words(error, service, at) if isinstance(error, aio.AioRpcError) else error
        print(f"tidegate: {text}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:  # how watching ends
        return 0
    except BrokenPipeError:  # so does `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


async def _call(at: str, service: Service, command: Command, arguments: argparse.Namespace) -> None:
    async with rpc.channel(at) as channel:
        await command(service.stub(channel), arguments)


def address(service: Service, arguments: argparse.Namespace) -> str:
    """Where a service is; UsageError when that can't be told.

    1. As the command says.
    2. Where a running `tidegate serve` with this file has it.
    3. As the file says.
    """
    if arguments.address:  # 1
        return _checked(arguments.address, "--address")
    if not arguments.config:
        raise UsageError(f"say by --config FILE or --address ADDRESS where {service.name} is")
    document = read(arguments.config)
    unreadable = [problem.message for problem in document.problems if not problem.path]
    if unreadable:  # other problems are for `config check`: what runs by this file is what is asked for
        raise UsageError("\n".join(unreadable))
    if found := rundir.find(Path(arguments.config)).get(service.name):  # 2
        return found
    listen = document.section(service.name).get("listen", service.default)
    return _checked(listen, f"{service.name}.listen")  # 3


def _secure(arguments: argparse.Namespace) -> None:
    """Services are called by the section `tls` of the file, if one is given. ConfigError."""
    if arguments.config:
        problems: list[Problem] = []
        files = tls.check_section(read(arguments.config), "", "", problems)
        require(problems)
        rpc.secure(files)


def _checked(value: Any, name: str) -> str:
    kind = Address()
    try:
        return kind.parse(value)
    except ValueError:
        raise UsageError(f"{name}: {value!r} is not allowed; give {kind.allowed()}") from None


async def ask(method: Any, request: Message) -> Any:
    """One unary call; AioRpcError when it fails or isn't answered within `TIMEOUT`."""
    return await method(request, timeout=TIMEOUT)


async def follow(service: Service, arguments: argparse.Namespace, read: Command) -> None:
    """Runs `read`, which never ends by itself, and begins again, with a word, when the service was lost.

    It is looked for anew each time: a `tidegate serve` that was started again listens somewhere else. A
    service that can't be reached in the first place, and one that says no, is an error as usual.
    """
    delays, reached, away = rpc.reconnect_delays(), False, False
    while True:
        at = address(service, arguments)
        with contextlib.suppress(ConfigError):  # half renewed: those before stay
            _secure(arguments)
        try:
            async with rpc.channel(at) as channel:
                stub = service.stub(channel)
                await ask(stub.GetStatus, GetStatusRequest())
                if away:
                    print(f"tidegate: {service.name} is back", file=sys.stderr)
                delays, reached, away = rpc.reconnect_delays(), True, False
                await read(stub, arguments)
        except aio.AioRpcError as error:
            if not reached or error.code() not in LOST:
                raise
        if not away:
            print(f"tidegate: {service.name} has gone; waiting for it (Ctrl-C ends this)", file=sys.stderr)
            away = True
        await asyncio.sleep(next(delays))


def words(error: aio.AioRpcError, service: Service, at: str) -> str:
    """What went wrong, and what to do. What a service says with a reason is meant for people."""
    if (reason := rpc.reason_of(error)) == "REASON_DRAINING":
        return f"{service.name} at {at} is stopping"
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return (
            f"{service.name} can't be reached at {at}: is it running? `tidegate serve` or "
            f"`tidegate {service.name}` starts it; if it listens somewhere else, say where with --address "
            f"({rpc.why_unavailable(error)})"
        )
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"{service.name} at {at} has not answered within {TIMEOUT:g} s: its log tells more"
    if reason and error.details():
        return str(error.details())
    return f"{service.name} at {at} answered {rpc.describe(error)}"


def show(arguments: argparse.Namespace, answer: Message, text: Callable[[Any], str]) -> None:
    """Prints an answer: as JSON with --json, else by `text`."""
    print(json.dumps(as_dict(answer), indent=2) if arguments.json else text(answer))


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def duration(milliseconds: int) -> str:
    """For people: 0.4s, 12s, 3m05s, 2h03m."""
    seconds = milliseconds // 1000
    if seconds < 10:
        return f"{milliseconds / 1000:.1f}s"
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02}m"


def size(mib: int) -> str:
    """Memory for people: 512MiB, 9.5GiB, 38GiB."""
    if mib < 1024:
        return f"{mib}MiB"
    return f"{mib / 1024:.1f}".removesuffix(".0") + "GiB"
