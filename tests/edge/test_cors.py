"""What browsers are told: on every answer, and when they ask before a request."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.edge.conftest import CHAT, Bench, Make
from tests.edge.fakes import Answer, Client, Connection, ask
from tests.edge.keyfiles import bearer, key, put, running
from tidegate_edge.cors import Cors, is_own
from tidegate_edge.routes import Routes

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHATS, OTHER = "https://chat.example.org", "https://evil.example"
PAGES = ("/v1/models", "/v1/models/org/Plain-7B", "/health", "/gateway/status", "/metrics")
SENT = "authorization,content-type,x-api-key,x-stainless-arch,x-stainless-retry-count"


async def open_handed(connection: Connection) -> None:
    """A model server that allows every page, as vLLM does unless told otherwise."""
    while seen := await connection.request():
        allowed = b"access-control-allow-origin: *\r\naccess-control-allow-credentials: true\r\n"
        if b'"stream"' in seen.body:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
            await connection.say(head + allowed + b"\r\n")
            await connection.chunk(b"data: [DONE]\n\n")
            await connection.say(b"0\r\n\r\n")
        else:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n"
            await connection.say(head + allowed + b"\r\n{}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    """An edge with keys that pages of one origin may call."""
    folder = tmp_path_factory.mktemp("cors")
    put(folder / "tidegate-keys.json", key("all", scopes=["inference", "operator"]))
    async with running(folder, open_handed, cors_origins=[CHATS, "http://localhost:3000"]) as bench:
        yield bench


def allowed(answer: Answer) -> list[str]:
    """What an answer says about origins, each time it does."""
    return [value for name, value in answer.fields if name == "access-control-allow-origin"]


async def test_every_answer_of_the_edge_names_the_origin(one: Bench) -> None:
    """Relayed ones, streams, pages and each error; with what a page may read, and for which caches."""
    port, headers = one.edge.port, {"origin": CHATS, "authorization": bearer("all")}
    answers = [
        await ask(port, "POST", CHAT, {"model": "small"}, **headers),
        await ask(port, "POST", CHAT, {"model": "small", "stream": True}, **headers),
        await ask(port, "POST", CHAT, {"model": "none"}, **headers),
        await ask(port, "POST", CHAT, b"{", **headers),
        await ask(port, "POST", CHAT, {"model": "small"}, **headers, x_tidegate_deadline_ms="-1"),
        await ask(port, "POST", CHAT, {"model": "small"}, origin=CHATS),
        await ask(port, "GET", CHAT, b"", **headers),
        await ask(port, "GET", "/nowhere", b"", **headers),
        *[await ask(port, "GET", path, b"", **headers) for path in PAGES],
    ]
    assert [answer.status for answer in answers[:8]] == [200, 200, 404, 400, 400, 401, 405, 404]
    assert {answer.status for answer in answers[8:]} == {200}
    for answer in answers:
        assert allowed(answer) == [CHATS]
        assert answer.header("vary") == "origin"
        exposed = (answer.header("access-control-expose-headers") or "").split(", ")
        assert {"x-request-id", "retry-after", "x-tidegate-queue-ms", "x-ratelimit-limit-tokens"} <= {
            *exposed
        }
        assert answer.header("access-control-allow-credentials") is None


async def test_other_pages_are_told_nothing(one: Bench) -> None:
    """Not even what the model server says; caches learn that it depends on the origin."""
    port = one.edge.port
    for origin in ({"origin": OTHER}, {"origin": "null"}, {"origin": CHATS + ".evil.example"}, {}):
        headers = {"authorization": bearer("all"), **origin}
        answer = await ask(port, "POST", CHAT, {"model": "small"}, **headers)
        assert (answer.status, allowed(answer), answer.header("vary")) == (200, [], "origin")
        assert one.server.seen[-1].header(b"origin") is None
        answer = await ask(port, "OPTIONS", CHAT, b"", access_control_request_method="POST", **origin)
        assert (answer.status, allowed(answer), answer.header("allow")) == (204, [], "OPTIONS, POST")
        assert answer.header("access-control-allow-methods") is None


async def test_browsers_may_ask_first(one: Bench) -> None:
    """For every known route, without a key: methods, whatever fields they mean to send, and for how long."""
    routes = {route.path: ", ".join(sorted(route.methods)) for route in Routes().all()}
    routes = {path.replace("{id}", "resp_1"): methods for path, methods in routes.items()}
    routes |= dict.fromkeys(PAGES, "GET, HEAD")
    routes |= {"/gateway/models/org%2FPlain-7B/load": "POST", "/gateway/leases/a/1/revoke": "POST"}
    client = await Client.to(one.edge.port)
    for path, methods in routes.items():
        wanted = ", ".join(sorted([*methods.split(", "), "OPTIONS"]))
        await client.send(
            "OPTIONS", path, origin=CHATS, access_control_request_method=methods.split(",")[0],
            access_control_request_headers=SENT,
        )  # fmt: skip
        answer = await client.whole()
        assert (answer.status, answer.body, allowed(answer)) == (204, b"", [CHATS]), path
        assert answer.header("access-control-allow-methods") == answer.header("allow") == wanted
        assert answer.header("access-control-allow-headers") == SENT
        assert answer.header("access-control-max-age") == "600"
    client.leave()
    answer = await ask(one.edge.port, "OPTIONS", "/nowhere", origin=CHATS)
    assert (answer.status, answer.error["code"]) == (404, "not_found")


@pytest.mark.asyncio(loop_scope="function")
async def test_without_cors_options_tells_what_a_route_takes(bench: Make) -> None:
    """204 with Allow, and not a word for any page."""
    one = await bench(open_handed)
    answer = await ask(one.edge.port, "OPTIONS", CHAT, origin=CHATS, access_control_request_method="POST")
    assert (answer.status, answer.header("allow"), answer.body) == (204, "OPTIONS, POST", b"")
    answers = [answer, await ask(one.edge.port, "OPTIONS", "/v1/models")]
    answers += [await ask(one.edge.port, "POST", CHAT, {"model": "small"}, origin=CHATS)]
    assert answers[1].header("allow") == "GET, HEAD, OPTIONS"
    for answer in answers:
        assert not [name for name, _ in answer.fields if name.startswith("access-control-") or name == "vary"]
    assert (await ask(one.edge.port, "OPTIONS", "/sleep")).status == 404


async def test_every_page_may_call_when_told() -> None:
    """`*` is said as such, to caches too; what isn't a list of names isn't repeated."""
    cors = Cors(["*"])
    for origin in (b"", b"https://any.example"):
        assert dict(cors.fields(origin))[b"access-control-allow-origin"] == b"*"
        assert b"vary" not in dict(cors.fields(origin))
    assert cors.allows(b"https://any.example")
    assert not cors.allows(b"")
    for names in (b"a b", b"a,,b", b"x\tb", b"a" * 5000, b""):
        told = dict(cors.preflight(b"https://any.example", b"POST", names, ["POST"]))
        assert b"access-control-allow-headers" not in told
        assert told[b"access-control-allow-methods"] == b"POST"


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080", True),
        ("http://localhost:8080", "LOCALHOST:8080", True),
        ("http://[::1]:8080", "[::1]:8080", True),
        ("https://10.0.0.5", "10.0.0.5", True),
        ("http://127.0.0.1:9", "127.0.0.1:8080", False),
        ("http://rebound.example:8080", "rebound.example:8080", False),
        ("http://localhost.evil.example", "localhost.evil.example", False),
        ("null", "null", False),
        ("", "", False),
    ],
)
async def test_an_origin_is_the_edges_own_only_by_its_address(origin: str, host: str, own: bool) -> None:
    """A name can be made to resolve to this machine."""
    assert is_own(origin.encode(), host.encode()) is own
