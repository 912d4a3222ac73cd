"""A client that leaves, in every phase of its request: the model server's connection closes at once (E3)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from tests.edge.conftest import CHAT, Bench, standing
from tests.edge.fakes import Client, Connection, ModelServer, echo
from tests.support.until import until

pytestmark = pytest.mark.asyncio(loop_scope="module")
WITHIN = 0.1
"""Seconds from a client's leaving to the end of its model server's connection."""
TRIES = 10
"""A busy machine may take longer now and then; the edge itself must not."""
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    """One edge for all tests of this file."""
    folder = tmp_path_factory.mktemp("leaving")
    retries = {"attempts": 3, "delay": "60s"}
    async with standing(folder, ModelServer(echo()), retries=retries, keepalive_after="100ms") as made:
        yield made


def says(*parts: bytes) -> Callable[[Connection], Awaitable[None]]:
    """Takes a request, says this, and waits for the end of the connection."""

    async def script(connection: Connection) -> None:
        await connection.request()
        for part in parts:
            await connection.say(part)
        await connection.gone()

    return script


async def endless(connection: Connection) -> None:
    """A stream that is sent as fast as it is taken."""
    await connection.request()
    await connection.begin_events()
    while not connection.writer.transport.is_closing():
        await connection.chunk(b"data: " + b"x" * 16_384 + b"\n\n")
    connection.closed.set()


EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
PHASES: dict[str, Callable[[Connection], Awaitable[None]]] = {
    "before the head": says(),
    "within the head": says(b"HTTP/1.1 200 OK\r\ncontent-le"),
    "after an interim answer": says(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "before the body": says(HEAD),
    "within the body": says(HEAD, b"x" * 500_000),
    "before the first event": says(EVENTS),
    "within the stream": says(EVENTS, b"9\r\ndata: 1\n\n\r\n"),
    "within an event": says(EVENTS, b"9\r\ndata: 1\n\n\r\n", b"ff\r\ndata: "),
    "stuck in a write": endless,
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", PHASES)
async def test_the_model_servers_connection_closes_at_once(one: Bench, phase: str, stream: bool) -> None:
    """Within 100 ms, whatever has come of the answer; then the slot is free."""
    fastest = float("inf")
    for _ in range(TRIES):
        async with ModelServer(PHASES[phase]).running() as server:
            one.admission.address = server.url
            before = len(one.admission.acquired)
            client = await Client.to(one.edge.port)
            if phase == "stuck in a write":
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.send("POST", CHAT, b'{"model":"small","stream":%s}' % str(stream).lower().encode())
            await until(lambda: server.seen, "the request arrived")
            await _arrived(phase, server, client)
            began = time.monotonic()
            client.writer.transport.abort()
            await asyncio.wait_for(server.connections[0].closed.wait(), 5)
            fastest = min(fastest, time.monotonic() - began)
            assert await one.admission.outcome(one.admission.acquired[before].n) == "CLIENT_GONE"
        if fastest < WITHIN:
            break
    assert fastest < WITHIN


async def _arrived(phase: str, server: ModelServer, client: Client) -> None:
    """The edge has taken in what was said."""
    if phase == "stuck in a write":
        sizes = [0]

        def stuck() -> bool:
            sizes.append(server.connections[0].writer.transport.get_write_buffer_size())
            return len(sizes) > 10 and len(set(sizes[-10:])) == 1 and sizes[-1] > 0

        await until(stuck, "nothing moves any more")
    elif phase.startswith(
        ("before the body", "before the first event", "within the body", "within the stream")
    ):
        await client.head()
    if phase == "within the body":
        await client.reader.readexactly(500_000)
    elif phase == "within the stream":
        assert await client.piece() == b"data: 1\n\n"


@pytest.mark.parametrize("phase", ["queued", "between attempts", "with comments"])
async def test_a_waiting_client_that_leaves_gives_up_its_place(one: Bench, phase: str) -> None:
    """The ticket ends; no model server hears of the request."""
    admission = one.admission
    admission.acquired.clear()
    admission.moves.clear()
    async with ModelServer(echo()).running() as server:
        admission.holding = True
        admission.address = "http://127.0.0.1:9" if phase == "between attempts" else server.url
        client = await Client.to(one.edge.port)
        stream = b"true" if phase == "with comments" else b"false"
        await client.send(
            "POST", CHAT, b'{"model":"small","stream":%s}' % stream, x_request_id=phase.split()[0]
        )
        n = (await until(lambda: admission.acquired, "a ticket"))[0].n
        if phase == "between attempts":
            admission.grant(n)
            await until(lambda: admission.moves, "it waits again")
        elif phase == "with comments":
            await client.head()
        client.leave()
        assert await admission.outcome(n) == "UNUSED"
        assert not server.seen
        admission.holding = False
        told = await until(
            lambda: [line for line in _requests(one) if line["request_id"] == phase.split()[0]],
            "its line in the log",
        )
        assert (told[0]["outcome"], told[0]["status"]) == (
            "client_gone",
            200 if phase == "with comments" else 499,
        )


async def test_a_client_that_leaves_within_its_own_body_was_never_queued(one: Bench) -> None:
    """Nothing is asked of anybody for half a request."""
    one.admission.acquired.clear()
    before = len(list(_requests(one)))
    client = await Client.to(one.edge.port)
    await client.send("POST", CHAT, b'{"model":"sm', content_length="100")
    await asyncio.sleep(0)
    client.leave()
    await until(lambda: len(list(_requests(one))) > before, "it has ended")
    assert list(_requests(one))[-1]["outcome"] == "client_gone"
    assert not one.admission.acquired


def _requests(one: Bench) -> list[dict[str, object]]:
    return [line for line in one.edge.lines() if line.get("event") == "request"]
