"""Operators' orders by HTTP: what `tidegate models load|unload|pin|unpin` and `tidegate leases revoke` do."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote_to_bytes

import grpc
from google.protobuf.message import Message

from tidegate.admission.v1 import admission_pb2
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_chassis import rpc
from tidegate_chassis.plain import as_dict
from tidegate_edge.cors import Cors, is_own
from tidegate_edge.envelope import Failure
from tidegate_edge.keyring import Caller

_PATIENCE = 5.0
"""Seconds that a service has to carry an order out."""
# Ids may hold slashes, written plainly or encoded; an id is only looked up, it never becomes a path.
_ROUTE = re.compile(rb"/gateway/(models|leases)/(.+)/([a-z]+)")
_REASONS = {
    "REASON_START_FAILED": "model_failed",
    "REASON_UNHEALTHY": "model_failed",
    "REASON_NEVER_FITS": "no_capacity",
    "REASON_NO_CAPACITY": "no_capacity",
    "REASON_INVALID": "invalid_request",
    "REASON_DRAINING": "server_is_overloaded",
}
"""The services' reasons as codes of the error table. What they say with a reason is meant for people."""

Order = Callable[[], Awaitable[dict[str, Any]]]
"""Carries one order out and tells what came of it. Raises Failure."""


class Operations:
    """Finds and carries out orders."""

    def __init__(self, admission: rpc.Peer, lifecycle: rpc.Peer) -> None:
        """The two services."""
        self._admission, self._lifecycle = admission, lifecycle

    def find(self, path: bytes) -> Order | None:
        """The order that a path names, as it was sent; None = none."""
        found = _ROUTE.fullmatch(path)
        if found is None:
            return None
        name = unquote_to_bytes(found[2]).decode(errors="replace")
        verb = found[3].decode()
        if found[1] == b"leases":
            return (lambda: self._revoke(name)) if verb == "revoke" else None
        orders: dict[str, tuple[str, Message]] = {
            "load": ("LoadModel", pb.LoadModelRequest(model=name)),
            "unload": ("UnloadModel", pb.UnloadModelRequest(model=name)),
            "pin": ("PinModel", pb.PinModelRequest(model=name, pinned=True)),
            "unpin": ("PinModel", pb.PinModelRequest(model=name, pinned=False)),
        }
        if verb not in orders:
            return None
        method, request = orders[verb]
        return lambda: _carried_out(self._lifecycle, method, request, "lifecycle", "model_not_found")

    async def _revoke(self, lease: str) -> dict[str, Any]:
        request = admission_pb2.RevokeLeaseRequest(lease_id=lease)
        await _carried_out(self._admission, "RevokeLease", request, "admission", "not_found")
        return {"lease_id": lease, "revoked": True}


async def _carried_out(
    peer: rpc.Peer, method: str, request: Message, service: str, missing: str
) -> dict[str, Any]:
    try:
        return as_dict(await peer.ask(method, request, _PATIENCE))
    except grpc.RpcError as error:
        raise _failure(error, service, missing) from None


def _failure(error: grpc.RpcError, service: str, missing: str) -> Failure:
    """1. There is no such thing. 2. The service says no, with a reason. 3. It can't be asked. 4. Its bug."""
    code, words = error.code(), str(error.details())
    reason = rpc.reason_of(error)
    if code == grpc.StatusCode.NOT_FOUND:  # 1
        return Failure(missing, words, param="model" if missing == "model_not_found" else None)
    if reason in _REASONS:  # 2
        retry, never = rpc.retry_of(error), reason == "REASON_NEVER_FITS"
        return Failure(_REASONS[reason], words, retry_after=retry, final=never)
    lost = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
    if code in lost:  # 3
        return Failure("server_is_overloaded", f"The service {service} can't be reached; try again.")
    return Failure("internal_error", f"The service {service} failed; its log tells more.")  # 4


def refuse_strangers(cors: Cors, caller: Caller, origin: bytes, host: bytes) -> None:
    """Raises Failure (403) when a browser sends an order for a page that may not give any: browsers send
    simple requests to any address without asking first, and this machine's are within their reach.

    With a key the edge's own pages are known by Host: no other page has a key to send.
    """
    own = origin.partition(b"://")[2] == host if caller.key else is_own(origin, host)
    if origin and not own and not cors.allows(origin):
        raise Failure("permission_denied", "Pages of this origin may not give orders here.")
