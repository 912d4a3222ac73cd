"""`tidegate leases list|revoke`: who is being served, by admission's books; a lease ended."""

from __future__ import annotations

import argparse
from typing import Any

import grpc
from grpc import aio

from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_serve import operate
from tidegate_serve.operate import ADMISSION, Failed, ask, duration, show, table


def run(arguments: argparse.Namespace) -> int:
    """Carries out one command; returns the exit status."""
    return operate.run(arguments, ADMISSION, {"list": _list, "revoke": _revoke}[arguments.action])


async def _list(stub: Any, arguments: argparse.Namespace) -> None:
    show(arguments, await ask(stub.ListLeases, pb.ListLeasesRequest(model=arguments.model)), leases_table)


async def _revoke(stub: Any, arguments: argparse.Namespace) -> None:
    try:
        await ask(stub.RevokeLease, pb.RevokeLeaseRequest(lease_id=arguments.lease_id))
    except aio.AioRpcError as error:
        if error.code() != grpc.StatusCode.NOT_FOUND:
            raise
        text = f"there is no lease {arguments.lease_id}; `tidegate leases list` shows those that exist"
        raise Failed(text) from None
    print(f"{arguments.lease_id} is revoked; its slot is free")


def leases_table(answer: pb.ListLeasesResponse) -> str:
    """Who holds what, oldest first."""
    if not answer.leases:
        return "no leases"
    rows = [("LEASE", "MODEL", "INSTANCE", "TENANT", "AGE", "HOLDER")]
    for lease in answer.leases:
        age = duration(lease.age_ms)
        rows.append((lease.lease_id, lease.model, lease.instance_id, lease.tenant, age, lease.holder))
    return table(rows)
