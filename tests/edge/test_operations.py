"""Operators' orders by HTTP: what reaches the services, and how their answers read."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_status import rpc_status

from tests.edge.conftest import Bench
from tests.edge.fakes import Admission, Answer, Lifecycle, ask, echo
from tests.edge.keyfiles import running
from tidegate.admission.v1 import admission_pb2 as ad
from tidegate.lifecycle.v1 import lifecycle_pb2 as lc
from tidegate_chassis.errors import Refused
from tidegate_chassis.rpc import to_status
from tidegate_edge.cors import Cors
from tidegate_edge.envelope import Failure
from tidegate_edge.keyring import Caller
from tidegate_edge.operations import refuse_strangers

pytestmark = pytest.mark.asyncio(loop_scope="module")

_READY = lc.MODEL_STATE_READY
_OPS = "https://ops.example"


class Orders:
    """What was ordered of a service, and what it says to the next order."""

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self.refusal: Refused | None = None
        self.broken = False
        self.silent = False

    async def take(self, request: Any, context: Any) -> None:
        self.taken.append(request)
        if self.refusal is not None:
            await context.abort_with_status(rpc_status.to_status(to_status(self.refusal)))
        if self.broken:
            await context.abort(grpc.StatusCode.INTERNAL, "/secret/path")
        if self.silent:
            await asyncio.Event().wait()


class OrderedLifecycle(Lifecycle):
    """A lifecycle that takes orders."""

    def __init__(self) -> None:
        self.orders = Orders()

    async def LoadModel(self, request: Any, context: Any) -> lc.LoadModelResponse:
        await self.orders.take(request, context)
        return lc.LoadModelResponse(model="small", state=lc.MODEL_STATE_LOADING)

    async def UnloadModel(self, request: Any, context: Any) -> lc.UnloadModelResponse:
        await self.orders.take(request, context)
        return lc.UnloadModelResponse(model="small", state=_READY, instances=1, leases=2)

    async def PinModel(self, request: Any, context: Any) -> lc.PinModelResponse:
        await self.orders.take(request, context)
        return lc.PinModelResponse(model="small", pinned=request.pinned)


class OrderedAdmission(Admission):
    """An admission that takes orders."""

    def __init__(self) -> None:
        super().__init__()
        self.orders = Orders()

    async def RevokeLease(self, request: Any, context: Any) -> ad.RevokeLeaseResponse:
        await self.orders.take(request, context)
        return ad.RevokeLeaseResponse()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    """An edge on loopback without keys."""
    folder = tmp_path_factory.mktemp("operations")
    kinds = (OrderedAdmission, OrderedLifecycle)
    async with running(folder, echo(), kinds, cors_origins=[_OPS]) as bench:
        yield bench


@pytest.fixture
def one(shared: Bench) -> Bench:
    """The same, with nothing ordered yet."""
    services: list[Any] = [shared.admission, shared.lifecycle]
    for service in services:
        service.orders = Orders()
    return shared


def orders(one: Bench, service: str = "lifecycle") -> Orders:
    found: Orders = getattr(one, service).orders
    return found


async def order(one: Bench, path: str, **headers: str) -> Answer:
    return await ask(one.edge.port, "POST", f"/gateway/{path}", b"", **headers)


@pytest.mark.parametrize(
    ("verb", "request_", "answer"),
    [
        ("load", lc.LoadModelRequest(model="org/x"), {"state": "loading"}),
        ("unload", lc.UnloadModelRequest(model="org/x"), {"state": "ready", "instances": 1, "leases": 2}),
        ("pin", lc.PinModelRequest(model="org/x", pinned=True), {"pinned": True}),
        ("unpin", lc.PinModelRequest(model="org/x"), {"pinned": False}),
    ],
)
async def test_orders_reach_lifecycle(one: Bench, verb: str, request_: Any, answer: dict[str, Any]) -> None:
    """Ids may hold slashes, plainly or encoded; the answer is lifecycle's."""
    for path in (f"models/org/x/{verb}", f"models/org%2Fx/{verb}", f"models/org%2fx/{verb}"):
        said = await order(one, path)
        assert (said.status, said.header("content-type")) == (200, "application/json")
        assert json.loads(said.body) == {"model": "small", **answer}
    assert orders(one).taken == [request_] * 3


async def test_a_lease_is_revoked_by_its_id(one: Bench) -> None:
    """As `leases list` shows it: session and number."""
    for path in ("leases/edge-1/17/revoke", "leases/edge-1%2F17/revoke"):
        said = await order(one, path)
        assert (said.status, json.loads(said.body)) == (200, {"lease_id": "edge-1/17", "revoked": True})
    assert orders(one, "admission").taken == [ad.RevokeLeaseRequest(lease_id="edge-1/17")] * 2


async def test_only_orders_are_orders(one: Bench) -> None:
    """Other verbs and nouns are no routes, and asking isn't ordering."""
    for path in ("models/small/stop", "models//load", "models/load", "leases/a/1/load", "devices/gpu0/drain"):
        said = await order(one, path)
        assert (said.status, said.error["code"]) == (404, "not_found"), path
    for method in ("GET", "PUT", "DELETE"):
        said = await ask(one.edge.port, method, "/gateway/models/small/unload")
        assert (said.status, said.header("allow")) == (405, "POST")
    assert not orders(one).taken


@pytest.mark.parametrize(
    ("refusal", "status", "code", "retried"),
    [
        (("NOT_FOUND", "REASON_NOT_FOUND", 0), 404, "model_not_found", None),
        (("INVALID_ARGUMENT", "REASON_INVALID", 0), 400, "invalid_request", None),
        (("FAILED_PRECONDITION", "REASON_NO_CAPACITY", 60), 503, "no_capacity", None),
        (("FAILED_PRECONDITION", "REASON_START_FAILED", 60), 503, "model_failed", None),
        (("FAILED_PRECONDITION", "REASON_NEVER_FITS", 0), 503, "no_capacity", "false"),
        (("UNAVAILABLE", "REASON_DRAINING", 0), 503, "server_is_overloaded", None),
    ],
)
async def test_a_services_no_is_told_with_its_reason(
    one: Bench, refusal: tuple[str, str, float], status: int, code: str, retried: str | None
) -> None:
    """Its words, the status that fits, and when to come again."""
    name, reason, after = refusal
    orders(one).refusal = Refused(grpc.StatusCode[name], reason, "words for people", after)
    said = await order(one, "models/small/load")
    assert (said.status, said.error["code"], said.error["message"]) == (status, code, "words for people")
    assert said.header("x-should-retry") == retried
    if status == 503 and after:
        assert 60 <= int(said.header("retry-after") or 0) <= 75


async def test_an_unknown_lease_is_not_found(one: Bench) -> None:
    """404, by admission's word."""
    orders(one, "admission").refusal = Refused(
        grpc.StatusCode.NOT_FOUND, "REASON_INVALID", "no such lease exists"
    )
    said = await order(one, "leases/edge-1/17/revoke")
    assert (said.status, said.error["code"]) == (404, "not_found")


async def test_a_service_that_fails_or_is_silent_is_told(one: Bench) -> None:
    """500 without its words, 503 after five seconds; no order is left behind."""
    orders(one).broken = True
    said = await order(one, "models/small/load")
    assert (said.status, said.error["code"]) == (500, "internal_error")
    assert b"secret" not in said.body
    orders(one).broken, orders(one).silent = False, True
    said = await order(one, "models/small/load")
    assert (said.status, said.error["code"]) == (503, "server_is_overloaded")
    assert said.header("retry-after")


async def test_pages_of_other_origins_give_no_orders(one: Bench) -> None:
    """Browsers send simple requests to this machine for any page: without a key they are refused, unless the
    origin is allowed or the edge's own by its address."""
    port = one.edge.port
    for origin in (
        "https://evil.example",
        "null",
        f"http://rebound.example:{port}",
        f"http://127.0.0.1:{port}0",
    ):
        said = await order(one, "models/small/unload", origin=origin, content_type="text/plain")
        assert (said.status, said.error["code"]) == (403, "permission_denied"), origin
    said = await order(
        one, "models/small/unload", host=f"rebound.example:{port}", origin=f"http://rebound.example:{port}"
    )
    assert said.status == 403
    assert not orders(one).taken
    own = f"127.0.0.1:{port}"
    assert (await order(one, "models/small/unload", host=own, origin=f"http://{own}")).status == 200
    assert (await order(one, "models/small/unload", origin=_OPS)).status == 200
    assert (await order(one, "models/small/unload")).status == 200


@pytest.mark.parametrize(
    ("origin", "refused"),
    [
        ("https://gate.example.org", False),
        (_OPS, False),
        ("", False),
        ("https://evil.example", True),
        ("https://gate.example.org.evil.example", True),
        ("null", True),
    ],
)
async def test_with_a_key_the_edges_own_pages_are_known_by_host(origin: str, refused: bool) -> None:
    """No other page has a key to send, whatever its name resolves to; others are refused all the same."""
    expected = pytest.raises(Failure) if refused else contextlib.nullcontext()
    with expected:
        refuse_strangers(Cors([_OPS]), Caller(key="op"), origin.encode(), b"gate.example.org")
