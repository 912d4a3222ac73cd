"""Requests for a response that was given before: they find its model, and only for whom it was given."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.edge.conftest import Bench, Make
from tests.edge.fakes import Answer, Connection, ask
from tidegate_edge.responses import Responses, Watch

RESPONSES = "/v1/responses"


def seen(*chunks: bytes) -> list[bytes]:
    """Ids that are found in an answer."""
    found: list[bytes] = []
    watch = Watch(found.append)
    for chunk in chunks:
        watch.feed(chunk)
    return found


CREATED = (
    b'event: response.created\ndata: {"type":"response.created","sequence_number":0,'
    b'"response":{"created_at":1,"object":"response","id":"resp_1","output":[]}}\n\n'
)

COMPLETED = b'event: response.completed\ndata: {"type":"response.completed","response":{}}\n\n'


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b'{"id":"resp_1","object":"response","output":[{"id":"msg_1"}]}', b"resp_1"),
        (b' {\n "object": "response", "created_at" : 1.5,\n "id" : "resp-2" }', b"resp-2"),
        (b'{"note":"{\\"id\\":\\"no\\"}","x":"\\\\","id":"resp_1"}', b"resp_1"),
        (CREATED, b"resp_1"),
        (b": comment\n\n" + CREATED, b"resp_1"),
        (b'{"output":[{"id":"msg_1"}],"id":"resp_1"}', None),
        (b'{"metadata":{"id":"other"}}', None),
        (b'{"text":"\\"id\\":\\"x\\""}', None),
        (b'{"id":"../sleep"}', None),
        (b'{"id":"' + b"x" * 300 + b'"}', None),
        (b'{"id":7}', None),
        (b'[{"id":"x"}]', None),
        (b" " * 20_000 + b'{"id":"resp_1"}', None),
        (b"", None),
    ],
)
def test_an_answer_tells_its_id(answer: bytes, found: bytes | None) -> None:
    """The id of the response itself, whole or in pieces; nothing nested, and nothing that a text says."""
    expected = [] if found is None else [found]
    assert seen(answer) == expected
    assert seen(*(answer[at : at + 7] for at in range(0, len(answer), 7))) == expected


@given(
    st.dictionaries(st.text(max_size=6).filter(lambda key: key != "id"), st.text(max_size=12), max_size=4),
    st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True),
    st.sampled_from([None, 2]),
    st.lists(st.integers(0, 200), max_size=4),
)
def test_whatever_stands_before_it(
    before: dict[str, str], identity: str, indent: int | None, cuts: list[int]
) -> None:
    """Texts before it may hold anything."""
    raw = json.dumps(before | {"id": identity, "output": [{"id": "x"}]}, indent=indent).encode()
    places = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    assert seen(*(raw[a:b] for a, b in itertools.pairwise(places))) == [identity.encode()]


def test_what_is_known_is_bounded() -> None:
    """By bytes; the longest unused go, and what is asked for is kept."""
    known = Responses(most=100_000)
    known.learn("a", b"kept", "small")
    for i in range(1000):
        known.learn("a", b"resp_%d" % i, "m" * (i % 50))
        assert known.find("a", b"kept") == "small"
        assert known.size <= 100_000
    assert 100 < len(known) < 260
    assert known.find("a", b"resp_999")
    assert not known.find("a", b"resp_1")
    assert not known.find("b", b"kept")
    known.learn("a", b"kept", "other")
    assert known.find("a", b"kept") == "other"


class Server:
    """A model server that gives a new id with each response, and tells what it is asked."""

    def __init__(self) -> None:
        self.given = 0

    async def __call__(self, connection: Connection) -> None:
        while request := await connection.request():
            if not request.line.startswith(b"POST /v1/responses HTTP"):
                await connection.answer(b'{"usage":{"input_tokens":3,"output_tokens":4}}')
                continue
            self.given += 1
            if json.loads(request.body).get("stream"):
                event = CREATED.replace(b"resp_1", b"resp_%d" % self.given)
                await connection.begin_events()
                await connection.chunk(event[:90])
                await connection.chunk(event[90:])
                await connection.chunk(COMPLETED)
                await connection.say(b"0\r\n\r\n")
            else:
                await connection.answer(b'{"id":"resp_%d","object":"response"}' % self.given)


async def give(one: Bench, model: str, stream: bool = False, **headers: str) -> None:
    body = {"model": model, "input": "x", "stream": stream}
    assert (await ask(one.edge.port, "POST", RESPONSES, body, **headers)).status == 200


async def test_a_response_is_found_by_its_id(bench: Make) -> None:
    """However it was given: got, cancelled and deleted on a slot of its model, at no cost in tokens."""
    one = await bench(Server())
    await give(one, "gpt-small")
    await give(one, "warm", stream=True)
    known = len(one.admission.acquired)
    asked = [
        ("GET", "resp_1", "small"),
        ("GET", "resp_1/input_items?limit=2", "small"),
        ("GET", "resp_2?stream=true&starting_after=1", "warm"),
        ("POST", "resp_2/cancel", "warm"),
        ("DELETE", "resp_1", "small"),
    ]
    for method, path, _ in asked:
        assert (await ask(one.edge.port, method, f"{RESPONSES}/{path}")).status == 200
    assert [ticket.model for ticket in one.admission.acquired[known:]] == [model for _, _, model in asked]
    lines = [seen.line.decode() for seen in one.server.seen[known:]]
    assert lines == [f"{method} {RESPONSES}/{path} HTTP/1.1" for method, path, _ in asked]
    for ticket in one.admission.acquired[known:]:
        assert await one.admission.outcome(ticket.n) == "OK"
        assert one.admission.done[ticket.n].without_tokens
    access = (await one.edge.access(known + len(asked)))[known:]
    assert {line["completion_tokens"] for line in access} == {0}
    assert {line["route"] for line in access} == {
        "GET /v1/responses/{id}",
        "GET /v1/responses/{id}/input_items",
        "POST /v1/responses/{id}/cancel",
        "DELETE /v1/responses/{id}",
    }


async def test_an_unknown_response_is_404_that_says_what_to_do(bench: Make) -> None:
    """Nothing is queued for it; with the header it goes to that model, which may know it."""
    one = await bench(Server())
    answer = await ask(one.edge.port, "GET", f"{RESPONSES}/resp_9")
    assert (answer.status, answer.error["code"]) == (404, "response_not_found")
    assert "x-tidegate-model" in answer.error["message"]
    assert not one.admission.acquired
    named: list[tuple[str, int]] = [("gpt-small", 200), ("none", 404), ("a b", 400)]
    for model, status in named:
        answer = await ask(one.edge.port, "GET", f"{RESPONSES}/resp_9", x_tidegate_model=model)
        assert answer.status == status
    assert [ticket.model for ticket in one.admission.acquired] == ["small"]
    assert one.server.seen[0].header(b"x-tidegate-model") is None


async def test_the_header_wins_over_what_was_seen(bench: Make) -> None:
    """The caller knows best."""
    one = await bench(Server())
    await give(one, "small")
    await ask(one.edge.port, "GET", f"{RESPONSES}/resp_1", x_tidegate_model="warm")
    assert one.admission.acquired[-1].model == "warm"


async def test_nobody_finds_what_was_given_to_another(bench: Make) -> None:
    """Ids are looked up by owner."""
    one = await bench(Server(), auth="none")
    await give(one, "small", x_tidegate_tenant="a")

    async def get(**headers: Any) -> Answer:
        return await ask(one.edge.port, "GET", f"{RESPONSES}/resp_1", **headers)

    assert (await get(x_tidegate_tenant="b")).status == 404
    assert (await get()).status == 404
    assert (await get(x_tidegate_tenant="a")).status == 200


async def test_a_lost_stream_of_a_response_ends_in_its_dialect(bench: Make) -> None:
    """A response that is followed as a stream is one of /v1/responses, when its server dies, too."""

    async def dies(connection: Connection) -> None:
        await connection.request()
        await connection.begin_events()
        await connection.chunk(CREATED)
        connection.abort()

    one = await bench(dies)
    answer = await ask(one.edge.port, "GET", f"{RESPONSES}/resp_1?stream=true", x_tidegate_model="small")
    assert answer.complete
    assert b"event: error\ndata: {" in answer.body
    assert b"[DONE]" not in answer.body
