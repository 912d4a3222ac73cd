"""Which paths lead where, and what the edge says of itself."""

from __future__ import annotations

import json

import pytest

from tests.edge.conftest import CHAT, Make
from tests.edge.fakes import Client, ask, echo
from tests.support.until import until
from tidegate_edge.routes import Routes

NEVER = (
    "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/server_info", "/reset_prefix_cache", "/load",
    "/metrics/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/scale_elastic_ep", "/invocations",
    "/start_profile", "/version", "/v1/chat/completions/", "/v1//chat/completions", "//v1/chat/completions",
    "/v1/./chat/completions", "/x/../v1/chat/completions", "/v1/chat%2fcompletions", "/v1/%63hat/completions",
    "/V1/chat/completions", "/v1/chat/completions%00", "/v1/models/../../sleep", "/%2e%2e/sleep", "/",
)  # fmt: skip


async def test_only_listed_routes_reach_a_model_server(bench: Make) -> None:
    """Each inference route is relayed; nothing else is, however its path is written."""
    one = await bench(echo(), extra_routes=["POST /v1/own", "PUT /v1/own"])
    for path in (*RELAYED, "/v1/own"):
        assert (await one.chat(path)).status == 200, path
    assert (await ask(one.edge.port, "PUT", "/v1/own", {"model": "small"})).status == 200
    count = len(one.server.seen)
    assert count == len(RELAYED) + 2
    for path in NEVER:
        answer = await one.chat(path)
        assert answer.status in (404, 405), path
        assert answer.error["type"] == "invalid_request_error"
        assert answer.header("x-request-id")
    assert len(one.server.seen) == count


async def test_a_wrong_method_is_told_the_right_one(bench: Make) -> None:
    """405 with Allow, in the envelope."""
    one = await bench(echo())
    answer = await ask(one.edge.port, "GET", CHAT)
    assert (answer.status, answer.header("allow"), answer.error["code"]) == (
        405,
        "POST",
        "method_not_allowed",
    )
    answer = await ask(one.edge.port, "POST", "/v1/models", b"{}")
    assert (answer.status, answer.header("allow")) == (405, "GET, HEAD")


async def test_the_catalogue_is_listed_with_states(bench: Make) -> None:
    """/v1/models has names, aliases and states; ids with slashes are found, encoded or not."""
    one = await bench(echo())
    listed = json.loads((await ask(one.edge.port, "GET", "/v1/models")).body)
    assert listed["object"] == "list"
    entries = {entry["id"]: entry for entry in listed["data"]}
    assert sorted(entries) == ["org/Plain-7B", "small", "warm"]
    assert (entries["small"]["aliases"], entries["small"]["state"]) == (["gpt-small"], "ready")
    for path in ("/v1/models/org/Plain-7B", "/v1/models/org%2FPlain-7B"):
        assert json.loads((await ask(one.edge.port, "GET", path)).body)["id"] == "org/Plain-7B"
    assert json.loads((await ask(one.edge.port, "GET", "/v1/models/gpt-small")).body)["id"] == "small"
    answer = await ask(one.edge.port, "GET", "/v1/models/none")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")


async def test_the_edge_tells_how_it_is(bench: Make) -> None:
    """Health, readiness, status of all three services with numbers as numbers, metrics, OpenAPI."""
    one = await bench(echo())
    assert (await ask(one.edge.port, "GET", "/health")).status == 200
    assert (await ask(one.edge.port, "GET", "/ready")).status == 200
    status = json.loads((await ask(one.edge.port, "GET", "/gateway/status")).body)
    small = status["models"]["small"]
    assert (small["state"], small["load_time_ms"], small["queue"]["max_queue"]) == ("ready", 1234, 4)
    assert status["admission"]["incarnation"] == 2**63
    assert (status["lifecycle"]["version"], status["admission"]["version"]) == ("8", "9")
    assert status["edge"]["in_flight"] == 0
    assert status["lifecycle"]["reachable"] is status["admission"]["reachable"] is True
    assert (await ask(one.edge.port, "HEAD", "/metrics")).status == 200
    openapi = json.loads((await ask(one.edge.port, "GET", "/openapi.json")).body)
    assert CHAT in openapi["paths"]
    await one.admission.stop_server()
    status = json.loads((await ask(one.edge.port, "GET", "/gateway/status")).body)
    assert status["admission"]["reachable"] is status["lifecycle"]["reachable"] is False
    assert status["models"]["small"]["state"] == "ready"


async def test_an_edge_without_its_peers_lives_and_is_not_ready(bench: Make) -> None:
    """Before the catalogue is known: health 200, ready 503, requests 503 with Retry-After."""
    one = await bench(echo(), ready=False, admission_address="127.0.0.1:9", lifecycle_address="127.0.0.1:9")
    assert (await ask(one.edge.port, "GET", "/health")).status == 200
    assert (await ask(one.edge.port, "GET", "/ready")).status == 503
    answer = await one.chat()
    assert (answer.status, answer.error["code"]) == (503, "server_is_overloaded")
    assert answer.header("retry-after")


async def test_bad_requests_are_told_and_nothing_is_queued(bench: Make) -> None:
    """Each has its error; no ticket is made, and the edge serves on."""
    one = await bench(echo(), max_body="1KiB")
    port = one.edge.port
    cases = [
        (await ask(port, "POST", CHAT, b"{nope"), 400, "invalid_json"),
        (await ask(port, "POST", CHAT, b""), 400, "invalid_json"),
        (await ask(port, "POST", CHAT, {}), 400, "missing_model"),
        (await ask(port, "POST", CHAT, b'{"model":"small","model":"warm"}'), 400, "duplicate_model"),
        (await ask(port, "POST", CHAT, {"model": "x" * 900}), 404, "model_not_found"),
        (
            await ask(port, "POST", CHAT, {"model": "small"}, x_tidegate_deadline_ms="-1"),
            400,
            "invalid_header",
        ),
        (
            await ask(port, "POST", CHAT, {"model": "small"}, content_encoding="gzip"),
            400,
            "unsupported_encoding",
        ),
        (await ask(port, "POST", CHAT, b" " * 1025), 413, "body_too_large"),
        (
            await ask(port, "POST", CHAT, b"\x00" * 9, content_type="multipart/form-data"),
            400,
            "invalid_multipart",
        ),
    ]
    for answer, status, code in cases:
        assert (answer.status, answer.error["code"]) == (status, code)
        assert len(answer.error["message"]) <= 500
        assert answer.header("x-request-id")
    assert not one.admission.acquired
    assert (await one.chat()).status == 200


async def test_a_chunked_body_over_the_limit_is_refused_as_it_comes(bench: Make) -> None:
    """Without a length the limit holds too, and the connection is closed."""
    one = await bench(echo(), max_body="1KiB")
    client = await one.client()
    client.writer.write(b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % CHAT.encode())
    client.writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n400\r\n" + b"x" * 1024 + b"\r\n")
    answer = await client.whole()
    assert (answer.status, answer.header("connection")) == (413, "close")


async def test_held_bodies_are_bounded_together(bench: Make) -> None:
    """Beyond max_buffered a new request gets 503; what waits is kept, and the room comes back."""
    one = await bench(echo(), max_buffered="1KiB")
    one.admission.holding = True
    body = b'{"model":"small","x":"' + b"x" * 600 + b'"}'
    waiting = [await one.client(), await one.client()]
    await waiting[0].send("POST", CHAT, body)
    await until(lambda: one.admission.acquired, "the first one waits")
    await waiting[1].send("POST", CHAT, body)
    answer = await waiting[1].whole()
    assert (answer.status, answer.error["code"]) == (503, "server_is_overloaded")
    one.admission.grant(one.admission.acquired[0].n)
    assert (await waiting[0].whole()).status == 200
    one.admission.holding = False
    assert (await ask(one.edge.port, "POST", CHAT, body)).status == 200


async def test_a_body_that_comes_too_slowly_is_refused(bench: Make) -> None:
    """A client that stops sending its body gets 408 after write_timeout."""
    one = await bench(echo(), write_timeout="1s")
    client = await one.client()
    client.writer.write(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{" % CHAT.encode())
    answer = await client.whole()
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("identity", ["a" * 129, "a b", "x\u00e9", ""])
async def test_an_insane_request_id_is_replaced(bench: Make, identity: str) -> None:
    """Only [A-Za-z0-9._-]{1,128} is kept; the model server hears the same id as the client."""
    one = await bench(echo())
    client = await Client.to(one.edge.port)
    await client.send("POST", CHAT, b'{"model":"small"}', x_request_id=identity)
    answer = await client.whole()
    client.leave()
    made = answer.header("x-request-id") or ""
    assert len(made) == 32
    assert one.server.seen[0].header(b"x-request-id") == made.encode()
    assert (await one.edge.access())[0]["request_id"] == made
