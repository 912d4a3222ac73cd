"""`tidegate queues [--watch]`: who waits and for what, by admission's books."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_chassis.plain import as_dict
from tidegate_serve import operate
from tidegate_serve.operate import ADMISSION, ask, duration, show, table


def run(arguments: argparse.Namespace) -> int:
    """Carries out the command; returns the exit status."""
    return operate.run(arguments, ADMISSION, _queues)


async def _queues(stub: Any, arguments: argparse.Namespace) -> None:
    if not arguments.watch:
        show(arguments, (await ask(stub.GetQueues, pb.GetQueuesRequest())).queues, queues_table)
        return
    async for queues in _watched(stub):
        if arguments.json:
            print(json.dumps(as_dict(queues)), flush=True)
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
