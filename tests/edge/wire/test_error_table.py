"""Every error of the edge's own, one row each: status, type, code, and what goes with it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.edge.fakes import Connection
from tests.edge.wire.attacked import Attacked, attacked
from tests.edge.wire.raw import Reply, post
from tests.support.until import until
from tidegate.admission.v1 import admission_pb2 as ad
from tidegate_edge.envelope import KINDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

EDGE = {
    "max_body": "1KiB",
    "max_head": "2KiB",
    "max_buffered": "2KiB",
    "head_timeout": "1s",
    "write_timeout": "1s",
    "retries": {"attempts": 1},
}
SECRET = "sk-secret /home/user/model.py"
"""Said by callers where a message might repeat it."""
INVALID, BUSY, SLOW, LIMIT = (
    "invalid_request_error",
    "service_unavailable_error",
    "timeout_error",
    "rate_limit_error",
)


@dataclass(frozen=True)
class Row:
    """What is sent, and what comes of it."""

    code: str
    status: int
    type: str
    sent: bytes = b""
    close: bool = False
    """With `Connection: close`."""
    param: str | None = None
    allow: str | None = None
    final: bool = False
    """With `x-should-retry: false`."""
    refusal: str = ""
    """Admission's reason, with a time to retry or without."""
    retry: float = 0.0


def get(path: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return method + b" " + path + b" HTTP/" + version + b"\r\nhost: x\r\n\r\n"


def form(body: bytes) -> bytes:
    return post(b"content-type: multipart/form-data", path=b"/v1/audio/transcriptions", body=body)


SENT = [
    Row("invalid_json", 400, INVALID, post(body=b'{"key":"%s"' % SECRET.encode())),
    Row("invalid_json", 400, INVALID, post(body=b"[]")),
    Row("invalid_json", 400, INVALID, post(body=b"")),
    Row("missing_model", 400, INVALID, post(body=b"{}"), param="model"),
    Row("missing_model", 400, INVALID, post(body=b'{"model":7}'), param="model"),
    Row("duplicate_model", 400, INVALID, post(body=b'{"model":"a","model":"b"}'), param="model"),
    Row("too_complex", 400, INVALID, post(body=b'{"model":"small","x":' + b"[" * 200 + b"]" * 200 + b"}")),
    Row("unsupported_encoding", 400, INVALID, post(b"content-encoding: gzip")),
    Row("invalid_header", 400, INVALID, post(b"x-tidegate-deadline-ms: -1")),
    Row("invalid_header", 400, INVALID, post(b"x-tidegate-affinity: a b")),
    Row("invalid_multipart", 400, INVALID, form(b"x")),
    Row("bad_request", 400, INVALID, get(b"/ /"), close=True),
    Row("bad_request", 400, INVALID, post(b"content-length: 1"), close=True),
    Row("bad_request", 400, INVALID, b"\x16\x03\x01", close=True),
    Row("not_found", 404, INVALID, get(b"/%s" % SECRET[:9].encode())),
    Row("not_found", 404, INVALID, post(path=b"/sleep")),
    Row("model_not_found", 404, INVALID, post(body=b'{"model":"none"}'), param="model"),
    Row("model_not_found", 404, INVALID, get(b"/v1/models/none"), param="model"),
    Row("method_not_allowed", 405, INVALID, get(b"/v1/chat/completions"), allow="POST"),
    Row("method_not_allowed", 405, INVALID, post(path=b"/health"), allow="GET, HEAD"),
    Row("request_timeout", 408, INVALID, b"GET /health HTTP/1.1\r\n", close=True),
    Row("request_timeout", 408, INVALID, post()[:-5], close=True),
    Row("body_too_large", 413, INVALID, post(body=b"x" * 1025), close=True),
    Row("expectation_failed", 417, INVALID, post(b"expect: more"), close=True),
    Row("headers_too_large", 431, INVALID, post(b"x: " + b"y" * 2048), close=True),
    Row("not_implemented", 501, INVALID, get(b"/health", b"BREW"), close=True, final=True),
    Row("not_implemented", 501, INVALID, get(b"x:443", b"CONNECT"), close=True, final=True),
    Row(
        "not_implemented",
        501,
        INVALID,
        post(b"transfer-encoding: gzip", length=False),
        close=True,
        final=True,
    ),
    Row("http_version_not_supported", 505, INVALID, get(b"/", version=b"2.0"), close=True, final=True),
]
REFUSED = [
    Row("queue_full", 429, LIMIT, refusal="QUEUE_FULL", retry=7),
    Row("queue_full", 429, LIMIT, refusal="QUEUE_FULL"),
    Row("rate_limit_exceeded", 429, "requests", refusal="RATE_LIMITED", retry=600),
    Row("queue_timeout", 504, SLOW, refusal="QUEUE_TIMEOUT"),
    Row("deadline_unreachable", 504, SLOW, refusal="DEADLINE_UNREACHABLE", final=True),
    Row("deadline_unreachable", 504, SLOW, refusal="DEADLINE_UNREACHABLE", retry=3),
    Row("deadline_exceeded", 504, SLOW, refusal="DEADLINE_EXCEEDED", final=True),
    Row("model_not_found", 404, INVALID, refusal="MODEL_NOT_FOUND", param="model"),
    Row("model_failed", 503, BUSY, refusal="MODEL_FAILED", retry=9),
    Row("model_failed", 503, BUSY, refusal="MODEL_FAILED", final=True),
    Row("no_capacity", 503, BUSY, refusal="NO_CAPACITY", retry=1000),
    Row("no_capacity", 503, BUSY, refusal="NO_CAPACITY", final=True),
    Row("server_is_overloaded", 503, BUSY, refusal="UNAVAILABLE", retry=2),
    Row("server_is_overloaded", 503, BUSY, refusal="DRAINING"),
]


def check(row: Row, reply: Reply, identity: str) -> None:
    """The whole row."""
    error = reply.error
    assert (reply.status, error["type"], error["code"], error["param"]) == (
        row.status,
        row.type,
        row.code,
        row.param,
    )
    assert not any(word in error["message"] for word in ("sk-secret", "/home")), error
    assert reply.header("x-request-id") == identity or not identity
    assert reply.header("connection") == ("close" if row.close else None)
    assert reply.header("allow") == row.allow
    assert reply.header("x-should-retry") == ("false" if row.final else None)
    after = reply.header("retry-after")
    assert (after is not None) == (row.status in (429, 503) or row.retry > 0)
    if row.retry:
        assert min(row.retry, 120) <= int(after or 0) <= min(1.25 * row.retry + 1, 120)
    assert reply.header("content-length") == str(len(reply.body))


@pytest.mark.parametrize("row", SENT, ids=lambda row: f"{row.status} {row.code}")
async def test_what_a_client_does_wrong(edge: Attacked, row: Row) -> None:
    """Its row, with its own request id; and none of it reaches a model server."""
    before = len(edge.server.seen)
    sent = row.sent.replace(b"host: x\r\n", b"host: x\r\nx-request-id: Mine-1\r\n")
    wire = await edge.wire()
    await wire.say(sent)
    reply = await wire.answer()
    check(row, reply, "Mine-1" if b"Mine-1" in sent else "")
    assert len(edge.server.seen) == before
    if row.close:
        assert (await wire.rest()).answers == []
    await wire.closed()


@pytest_asyncio.fixture(loop_scope="module")
async def refusing(edge: Attacked) -> AsyncIterator[Callable[[Row], None]]:
    """Admission refuses for a row's reason until the test has ended."""

    def refuse(row: Row) -> None:
        edge.admission.refusal = ad.Refusal(
            reason=ad.Reason.Value(f"REASON_{row.refusal}"),
            retry_after_ms=int(row.retry * 1000),
            message="No." + "x" * 5000,
            queue=ad.QueueState(waiting=4, active=2, max_concurrent=2, max_queue=4),
            rates=ad.RateState(requests=ad.Allowance(limit=5, remaining=0, reset_ms=2000)),
        )

    yield refuse
    edge.admission.refusal = None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row.status} {row.code} {row.retry}")
async def test_what_admission_refuses(
    edge: Attacked, refusing: Callable[[Row], None], row: Row, stream: bool
) -> None:
    """Its row, with the state of the queue and of the rates; a stream's first answer is no other one."""
    refusing(row)
    wire = await edge.wire()
    await wire.say(
        post(b"x-request-id: Mine-2", body=b'{"model":"small","stream":%s}' % str(stream).lower().encode())
    )
    reply = await wire.answer()
    check(row, reply, "Mine-2")
    assert len(reply.error["message"]) == 500
    assert (reply.header("x-queue-depth"), reply.header("x-max-queue-size")) == ("4", "4")
    assert reply.header("x-ratelimit-remaining-requests") == "0"
    await wire.closed()


async def _dies(connection: Connection) -> None:
    await connection.request()
    connection.abort()


async def _garbage(connection: Connection) -> None:
    await connection.request()
    await connection.say(b"HTTP/9.9 " + SECRET.encode() + b"\r\n\r\n")


@pytest.mark.parametrize("stream", [b"false", b"true"])
@pytest.mark.parametrize("script", [_dies, _garbage, None], ids=["dies", "garbage", "refuses"])
async def test_what_a_model_server_does_wrong(
    edge: Attacked, script: Callable[[Connection], Awaitable[None]] | None, stream: bytes
) -> None:
    """502 upstream_error, whatever it said; its address is nobody's business."""
    address, usual = edge.admission.address, edge.server.script
    wire = await edge.wire()
    try:
        if script is None:
            edge.admission.address = "http://127.0.0.1:9"
        else:
            for connection in edge.server.connections:
                connection.abort()  # the kept ones have the usual script
            edge.server.script = script
        await wire.say(post(b"x-request-id: Mine-3", body=b'{"model":"small","stream":%s}' % stream))
        reply = await wire.answer()
    finally:
        edge.admission.address, edge.server.script = address, usual
    check(Row("upstream_error", 502, "upstream_error"), reply, "Mine-3")
    assert "127.0.0.1" not in reply.body.decode()
    await wire.closed()


async def test_bodies_beyond_what_is_held_together_are_told_to_come_again(edge: Attacked) -> None:
    """503 with Retry-After; the connection goes on where the body was read."""
    edge.admission.holding = True
    begun = len(edge.admission.acquired)
    wires = [await edge.wire() for _ in range(3)]
    body = b'{"model":"small","x":"%s"}' % (b"x" * 900)
    for wire in wires[:2]:
        await wire.say(post(body=body))
    await until(lambda: len(edge.admission.acquired) == begun + 2, "two wait")
    await wires[2].say(post(b"x-request-id: Mine-4", body=body))
    check(Row("server_is_overloaded", 503, BUSY), await wires[2].answer(), "Mine-4")
    edge.admission.holding = False
    for ticket in edge.admission.acquired[begun:]:
        edge.admission.grant(ticket.n)
    for wire in wires[:2]:
        assert (await wire.answer()).status == 200


async def test_a_stream_has_the_id_too(edge: Attacked) -> None:
    """In its head, before anything else is known."""
    wire = await edge.wire()
    await wire.say(post(b"x-request-id: Mine-5", body=b'{"model":"small","stream":true,"x":"flood"}'))
    head = await asyncio.wait_for(wire.reader.readuntil(b"\r\n\r\n"), 10)
    assert b"\r\nx-request-id: Mine-5\r\n" in head
    await wire.closed()


async def test_who_has_left_is_counted_as_499_and_answered_nothing(edge: Attacked) -> None:
    """Log and metrics tell it."""
    edge.admission.holding = True
    begun = len(edge.admission.acquired)
    wire = await edge.wire()
    await wire.say(post(b"x-request-id: Left-1"))
    await until(lambda: len(edge.admission.acquired) > begun, "it waits")
    await wire.closed()
    edge.admission.holding = False

    def line() -> list[object]:
        return [one["status"] for one in edge.edge.lines() if one.get("request_id") == "Left-1"]

    assert await until(line, "its line") == [499]


async def test_a_stopping_edge_says_so_and_closes(tmp_path: Path) -> None:
    """503 draining with Retry-After and a close to whoever asks on a connection that is there already."""
    async with attacked(tmp_path) as one:
        one.admission.holding = True
        busy, late = await one.wire(), await one.wire()
        await busy.say(post())
        request = post(b"x-request-id: Late-1")
        await late.say(request[:40])
        await until(lambda: one.admission.acquired, "a ticket")
        assert one.edge.process is not None
        one.edge.process.send_signal(signal.SIGTERM)
        await until(lambda: any(said.get("event") == "draining" for said in one.edge.lines()), "it drains")
        await late.say(request[40:])
        check(Row("draining", 503, BUSY, close=True), await late.answer(), "Late-1")
        assert (await late.rest()).answers == []
        one.admission.grant(one.admission.acquired[0].n)
        reply = await busy.answer()
        assert (reply.status, reply.header("connection")) == (200, "close")
        assert await one.edge.ended() == 0


ELSEWHERE = {
    "internal_error": "test_leaks",
    "upstream_timeout": "test_leaks",
    "lease_lost": "test_endings",
    "invalid_api_key": "test_keys",
    "permission_denied": "test_keys",
    "invalid_request": "test_operations",
    "response_not_found": "test_responses",
}
"""Errors that take a bug, keys, an hour or an order, and where they are shown."""


async def test_every_kind_of_error_is_in_a_row() -> None:
    """Or has a test of its own."""
    here = {row.code for row in SENT + REFUSED} | {"upstream_error", "draining"}
    assert not KINDS.keys() - here - ELSEWHERE.keys()
