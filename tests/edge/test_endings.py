"""Every way in which a request can end, and what client, admission and model server see of it."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest

from tests.edge.conftest import CHAT, Make
from tests.edge.fakes import Connection, EdgeProcess, echo
from tests.support.until import until
from tidegate.admission.v1 import admission_pb2 as ad

STREAM = b'{"model":"small","stream":true}'
FAST = {"attempts": 3, "delay": "50ms", "factor": 1.5}


async def silent(connection: Connection) -> None:
    """Takes a request and says nothing."""
    await connection.request()
    await connection.gone()


async def streaming(connection: Connection) -> None:
    """Says one event, then nothing."""
    await connection.request()
    await connection.begin_events()
    await connection.chunk(b'data: {"a":1}\n\n')
    await connection.gone()


async def test_a_client_that_leaves_while_queued_frees_its_place(bench: Make) -> None:
    """A ticket of a client that has gone is ended; no model server hears of it."""
    one = await bench(echo())
    one.admission.holding = True
    client = await one.client()
    await client.send("POST", CHAT, STREAM)
    await until(lambda: one.admission.acquired, "a ticket")
    client.leave()
    assert await one.admission.outcome() == "UNUSED"
    assert not one.server.seen
    assert (await one.edge.access())[0]["status"] == 499


@pytest.mark.parametrize("body", [b'{"model":"small"}', STREAM])
async def test_a_client_that_leaves_before_the_first_byte_ends_the_upstream_call(
    bench: Make, body: bytes
) -> None:
    """Streaming or not: the model server's connection closes, then the slot is free."""
    one = await bench(silent)
    client = await one.client()
    await client.send("POST", CHAT, body)
    await until(lambda: one.server.seen, "the request arrived")
    client.leave()
    assert await one.admission.outcome() == "CLIENT_GONE"
    await asyncio.wait_for(one.server.connections[0].closed.wait(), 5)


async def test_a_client_that_leaves_in_mid_stream_ends_the_upstream_call(bench: Make) -> None:
    """A stream whose client has gone is closed at the model server and gives its slot back."""
    one = await bench(streaming)
    client = await one.client()
    await client.send("POST", CHAT, STREAM)
    await client.head()
    assert await client.piece() == b'data: {"a":1}\n\n'
    client.leave()
    assert await one.admission.outcome() == "CLIENT_GONE"
    await asyncio.wait_for(one.server.connections[0].closed.wait(), 5)


@pytest.mark.parametrize(
    ("path", "error", "end"),
    [
        (CHAT, b'data: {"error":', b"data: [DONE]\n\n"),
        ("/v1/responses", b"event: error\ndata: ", b"}\n\n"),
        ("/v1/messages", b'event: error\ndata: {"type":"error","error":{', b"}\n\n"),
    ],
)
async def test_a_model_server_that_dies_in_mid_stream_gives_an_error_in_the_stream(
    bench: Make, path: str, error: bytes, end: bytes
) -> None:
    """The stream ends with an error in the route's own dialect, on a line of its own."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.begin_events()
        await connection.chunk(b'data: {"a":1}\n\n')
        await connection.chunk(b'data: {"half')
        await connection.request()  # until the test says so
        connection.abort()

    one = await bench(script)
    client = await one.client()
    await client.send("POST", path, STREAM)
    await client.head()
    got = b""
    while b"half" not in got:
        got += await client.piece()
    one.server.connections[0].abort()
    while piece := await client.piece():
        got += piece
    assert got.startswith(b'data: {"a":1}\n\ndata: {"half\n\n' + error)
    assert got.endswith(end)
    assert b"[DONE]" not in got or path == CHAT
    assert await one.admission.outcome() == "UPSTREAM_ERROR"


async def test_a_half_sent_answer_is_seen_as_truncated(bench: Make) -> None:
    """An answer with a length that breaks off is cut at the client too, and not tried again."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.say(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        connection.writer.write_eof()

    one = await bench(script)
    answer = await one.chat()
    assert not answer.complete
    assert answer.body in (b"half", b"")
    assert len(one.server.connections) == 1
    assert await one.admission.outcome() == "UPSTREAM_ERROR"


async def test_a_stream_without_length_and_end_mark_is_no_complete_one(bench: Make) -> None:
    """Where only the end of the connection ends a stream, a missing [DONE] tells that it was cut."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.say(b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {}\n\n")

    one = await bench(script)
    client = await one.client()
    await client.send("POST", CHAT, STREAM)
    answer = await client.whole()
    assert b'"code":"upstream_error"' in answer.body
    assert await one.admission.outcome() == "UPSTREAM_ERROR"


async def test_garbage_is_a_502_and_not_tried_again(bench: Make) -> None:
    """An answer that is no HTTP is the model server's fault, told without its text."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.say(b"SSH-2.0-garbage\r\n\r\n")

    one = await bench(script, retries=FAST)
    answer = await one.chat()
    assert (answer.status, answer.error["code"]) == (502, "upstream_error")
    assert b"SSH" not in answer.body
    assert len(one.server.connections) == 1
    assert await one.admission.outcome() == "UPSTREAM_ERROR"


async def test_a_connection_that_fails_before_the_first_byte_is_tried_again(bench: Make) -> None:
    """Two connections close without a byte, the third answers: one answer, two moves, one end."""

    async def script(connection: Connection) -> None:
        await connection.request()
        if connection.number == 2:
            await connection.answer(b"{}")

    one = await bench(script, retries=FAST)
    assert (await one.chat()).status == 200
    assert [move.outcome for move in one.admission.moves] == [ad.OUTCOME_CONNECT_FAILED] * 2
    assert [move.not_instance_id for move in one.admission.moves] == ["node/m/1"] * 2
    assert await one.admission.outcome() == "OK"


async def test_after_all_attempts_the_client_gets_502(bench: Make) -> None:
    """A model server that nobody can reach is 502 after three attempts."""
    one = await bench(echo(), retries=FAST)
    one.admission.address = "http://127.0.0.1:9"
    answer = await one.chat()
    assert (answer.status, answer.error["type"], answer.error["code"]) == (
        502,
        "upstream_error",
        "upstream_error",
    )
    assert len(one.admission.moves) == 2
    assert await one.admission.outcome() == "CONNECT_FAILED"


async def test_a_kept_connection_that_has_closed_is_replaced_without_an_attempt(bench: Make) -> None:
    """The race of a POST with the server's idle timeout costs nothing: no move, no delay."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.answer(b"{}")
        if connection.number == 0:
            await connection.reader.readexactly(1)  # the next request has begun to arrive
            connection.abort()

    one = await bench(script)
    assert (await one.chat()).status == 200
    assert (await one.chat()).status == 200
    assert not one.admission.moves
    assert len(one.server.connections) == 2


async def test_a_lost_lease_ends_its_stream_with_an_error(bench: Make) -> None:
    """A revoked lease ends the relay: upstream closed, an error in the stream, nothing said twice."""
    one = await bench(streaming)
    client = await one.client()
    await client.send("POST", CHAT, STREAM)
    await client.head()
    got = await client.piece()
    one.admission.lose(one.admission.acquired[0].n, ad.REASON_REVOKED)
    while piece := await client.piece():
        got += piece
    assert b'"code":"lease_lost"' in got
    await asyncio.wait_for(one.server.connections[0].closed.wait(), 5)


@pytest.mark.parametrize(
    ("reason", "status", "code"),
    [
        (ad.REASON_QUEUE_FULL, 429, "queue_full"),
        (ad.REASON_QUEUE_TIMEOUT, 504, "queue_timeout"),
        (ad.REASON_MODEL_FAILED, 503, "model_failed"),
        (ad.REASON_MODEL_NOT_FOUND, 404, "model_not_found"),
    ],
)
async def test_a_refusal_is_told_in_the_envelope(
    bench: Make, reason: ad.Reason.ValueType, status: int, code: str
) -> None:
    """Status, code, Retry-After and the queue's state follow admission's word."""
    one = await bench(echo())
    queue = ad.QueueState(waiting=4, active=3, max_concurrent=3, max_queue=4)
    one.admission.refusal = ad.Refusal(reason=reason, retry_after_ms=7000, message="no luck", queue=queue)
    answer = await one.chat()
    assert (answer.status, answer.error["code"], answer.error["message"]) == (status, code, "no luck")
    assert answer.header("x-queue-depth") == "4"
    assert answer.header("x-max-queue-size") == "4"
    assert 7 <= int(answer.header("retry-after") or 0) <= 9
    assert not one.admission.done


async def test_a_slow_client_does_not_keep_the_slot(bench: Make) -> None:
    """The lease ends when the model server's answer has ended, though the client has read nothing of it."""
    body = b"x" * 200_000

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.answer(body)

    one = await bench(script)
    client = await one.client()
    await client.send("POST", CHAT, b'{"model":"small"}')
    assert await one.admission.outcome() == "OK"
    assert (await client.whole()).body == body


async def test_a_client_that_takes_nothing_is_cut(bench: Make) -> None:
    """A stuck client holds back the model server, not memory, and is cut after write_timeout."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.begin_events()
        for _ in range(2000):
            await connection.chunk(b"data: " + b"x" * 65536 + b"\n\n")

    one = await bench(script, write_timeout="1s")
    client = await one.client()
    client.reader._transport.pause_reading()  # type: ignore[attr-defined]
    await client.send("POST", CHAT, STREAM)
    assert await one.admission.outcome() == "CLIENT_GONE"
    assert (await one.edge.access())[0]["outcome"] == "client_stuck"
    client.reader._transport.resume_reading()  # type: ignore[attr-defined]
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await client.reader.readexactly(2000 * 65536)


async def test_a_silent_stream_ends_with_an_error(bench: Make) -> None:
    """A model server that falls silent in mid-stream is closed after stream_idle_timeout."""
    one = await bench(streaming, stream_idle_timeout="1s")
    client = await one.client()
    await client.send("POST", CHAT, STREAM)
    answer = await client.whole()
    assert b'"code":"upstream_timeout"' in answer.body
    assert await one.admission.outcome() == "TIMEOUT"


async def test_a_waiting_stream_hears_comments(bench: Make) -> None:
    """SSE comments tell position and loading; then the answer follows in the same stream."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.begin_events()
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.say(b"0\r\n\r\n")

    one = await bench(script, keepalive_after="100ms")
    one.admission.holding = True
    client = await one.client()
    await client.send("POST", CHAT, STREAM)
    answer = await client.head()
    assert answer.header("content-type") == "text/event-stream; charset=utf-8"
    assert await client.piece() == b": queued\n\n"
    n = one.admission.acquired[0].n
    assert one.admission.acquired[0].wants_progress
    one.admission.progress(3)
    while (piece := await client.piece()) != b": queued 3, about 12 s\n\n":
        assert piece == b": queued\n\n"
    one.admission.progress(1, 40.0, loading=True)
    while (piece := await client.piece()) != b": loading small, about 40 s\n\n":
        pass
    one.admission.grant(n)
    rest = await client.piece()
    while piece := await client.piece():
        rest += piece
    assert rest.endswith(b"data: [DONE]\n\n")
    assert one.server.seen[0].header(b"accept-encoding") is None


async def test_a_refusal_after_comments_is_an_error_in_the_stream(bench: Make) -> None:
    """Once comments have been sent the status can't change; the error goes into the stream."""
    one = await bench(echo(), keepalive_after="100ms")
    one.admission.holding = True
    client = await one.client()
    await client.send("POST", CHAT, STREAM)
    await client.head()
    refusal = ad.Refusal(n=one.admission.acquired[0].n, reason=ad.REASON_QUEUE_TIMEOUT, message="too long")
    one.admission.say(ad.Answer(refusal=refusal))
    got = b""
    while piece := await client.piece():
        got += piece
    assert got.endswith(b'"code":"queue_timeout"}}\n\ndata: [DONE]\n\n')


async def test_an_upstream_error_after_comments_goes_into_the_stream(bench: Make) -> None:
    """A model server's 400 can't be a 400 any more; its error object is passed inside the stream."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.answer(b'{"error":{"message":"too long a prompt","code":400}}', "400 Bad Request")

    one = await bench(script, keepalive_after="100ms")
    one.admission.holding = True
    client = await one.client()
    await client.send("POST", CHAT, STREAM)
    await client.head()
    one.admission.grant(one.admission.acquired[0].n)
    got = b""
    while piece := await client.piece():
        got += piece
    assert got.endswith(b'data: {"error":{"message":"too long a prompt","code":400}}\n\ndata: [DONE]\n\n')
    assert await one.admission.outcome() == "OK"


async def test_stopping_drains_and_then_ends_what_runs(bench: Make) -> None:
    """On SIGTERM: no new requests, five seconds for the running ones, then an error, all within 7 s."""
    one = await bench(streaming)
    client = await one.client()
    await client.send("POST", CHAT, STREAM)
    await client.head()
    await client.piece()
    assert one.edge.process is not None
    loop = asyncio.get_running_loop()
    began = loop.time()
    one.edge.process.send_signal(signal.SIGTERM)
    await one.edge.readiness(503)
    refused = await one.chat()
    assert (refused.status, refused.error["code"], refused.header("connection")) == (503, "draining", "close")
    got = b""
    while piece := await client.piece():
        got += piece
    assert b'"code":"draining"' in got
    assert loop.time() - began > 4.5
    assert await one.edge.ended() == 0
    assert loop.time() - began < 7
    assert one.admission.goodbyes == 1


async def test_without_admission_new_requests_are_refused(bench: Make) -> None:
    """With admission away a new request waits five seconds, then gets 503 with Retry-After."""
    one = await bench(echo())
    await one.chat()
    await one.admission.stop_server()
    await one.edge.readiness(503)
    answer = await one.chat()
    assert (answer.status, answer.error["code"]) == (503, "server_is_overloaded")
    assert answer.header("retry-after")


async def test_a_port_that_is_taken_is_told_before_anything_starts(bench: Make, tmp_path: Path) -> None:
    """A second edge on the same port ends with 78 and says what to look for."""
    one = await bench(echo())
    folder = tmp_path / "two"
    folder.mkdir()
    two = EdgeProcess(folder, "127.0.0.1:1", listen=f"127.0.0.1:{one.edge.port}")
    with pytest.raises(AssertionError, match="ss -ltnp"):
        await two.start(ready=False)
    assert two.process is not None
    assert two.process.returncode == 78
    assert json.loads((await one.chat()).body)["id"] == "x"
