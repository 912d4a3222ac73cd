"""Which paths lead where, and what the edge says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.edge.conftest import CHAT, Make
from tests.edge.fakes import Client, ask, echo
from tests.support.until import until
from tidegate_edge.envelope import KINDS
from tidegate_edge.routes import By, Routes, Takes

NEVER = (
    "/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/server_info", "/reset_prefix_cache", "/load",
    "/metrics/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/scale_elastic_ep", "/invocations",
    "/start_profile", "/version", "/v1/chat/completions/", "/v1//chat/completions", "//v1/chat/completions",
    "/v1/./chat/completions", "/x/../v1/chat/completions", "/v1/chat%2fcompletions", "/v1/%63hat/completions",
    "/V1/chat/completions", "/v1/chat/completions%00", "/v1/models/../../sleep", "/%2e%2e/sleep", "/",
    "/v1/chat/completions;x", "/v1/chat/completions/../../../sleep", "http://x/sleep", "http://x//sleep",
    "/v1/responses/../../sleep", "/v1/responses/a/../../../sleep", "/v1/responses/%2e%2e%2fsleep",
    "/v1/responses/a/sleep", "/v1/responses//cancel", "/v1/responses/.", "/v1/responses/a%00/cancel",
    "/v1/realtime",
)  # fmt: skip
OPERATING = (
    b"/sleep", b"/wake_up", b"/is_sleeping", b"/collective_rpc", b"/server_info", b"/reset_prefix_cache",
    b"/reset_mm_cache", b"/pause", b"/resume", b"/abort_requests", b"/release_kv_cache_memory", b"/metrics",
    b"/load", b"/version", b"/health", b"/ping", b"/invocations", b"/tokenizer_info", b"/scale_elastic_ep",
    b"/is_scaling_elastic_ep", b"/fault_tolerance/apply", b"/start_profile", b"/stop_profile", b"/slots",
    b"/props", b"/lora-adapters", b"/inference/v1/generate", b"/v1/load_lora_adapter",
    b"/v1/unload_lora_adapter", b"/v1/realtime", b"/update_weights", b"/flush_cache", b"/docs",
)  # fmt: skip
LISTED = [route.path.encode() for route in Routes().all()]
IDENTITY = re.compile(rb"[A-Za-z0-9_-]{1,256}")


def encoded(path: bytes, place: int) -> bytes:
    """With one byte percent-encoded."""
    at = place % len(path)
    return path[:at] + b"%%%02x" % path[at] + path[at + 1 :]


def put(path: bytes, place: int, what: bytes) -> bytes:
    """With something put in."""
    at = place % (len(path) + 1)
    return path[:at] + what + path[at:]


BITS = (
    b"/", b"//", b"/.", b"/..", b"/../", b"%2f", b"%2e%2e/", b"%00", b"\x00", b";", b";a=b", b"\\", b"%5c",
    b"?", b"#", b" ", b"\t", b"\r\n", b"%0d%0a", b"\xc0\xaf", b":", b"@", b"*",
)  # fmt: skip
WHOLE: tuple[Callable[[bytes], bytes], ...] = (
    bytes.upper,
    bytes.title,
    bytes.swapcase,
    lambda path: b"http://host" + path,
    lambda path: b"/v1/chat/completions/.." + path,
    lambda path: b"/v1/responses/.." + path,
    lambda path: b"/v1/responses/x" + path,
    lambda path: b"/v1/models/../.." + path,
    lambda path: path + b"/v1/chat/completions",
    lambda path: path[1:],
)
CHANGES = st.one_of(
    st.builds(lambda place: lambda path: encoded(path, place), st.integers(0, 60)),
    st.builds(
        lambda place, what: lambda path: put(path, place, what), st.integers(0, 60), st.sampled_from(BITS)
    ),
    st.sampled_from(WHOLE),
)


ROUTES = Routes()


def check(path: bytes) -> None:
    """It leads nowhere, or it is one of the list, with a plain id in its place."""
    found = ROUTES.find(path)
    if found is not None:
        route, identity = found
        assert route.path.encode().replace(b"{id}", identity) == path
        assert not identity or IDENTITY.fullmatch(identity)
        assert path not in OPERATING


def test_each_single_change_of_a_path_is_no_path() -> None:
    """Every place of every path, encoded, with anything put in, or the case changed."""
    for path in (*OPERATING, *LISTED):
        for place in range(len(path)):
            check(encoded(path, place))
            check(path[:place] + bytes((path[place] ^ 0x20,)) + path[place + 1 :])
            for what in BITS:
                check(put(path, place, what))
        for change in WHOLE:
            check(change(path))


@given(st.sampled_from([*OPERATING, *LISTED]), st.lists(CHANGES, max_size=4))
def test_what_is_found_is_on_the_list_byte_by_byte(
    path: bytes, changes: list[Callable[[bytes], bytes]]
) -> None:
    """However a path is written."""
    for change in changes:
        path = change(path or b"/")
    check(path)


@given(st.binary(max_size=40) | st.from_regex(rb"/v1/responses/.{0,20}", fullmatch=True))
def test_no_other_bytes_are_found(path: bytes) -> None:
    """The same for any bytes."""
    check(path)


def test_extra_routes_are_found_with_their_own_methods() -> None:
    """They are added to the built-in ones and take nothing from these."""
    routes = Routes(["POST /v1/own", "PUT /v1/own", "PUT /v1/embeddings"])
    found = {route.path: route.methods for route in routes.all()}
    assert found["/v1/own"] == {"POST", "PUT"}
    assert found["/v1/embeddings"] == {"POST", "PUT"}
    assert len(found) == len(LISTED) + 1


async def test_only_listed_routes_reach_a_model_server(bench: Make) -> None:
    """Each inference route is relayed, as it was sent; nothing else is, however its path is written."""
    one = await bench(echo(), extra_routes=["POST /v1/own", "PUT /v1/own"])
    port, expected = one.edge.port, []
    for route in Routes(["POST /v1/own", "PUT /v1/own"]).all():
        path = route.path.replace("{id}", "resp_1") + "?a=%2e&b"
        for method in sorted(route.methods):
            body = {"model": "small"} if route.by is By.BODY else b""
            assert (await ask(port, method, path, body, x_tidegate_model="small")).status == 200, path
            expected.append(f"{method} {path} HTTP/1.1".encode())
    assert [seen.line for seen in one.server.seen] == expected
    assert (await ask(port, "POST", f"http://any{CHAT}", {"model": "small"})).status == 200
    assert one.server.seen.pop().line == f"POST {CHAT} HTTP/1.1".encode()
    for path in NEVER:
        for method in ("POST", "GET"):
            answer = await ask(port, method, path, {"model": "small"} if method == "POST" else b"")
            assert answer.status in (404, 405), path
            assert answer.error["type"] == "invalid_request_error"
            assert answer.header("x-request-id")
    assert len(one.server.seen) == len(expected)


async def test_an_upgrade_is_answered_as_a_plain_request(bench: Make) -> None:
    """There are no web sockets: who asks for one gets what the request alone gets."""
    one = await bench(echo())
    asked: dict[str, Any] = {"connection": "Upgrade", "upgrade": "websocket", "sec_websocket_version": "13"}
    answer = await ask(one.edge.port, "POST", CHAT, {"model": "small"}, **asked)
    assert (answer.status, answer.header("upgrade")) == (200, None)
    assert one.server.seen[0].header(b"upgrade") is None
    assert (await ask(one.edge.port, "GET", "/v1/realtime", **asked)).status == 404
    assert (await ask(one.edge.port, "GET", "/v1/responses", **asked)).status == 405


async def test_the_description_tells_what_is_served(bench: Make) -> None:
    """/openapi.json: each route with its methods and the forms of its body; errors are the envelope."""
    one = await bench(echo(), extra_routes=["PUT /v1/own"])
    answer = await ask(one.edge.port, "GET", "/openapi.json")
    described = json.loads(answer.body)
    for route in Routes(["PUT /v1/own"]).all():
        operations = described["paths"][route.path]
        assert {method.upper() for method in operations} == route.methods
        for operation in operations.values():
            kinds = operation.get("requestBody", {"content": {}})["content"]
            assert ("multipart/form-data" in kinds) is (Takes.FORM in route.takes)
            assert ("application/json" in kinds) is (Takes.JSON in route.takes)
            assert {"400", "404", "413", "429", "502", "503", "504"} < set(operation["responses"])
    for path, operations in described["paths"].items():
        if "get" in operations and "{" not in path:
            got = await ask(one.edge.port, "GET", path)
            assert got.status == 200
            assert (got.header("content-type") or "").split(";")[0] in operations["get"]["responses"]["200"][
                "content"
            ]
    documented = {int(name[1:]) for name in described["components"]["responses"]}
    assert {kind.status for kind in KINDS.values()} <= documented | {405}


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
        (
            await ask(port, "POST", CHAT, {"model": "small"}, content_type="a/b", Content_Type="c/d"),
            400,
            "invalid_header",
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
