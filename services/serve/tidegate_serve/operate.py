"""`tidegate leases` and `tidegate queues`: what admission knows, as tables or JSON; leases revoked."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc import aio

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc
from tidegate_chassis import rpc
from tidegate_chassis.config import read
from tidegate_chassis.kinds import Address
from tidegate_serve import rundir

TIMEOUT = 5.0
"""Seconds in which admission must answer."""
FAILED, UNUSABLE = 1, 2
"""Exit statuses: the service can't be reached or said no; the command can't be used as it was given."""
_DEFAULT = "127.0.0.1:7071"


class UsageError(Exception):
    """The command line, or the file it names, can't be used."""


def run(arguments: argparse.Namespace) -> int:
    """Carries out one command; returns the exit status."""
    try:
        address = _address(arguments)
    except UsageError as error:
        print(f"tidegate: {error}", file=sys.stderr)
        return UNUSABLE
    try:
        asyncio.run(_call(address, arguments))
    except aio.AioRpcError as error:
        print(f"tidegate: {_words(error, address, arguments)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:  # how watching ends
        return 0
    except BrokenPipeError:  # so does `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _address(arguments: argparse.Namespace) -> str:
    """Where admission is.

    1. As the command says.
    2. Where a running `tidegate serve` with this file has it.
    3. As the file says.
    """
    if arguments.address:  # 1
        return _checked(arguments.address, "--address")
    document = read(arguments.config)
    unreadable = [problem.message for problem in document.problems if not problem.path]
    if unreadable:  # other problems are for `config check`: what runs by this file is what is asked for
        raise UsageError("\n".join(unreadable))
    if found := rundir.find(Path(arguments.config)).get("admission"):  # 2
        return found
    return _checked(document.section("admission").get("listen", _DEFAULT), "admission.listen")  # 3


def _checked(value: Any, name: str) -> str:
    kind = Address()
    try:
        return kind.parse(value)
    except ValueError:
        raise UsageError(f"{name}: {value!r} is not allowed; give {kind.allowed()}") from None


async def _call(address: str, arguments: argparse.Namespace) -> None:
    commands: dict[str, Callable[[Any, argparse.Namespace], Awaitable[None]]] = {
        "list": _list,
        "revoke": _revoke,
        "queues": _queues,
    }
    async with rpc.channel(address) as channel:
        stub: Any = pb_grpc.AdmissionServiceStub(channel)
        await commands[getattr(arguments, "action", "queues")](stub, arguments)


async def _list(stub: Any, arguments: argparse.Namespace) -> None:
    answer = await stub.ListLeases(pb.ListLeasesRequest(model=arguments.model), timeout=TIMEOUT)
    print(json.dumps(plain(answer), indent=2) if arguments.json else leases_table(answer))


async def _revoke(stub: Any, arguments: argparse.Namespace) -> None:
    await stub.RevokeLease(pb.RevokeLeaseRequest(lease_id=arguments.lease_id), timeout=TIMEOUT)
    print(f"{arguments.lease_id} is revoked; its slot is free")


async def _queues(stub: Any, arguments: argparse.Namespace) -> None:
    if not arguments.watch:
        answer = await stub.GetQueues(pb.GetQueuesRequest(), timeout=TIMEOUT)
        print(json.dumps(plain(answer.queues), indent=2) if arguments.json else queues_table(answer.queues))
        return
    async for queues in _watched(stub):
        if arguments.json:
            print(json.dumps(plain(queues)), flush=True)
        else:
            clear = "\033[H\033[J" if sys.stdout.isatty() else ""
            print(f"{clear}{queues_table(queues)}\n", flush=True)


async def _watched(stub: Any) -> AsyncIterator[pb.Queues]:
    call = stub.WatchQueues(pb.WatchQueuesRequest())
    try:
        async for answer in call:
            yield answer.queues
    finally:
        call.cancel()


def _words(error: aio.AioRpcError, address: str, arguments: argparse.Namespace) -> str:
    """What went wrong, and what to do."""
    if rpc.reason_of(error) == "REASON_DRAINING":
        return f"admission at {address} is stopping"
    if error.code() == grpc.StatusCode.NOT_FOUND:
        return f"there is no lease {arguments.lease_id}; `tidegate leases list` shows those that exist"
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return (
            f"admission can't be reached at {address}: is it running? `tidegate serve` or "
            "`tidegate admission` starts it; if it listens somewhere else, say where with --address"
        )
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"admission at {address} has not answered within {TIMEOUT:g} s: its log tells more"
    return f"admission at {address} answered {rpc.describe(error)}"


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON has it: every field by its name in the contract, numbers as numbers."""
    return {field.name: _plain(getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return plain(value)
    if isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "items"):
        return dict(sorted(value.items()))
    return [_plain(item) for item in value]


def leases_table(answer: pb.ListLeasesResponse) -> str:
    """Who holds what, oldest first."""
    if not answer.leases:
        return "no leases"
    rows = [("LEASE", "MODEL", "INSTANCE", "TENANT", "AGE", "HOLDER")]
    for lease in answer.leases:
        age = duration(lease.age_ms)
        rows.append((lease.lease_id, lease.model, lease.instance_id, lease.tenant, age, lease.holder))
    return table(rows)


def queues_table(queues: pb.Queues) -> str:
    """Every model with its instances, the tenants that have rates, and a line about the service itself."""
    rows = [("MODEL", "WAITING", "OLDEST", "ACTIVE", "INSTANCE", "SLOTS", "NOTE")]
    for model in queues.models:
        queue = model.queue
        oldest = duration(model.oldest_wait_ms) if queue.waiting else "-"
        first = (model.model, f"{queue.waiting}/{queue.max_queue}", oldest, str(queue.active))
        if not model.instances:
            rows.append((*first, "-", "-", ""))
        for slot in model.instances:
            rows.append((*first, slot.instance_id, f"{slot.active}/{slot.effective_slots}", slot.held_back))
            first = ("", "", "", "")
    lifecycle = "in touch with lifecycle" if queues.supply_settled else "NOT in touch with lifecycle"
    about = f"{len(queues.sessions)} sessions; {lifecycle}; up for {duration(queues.uptime_ms)}"
    parts = [table(rows) if queues.models else "nothing runs and nobody waits"]
    if queues.tenants:
        parts.append(tenants_table(queues))
    return "\n\n".join([*parts, about])


def tenants_table(queues: pb.Queues) -> str:
    """What is left of each tenant's rates; `-` = it has no such rate."""
    rows = [("TENANT", "REQUESTS/MIN", "TOKENS/MIN")]
    rows += [(one.tenant, _left(one.rates.requests), _left(one.rates.tokens)) for one in queues.tenants]
    return table(rows)


def _left(one: pb.Allowance) -> str:
    return f"{one.remaining}/{one.limit}" if one.limit else "-"


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
