"""Model servers that misbehave, behind one real edge: what their clients see, and the next request."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from tests.edge.answers import corpus
from tests.edge.conftest import CHAT, Bench, standing
from tests.edge.fakes import Answer, Connection, ModelServer, ask

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEPT = corpus()
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST = b'data: {"choices":[{"delta":{"content":"\xc3\xa9"}}]}\n\n'
Behaviour = Callable[[Connection], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def says(*parts: bytes, then: str = "closes") -> Behaviour:
    """Says these bytes, then closes its side, resets the connection, or goes on."""

    async def behaviour(connection: Connection) -> None:
        for part in parts:
            await connection.say(part)
        if then == "closes":
            with contextlib.suppress(OSError):
                connection.writer.write_eof()
            await connection.gone()
        elif then == "resets":
            connection.abort()

    return behaviour


WELL = says(b'HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n{"a":12}', then="goes on")


class Server(ModelServer):
    """Answers the request with `?how=NAME` by the behaviour of that name, others well."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.behaviours: dict[str, Behaviour] = {}

    async def _answer(self, connection: Connection) -> None:
        while seen := await connection.request():
            _, _, how = seen.line.split()[1].decode().partition("?how=")
            await self.behaviours.get(how, WELL)(connection)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    """One edge for all tests of this file."""
    folder = tmp_path_factory.mktemp("misbehaviour")
    async with standing(folder, Server(), retries={"attempts": 2, "delay": "10ms"}) as made:
        yield made


def behave(one: Bench, name: str, behaviour: Behaviour) -> None:
    assert isinstance(one.server, Server)
    one.server.behaviours[name] = behaviour


async def request(one: Bench, how: str, path: str = CHAT, stream: bool = False) -> Answer:
    """One request that the server answers by this behaviour."""
    return await ask(one.edge.port, "POST", f"{path}?how={how}", {"model": "small", "stream": stream})


async def well(one: Bench) -> None:
    """The next request is served, by an answer of its own."""
    answer = await request(one, "")
    assert (answer.status, answer.body, answer.complete) == (200, b'{"a":12}', True)


def meant(data: bytes) -> tuple[int, bytes]:
    """Status and body of a whole answer of the corpus, read in the plainest way."""
    while data.lstrip(b"\r\n").startswith(b"HTTP/1.1 1"):
        data = data.partition(b"\r\n\r\n")[2]
    head, _, rest = data.lstrip(b"\r\n").partition(b"\r\n\r\n")
    status, fields = int(head.split()[1]), head.lower()
    if status in (204, 304):
        return status, b""
    if b"chunked" in fields:
        body = b""
        while size := int(rest.partition(b"\r\n")[0].partition(b";")[0], 16):
            rest = rest.partition(b"\r\n")[2]
            body, rest = body + rest[:size], rest[size + 2 :]
        return status, body
    length = next(
        (int(line[15:]) for line in fields.split(b"\r\n") if line.startswith(b"content-length:")), len(rest)
    )
    return status, rest[:length]


@pytest.mark.parametrize("name", [name for name in KEPT if name.startswith("whole/")])
async def test_what_is_an_answer_passes_unchanged(one: Bench, name: str) -> None:
    """Whatever its framing, and whatever follows it: status and body are the server's, and the next client's
    answer is its own."""
    behave(one, name, says(KEPT[name]))
    answer = await request(one, name)
    assert (answer.status, answer.body) == meant(KEPT[name])
    assert answer.complete
    await well(one)


@pytest.mark.parametrize("name", [name for name in KEPT if name.startswith("broken/")])
async def test_what_is_no_answer_is_never_taken_for_one(one: Bench, name: str) -> None:
    """A malformed head is 502 in the envelope, without a word of it; a body that breaks off is cut. A server
    that has begun to work isn't asked again."""
    behave(one, name, says(KEPT[name]))
    seen, acquired = len(one.server.seen), len(one.admission.acquired)
    answer = await request(one, name)
    assert len(one.server.seen) == seen + 1
    assert await one.admission.outcome(one.admission.acquired[acquired].n) == "UPSTREAM_ERROR"
    if answer.status == 502:
        assert (answer.error["type"], answer.error["code"]) == ("upstream_error", "upstream_error")
        assert answer.error["message"] == "The model server's answer was no valid HTTP."
    else:
        assert (answer.status, answer.complete) == (200, False)
    await well(one)


@pytest.mark.parametrize("size", [60_000, 1_000_000])
async def test_a_head_of_a_megabyte_is_none(one: Bench, size: int) -> None:
    """One within the bound passes, a longer one is 502, and costs nothing."""
    big = b"HTTP/1.1 200 OK\r\nx-big: " + b"x" * size + b"\r\ncontent-length: 2\r\n\r\n{}"
    behave(one, "big", says(big))
    assert (await request(one, "big")).status == (200 if size < 65_536 else 502)
    await well(one)


async def test_a_line_of_a_megabyte_passes_unchanged(one: Bench) -> None:
    """Lines have no bound: bytes are passed on, not lines; a character cut in two is none of our business."""
    line = b'data: "' + "é".encode() * 500_001 + b'"\n\n'
    parts = [chunk(line[i : i + 99_999]) for i in range(0, len(line), 99_999)]
    end = b"data: [DONE]\n\n"
    behave(one, "line", says(EVENTS, *parts, chunk(end), b"0\r\n\r\n", then="goes on"))
    answer = await request(one, "line", stream=True)
    assert answer.body == line + end
    assert answer.complete


async def test_an_answer_that_comes_before_the_request_was_read_passes(one: Bench) -> None:
    """A 413 at the sight of the head: the client gets it, though its body never arrived."""

    async def at_once(connection: Connection) -> None:
        await connection.reader.readuntil(b"\r\n\r\n")
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await connection.answer(b'{"error":{"message":"too long"}}', "413 Content Too Large")
        await asyncio.Event().wait()

    async with ModelServer(at_once).running() as other:
        one.admission.address = other.url
        big = b'{"model":"small","x":"' + b"x" * 20_000_000 + b'"}'
        for number in (1, 2):
            answer = await ask(one.edge.port, "POST", CHAT, big)
            assert (answer.status, answer.error["message"]) == (413, "too long")
            assert len(other.connections) == number
        one.admission.address = one.server.url
    await well(one)


ROUTES = {
    CHAT: (b"data: [DONE]\n\n", b'data: {"error":{"message":', b"}}\n\ndata: [DONE]\n\n"),
    "/v1/completions": (b"data: [DONE]\n\n", b'data: {"error":{"message":', b"}}\n\ndata: [DONE]\n\n"),
    "/v1/audio/transcriptions": (b"data: [DONE]\n\n", b'data: {"error":', b"}}\n\ndata: [DONE]\n\n"),
    "/v1/audio/translations": (b"data: [DONE]\n\n", b'data: {"error":', b"}}\n\ndata: [DONE]\n\n"),
    "/v1/responses": (
        b'event: response.completed\ndata: {"type":"response.completed","response":{}}\n\n',
        b'event: error\ndata: {"type":"error",', b"}}\n\n",
    ),
    "/v1/messages": (
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
        b'event: error\ndata: {"type":"error","error":{', b"}}\n\n",
    ),
}  # fmt: skip
"""Routes that stream: their last event, and how an error of ours begins and ends in them."""
FAILURES: dict[str, Behaviour] = {
    "dies-between-events": says(EVENTS, chunk(FIRST), then="resets"),
    "closes-between-events": says(EVENTS, chunk(FIRST)),
    "dies-within-a-character": says(EVENTS, chunk(FIRST), chunk(b'data: "\xc3'), then="resets"),
    "closes-within-a-chunk": says(EVENTS, chunk(FIRST), b'20\r\ndata: {"half'),
    "ends-without-a-last-event": says(EVENTS, chunk(FIRST), b"0\r\n\r\n", then="goes on"),
    "says-a-bad-chunk": says(EVENTS, chunk(FIRST), b"zz\r\n", then="goes on"),
    "has-no-framing": says(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", FIRST),
    "comes-at-once-and-unframed": says(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + FIRST),
}


def body_of(path: str) -> tuple[bytes, dict[str, str]]:
    if "audio" not in path:
        return b'{"model":"small","stream":true}', {}
    form = b'--B\r\ncontent-disposition: form-data; name="model"\r\n\r\nsmall\r\n--B--\r\n'
    return form, {"content_type": "multipart/form-data; boundary=B"}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("path", ROUTES)
async def test_a_stream_that_breaks_off_ends_with_an_error_in_its_dialect(
    one: Bench, path: str, failure: str
) -> None:
    """What had come is passed on; then, on a line of its own, an error; never an end that looks complete."""
    behave(one, failure, FAILURES[failure])
    before = len(one.admission.acquired)
    body, fields = body_of(path)
    answer = await ask(one.edge.port, "POST", f"{path}?how={failure}", body, **fields)
    last, begin, end = ROUTES[path]
    assert answer.status == 200
    got, found, rest = answer.body.partition(begin)
    assert got.startswith(FIRST)
    assert got.endswith(b"\n\n")
    assert found
    assert rest.endswith(end)
    assert last not in got
    assert b'"upstream_error"' in rest or b'"api_error"' in rest
    assert await one.admission.outcome(one.admission.acquired[before].n) == "UPSTREAM_ERROR"
    await well(one)


@pytest.mark.parametrize("framing", ["chunks", "end"])
@pytest.mark.parametrize("path", ROUTES)
async def test_a_stream_with_its_last_event_passes_unchanged(one: Bench, path: str, framing: str) -> None:
    """Whether chunks tell its end or the connection's does."""
    events = FIRST + ROUTES[path][0]
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    behave(
        one, "fine", says(EVENTS, chunk(events), b"0\r\n\r\n") if framing == "chunks" else says(head, events)
    )
    body, fields = body_of(path)
    answer = await ask(one.edge.port, "POST", f"{path}?how=fine", body, **fields)
    assert (answer.body, answer.complete) == (events, True)


@pytest.mark.parametrize(
    ("end", "whole"),
    [
        (b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n', True),
        (b'data: {"error":{"message":"out of memory"}}\n\n', True),
        (b'data: {"choices":[{"delta":{},"finish_reason":null}]}\n\n', False),
    ],
)
async def test_a_server_without_end_marks_is_believed_when_it_says_why_it_stopped(
    one: Bench, end: bytes, whole: bool
) -> None:
    """A framed stream that has told its finish reason, or its own error, is a whole one."""
    behave(one, "unmarked", says(EVENTS, chunk(FIRST), chunk(end), b"0\r\n\r\n"))
    answer = await request(one, "unmarked", stream=True)
    assert answer.body.startswith(FIRST + end)
    assert (answer.body == FIRST + end) == whole


async def test_a_compressed_stream_is_not_judged_by_its_bytes(one: Bench) -> None:
    """What can't be read here passes as it is, and is cut when it breaks off: nothing can be added to it."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n"
    framed = head + b"transfer-encoding: chunked\r\n\r\n"
    behave(one, "packed", says(framed, chunk(b"\x1f\x8bpacked"), b"0\r\n\r\n"))
    answer = await request(one, "packed", stream=True)
    assert (answer.body, answer.complete) == (b"\x1f\x8bpacked", True)
    behave(one, "packed-cut", says(framed, chunk(b"\x1f\x8bpacked")))
    answer = await request(one, "packed-cut", stream=True)
    assert not answer.complete


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_of_the_server_is_the_clients_for_streams_too(
    one: Bench, status: int, stream: bool
) -> None:
    """Status, body and type as they came: a stream answers 200 only when its server did."""
    body = b'{"error":{"message":"no","type":"BadRequestError","code":%d}}' % status
    wire = b"HTTP/1.1 %d Odd\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
    behave(one, "error", says(wire % (status, len(body), body), then="goes on"))
    answer = await request(one, "error", stream=stream)
    assert (answer.status, answer.body, answer.header("content-type")) == (status, body, "application/json")
    assert json.loads(answer.body)["error"]["code"] == status
