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


async def streaming(connection: Connection) -> None:
    """Says one event, then nothing."""
    await connection.request()
    await connection.begin_events()
    await connection.chunk(b'data: {"a":1}\n\n')
    await connection.gone()


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
    """On SIGTERM: no new requests, five seconds for the running ones, then an error, all within 7 s. One that
    is stuck in a write has its line in the log and its outcome too."""

    async def script(connection: Connection) -> None:
        if connection.number == 0:
            await streaming(connection)
            return
        await connection.request()
        await connection.begin_events()
        while not connection.writer.transport.is_closing():
            await connection.chunk(b"data: " + b"x" * 16_384 + b"\n\n")

    one = await bench(script)
    client = await one.client()
    await client.send("POST", CHAT, STREAM)
    await client.head()
    await client.piece()
    stuck = await one.client()
    stuck.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await stuck.send("POST", CHAT, STREAM, x_request_id="stuck")
    await until(lambda: len(one.server.seen) == 2, "both run")
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
    assert await one.admission.outcome(one.admission.acquired[1].n) == "CLIENT_GONE"
    (line,) = [line for line in await one.edge.access(2) if line["request_id"] == "stuck"]
    assert (line["status"], line["outcome"]) == (200, "draining")


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
