"""What a request and its answer look like on both sides of the edge."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.edge.conftest import CHAT, Make
from tests.edge.fakes import Connection, ask, echo
from tests.support.until import until
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate_edge.due import Due
from tidegate_edge.envelope import Failure


async def test_a_request_passes_unchanged_but_for_its_model(bench: Make) -> None:
    """Body bytes, query and end-to-end headers arrive as sent; the alias becomes the server's name."""
    one = await bench(echo())
    client = await one.client()
    body = b' {"temperature" : 0.10, "model" :  "gpt-small" ,"x":"\\u00e9\xc3\xa9"}'
    await client.send(
        "POST", CHAT + "?a=b%20c&a", body, content_type="application/json", x_own="1", te="trailers",
        connection="x-drop, keep-alive", x_drop="1", x_request_id="mine-1",
    )  # fmt: skip
    answer = await client.whole()
    seen = one.server.seen[0]
    assert seen.line == b"POST /v1/chat/completions?a=b%20c&a HTTP/1.1"
    assert seen.body == body.replace(b'"gpt-small"', b'"inner/small"')
    assert seen.header(b"x-own") == b"1"
    assert seen.header(b"x-request-id") == b"mine-1"
    assert seen.header(b"host") == one.server.url.removeprefix("http://").encode()
    assert not {b"te", b"x-drop", b"connection", b"accept-encoding", b"user-agent"} & {
        name.lower() for name, _ in seen.headers
    }
    assert answer.status == 200
    assert json.loads(answer.body)["id"] == "x"
    wanted = {
        "x-request-id": "mine-1",
        "x-queue-depth": "1",
        "x-max-concurrent": "3",
        "x-max-queue-size": "4",
        "x-tidegate-instance": "node/m/1",
    }
    assert {name: answer.header(name) for name in wanted} == wanted
    assert int(answer.header("x-tidegate-queue-ms") or -1) >= 0
    assert await one.admission.outcome() == "OK"
    done = one.admission.done[1]
    assert (done.prompt_tokens, done.completion_tokens, done.tokens_estimated) == (3, 4, False)
    assert one.admission.acquired[0].catalog_generation.n == 4


async def test_defaults_are_inserted_under_the_callers_fields(bench: Make) -> None:
    """request_defaults fill in what the caller left out, and nothing else changes."""
    one = await bench(echo())
    await one.chat(model="warm", top_k=1)
    assert one.server.seen[0].body == b'{"temperature":0.5,"model": "warm", "top_k": 1}'


async def test_chunks_pass_as_they_come(bench: Make) -> None:
    """Each event reaches the client while the model server is still silent about the next one."""
    heard: list[bytes] = []

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.begin_events()
        for i in range(5):
            await connection.chunk(b"data: %d\n\n" % i)
            await until(lambda: len(heard) > i, "the client heard the event")  # noqa: B023
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.say(b"0\r\n\r\n")

    one = await bench(script)
    client = await one.client()
    await client.send("POST", CHAT, b'{"model":"small","stream":true}')
    answer = await client.head()
    assert answer.header("content-type") == "text/event-stream"
    assert answer.header("x-accel-buffering") == "no"
    while piece := await client.piece():
        heard.append(piece)
    assert b"".join(heard) == b"data: 0\n\ndata: 1\n\ndata: 2\n\ndata: 3\n\ndata: 4\n\ndata: [DONE]\n\n"
    assert await one.admission.outcome() == "OK"
    done = one.admission.done[1]
    assert (done.completion_tokens, done.tokens_estimated) == (5, True)
    line = (await one.edge.access())[0]
    assert line["outcome"] == "ok"
    assert line["model"] == "small"


async def test_a_big_body_passes_whole(bench: Make) -> None:
    """A body of several MiB reaches the model server byte for byte."""
    one = await bench(echo())
    body = b'{"model":"small","text":"' + b"x" * 5_000_000 + b'"}'
    answer = await ask(one.edge.port, "POST", CHAT, body)
    assert answer.status == 200
    assert one.server.seen[0].body == body.replace(b'"small"', b'"inner/small"')


async def test_connections_to_model_servers_are_kept(bench: Make) -> None:
    """Requests one after the other use one connection, and the metrics say so."""
    one = await bench(echo())
    for _ in range(20):
        assert (await one.chat()).status == 200
    assert len(one.server.connections) == 1
    text = (await ask(one.edge.port, "GET", "/metrics")).body.decode()
    assert 'tidegate_edge_upstream_requests_total{connection="reused"} 19.0' in text
    assert 'tidegate_edge_requests_total{model="small",outcome="ok",status="200"} 20.0' in text
    assert "tidegate_edge_in_flight 0.0" in text


@pytest.mark.parametrize("status", ["400 Bad Request", "500 Internal Server Error", "307 Temporary Redirect"])
async def test_errors_of_the_model_server_pass_unchanged(bench: Make, status: str) -> None:
    """Status and body of a model server's error are the client's; nothing is tried again."""

    async def script(connection: Connection) -> None:
        while await connection.request():
            await connection.answer(b'{"error":{"message":"vllm","code":400}}', status)

    one = await bench(script)
    answer = await one.chat()
    assert answer.status == int(status[:3])
    assert answer.body == b'{"error":{"message":"vllm","code":400}}'
    assert len(one.server.seen) == 1
    assert await one.admission.outcome() == ("UPSTREAM_ERROR" if status[0] == "5" else "OK")


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
async def test_a_busy_model_server_is_backpressure(bench: Make, status: str) -> None:
    """429 and 503 of a model server pass as they are; admission is told that it is busy, not broken."""

    async def script(connection: Connection) -> None:
        await connection.request()
        body = b'{"error":{"message":"full"}}'
        head = f"HTTP/1.1 {status}\r\nretry-after: 7\r\ncontent-length: {len(body)}\r\n\r\n"
        await connection.say(head.encode() + body)

    one = await bench(script)
    answer = await one.chat()
    assert (answer.status, answer.header("retry-after")) == (int(status[:3]), "7")
    assert answer.body == b'{"error":{"message":"full"}}'
    assert len(one.server.seen) == 1
    assert await one.admission.outcome() == "BACKPRESSURE"


async def test_audio_is_sent_by_the_model_of_its_form(bench: Make) -> None:
    """The part `model` of a multipart form is found and rewritten; the file passes untouched."""
    one = await bench(echo())
    body = (
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\x00\r\n-BB\xff\r\n'
        b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\ngpt-small\r\n--B--\r\n'
    )
    answer = await ask(
        one.edge.port,
        "POST",
        "/v1/audio/transcriptions",
        body,
        content_type="multipart/form-data; boundary=B",
    )
    assert answer.status == 200
    assert one.server.seen[0].body == body.replace(b"gpt-small", b"inner/small")


async def test_the_callers_deadline_goes_with_the_ticket(bench: Make) -> None:
    """What is left of x-tidegate-deadline-ms is told to admission."""
    one = await bench(echo())
    await ask(one.edge.port, "POST", CHAT, {"model": "small"}, x_tidegate_deadline_ms="1500")
    assert 1000 < one.admission.acquired[0].deadline_ms <= 1500


def test_a_deadline_runs_from_the_requests_arrival() -> None:
    """Whatever the request waits for is no longer left of it; without one nothing ever is too late."""
    clock = [100.0]
    due, never = Due(5.0, lambda: clock[0]), Due(0.0, lambda: clock[0])
    clock[0] += 3.0
    assert due.left() == 2.0
    clock[0] += 2.0
    assert never.left() == 0.0
    with pytest.raises(Failure) as late:
        due.left()
    assert (late.value.status, late.value.code, late.value.final) == (504, "deadline_exceeded", True)


async def test_an_admission_that_says_nothing_lets_nobody_wait_beyond_the_own_deadline(bench: Make) -> None:
    """The edge ends the wait within a second of it; so it does while it waits for admission itself."""
    one = await bench(echo())
    one.admission.holding = True
    loop = asyncio.get_running_loop()
    for away in (False, True):
        if away:
            await one.admission.stop_server()
            await one.edge.readiness(503)
        begun = loop.time()
        answer = await ask(one.edge.port, "POST", CHAT, {"model": "small"}, x_tidegate_deadline_ms="300")
        assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
        assert answer.header("x-should-retry") == "false"
        assert 0.25 <= loop.time() - begun <= 2.5


async def test_affinity_goes_with_the_ticket_and_not_to_the_server(bench: Make) -> None:
    """Nobody needs a key for it: it steers only the tenant's own requests."""
    one = await bench(echo())
    await ask(one.edge.port, "POST", CHAT, {"model": "small"}, x_tidegate_affinity="chat-17")
    await ask(one.edge.port, "POST", CHAT, {"model": "small"})
    assert [offer.affinity for offer in one.admission.acquired] == ["chat-17", ""]
    assert one.server.seen[0].header(b"x-tidegate-affinity") is None


async def test_tenant_and_priority_go_with_the_ticket_without_keys(bench: Make) -> None:
    """With `auth: none` they are believed; what can't be read is refused, naming what is allowed."""
    open_one = await bench(echo(), auth="none")
    words = {"x_tidegate_tenant": "team-1", "x_tidegate_priority": "High"}
    assert (await ask(open_one.edge.port, "POST", CHAT, {"model": "small"}, **words)).status == 200
    offer = open_one.admission.acquired[0]
    assert (offer.tenant, offer.band) == ("team-1", pb.BAND_HIGH)
    assert open_one.server.seen[0].header(b"x-tidegate-tenant") is None
    for bad in ({"x_tidegate_priority": "urgent"}, {"x_tidegate_tenant": "no spaces"}):
        answer = await ask(open_one.edge.port, "POST", CHAT, {"model": "small"}, **bad)
        assert answer.status == 400
    assert (
        b"high, normal or low"
        in (await ask(open_one.edge.port, "POST", CHAT, {"model": "small"}, x_tidegate_priority="1")).body
    )


async def test_with_keys_tenant_and_priority_are_ignored(bench: Make) -> None:
    """Nobody is believed who he is without `auth: none`, and what he says goes nowhere."""
    one = await bench(echo())
    words = {"x_tidegate_tenant": "team-1", "x_tidegate_priority": "whatever"}
    assert (await ask(one.edge.port, "POST", CHAT, {"model": "small"}, **words)).status == 200
    offer = one.admission.acquired[0]
    assert (offer.tenant, offer.band) == ("", pb.BAND_NORMAL)
    assert one.server.seen[0].header(b"x-tidegate-priority") is None
