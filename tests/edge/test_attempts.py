"""How requests reach a model server and leave it: attempts, refusals, kept connections. One real edge."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.edge.conftest import CHAT, Bench, standing
from tests.edge.fakes import Client, Connection, ModelServer, Script, ask, echo
from tests.support.figures import Figures, resident, say
from tests.support.until import until
from tidegate.admission.v1 import admission_pb2 as ad

pytestmark = pytest.mark.asyncio(loop_scope="module")
STREAM = b'{"model":"small","stream":true}'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    """One edge for all tests of this file."""
    folder, retries = tmp_path_factory.mktemp("attempts"), {"attempts": 3, "delay": "700ms", "factor": 2}
    limits = {"connect_timeout": "1s", "write_timeout": "10s"}
    async with standing(folder, ModelServer(echo()), retries=retries, **limits) as made:
        yield made


@contextlib.asynccontextmanager
async def served(shared: Bench, script: Script) -> AsyncIterator[ModelServer]:
    """A model server of the test's own; all tickets are granted on it."""
    admission = shared.admission
    admission.holding = False
    admission.acquired.clear()
    admission.moves.clear()
    async with ModelServer(script).running() as server:
        admission.address = server.url
        yield server


async def silent(connection: Connection) -> None:
    """Takes a request and says nothing."""
    await connection.request()
    await connection.gone()


async def test_a_stream_costs_little_memory(shared: Bench) -> None:
    """At most 40 KiB each, 500 at a time, with clients that read. The first test: the edge is new."""
    assert shared.edge.process is not None
    pid, count = shared.edge.process.pid, 500
    go = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.begin_events()
        for i in range(20):
            await connection.chunk(b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % i)
        await go.wait()
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.say(b"0\r\n\r\n")

    async def stream() -> None:
        client = await Client.to(shared.edge.port)
        await client.send("POST", CHAT, STREAM)
        await client.head()
        got = b""
        while b'"19"' not in got:
            got += await client.piece()
        running.append(client)
        await go.wait()
        while piece := await client.piece():
            got += piece
        assert got.endswith(b"data: [DONE]\n\n")
        client.leave()

    async with served(shared, script):
        running: list[Client] = []
        before = resident(pid)
        streams = [asyncio.ensure_future(stream()) for _ in range(count)]
        await until(lambda: len(running) == count, "all are running", 60)
        growth = (resident(pid) - before) * 1024 / count
        go.set()
        await asyncio.gather(*streams)
    say(f"a stream: {growth:.1f} KiB")
    assert growth <= 40, growth


async def test_each_failed_attempt_gives_its_slot_back_and_asks_for_a_pause(shared: Bench) -> None:
    """1st delay, then × factor; the pause is admission's to keep, so that no slot is held in it."""

    async def refuses(connection: Connection) -> None:
        connection.abort()

    async with served(shared, refuses):
        answer = await shared.chat()
        told = (answer.status, answer.error["type"], answer.error["code"])
        assert told == (502, "upstream_error", "upstream_error")
        assert await shared.admission.outcome(shared.admission.acquired[0].n) == "CONNECT_FAILED"
        moves = shared.admission.moves
        assert [(move.delay_ms, move.outcome) for move in moves] == [
            (700, ad.OUTCOME_CONNECT_FAILED),
            (1400, ad.OUTCOME_CONNECT_FAILED),
        ]


async def test_a_connection_that_closes_before_the_first_byte_is_tried_again(shared: Bench) -> None:
    """Two close without a byte, the third answers: one answer, two moves away from it, one end."""

    async def script(connection: Connection) -> None:
        await connection.request()
        if connection.number == 2:
            await connection.answer(b"{}")

    async with served(shared, script):
        assert (await shared.chat()).status == 200
        assert [move.not_instance_id for move in shared.admission.moves] == ["node/m/1"] * 2
        assert await shared.admission.outcome(shared.admission.acquired[0].n) == "OK"


async def test_a_kept_connection_that_has_closed_is_replaced_without_an_attempt(shared: Bench) -> None:
    """The race of a POST with the server's idle timeout costs nothing: no move, no delay."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.answer(b"{}")
        if connection.number == 0:
            await connection.reader.readexactly(1)  # the next request has begun to arrive
            connection.abort()

    async with served(shared, script) as server:
        assert (await shared.chat()).status == 200
        assert (await shared.chat()).status == 200
        assert not shared.admission.moves
        assert len(server.connections) == 2


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
    shared: Bench, reason: ad.Reason.ValueType, status: int, code: str
) -> None:
    """Status, code, Retry-After and the queue's state follow admission's word."""
    queue = ad.QueueState(waiting=4, active=3, max_concurrent=3, max_queue=4)
    async with served(shared, echo()):
        shared.admission.refusal = ad.Refusal(
            reason=reason, retry_after_ms=7000, message="no luck", queue=queue
        )
        answer = await shared.chat()
        shared.admission.refusal = None
        assert (answer.status, answer.error["code"], answer.error["message"]) == (status, code, "no luck")
        assert answer.header("x-queue-depth") == "4"
        assert answer.header("x-max-queue-size") == "4"
        assert answer.header("retry-after") == "7"
        assert shared.admission.acquired[0].n not in shared.admission.done


async def test_a_slow_client_does_not_keep_the_slot(shared: Bench) -> None:
    """The lease ends when the model server's answer has ended, though the client has read nothing of it."""
    body = b"x" * 150_000

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.answer(body)

    async with served(shared, script):
        client = await shared.client()
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        await client.send("POST", CHAT, b'{"model":"small"}')
        n = (await until(lambda: shared.admission.acquired, "a ticket"))[0].n
        assert await shared.admission.outcome(n) == "OK"
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]
        assert (await client.whole()).body == body


@pytest.mark.parametrize("phase", ["connecting", "asked"])
async def test_an_instance_that_is_lost_before_it_answers_is_replaced(shared: Bench, phase: str) -> None:
    """Its lease ends with it; the request waits again as a new one, and the next instance serves it."""
    admission = shared.admission
    async with served(shared, silent) as gone, full() as address:
        admission.address = address if phase == "connecting" else gone.url
        asking = asyncio.ensure_future(shared.chat())
        first = (await until(lambda: admission.acquired, "a ticket"))[0]
        if phase == "asked":
            await until(lambda: gone.seen, "the request arrived")
        admission.holding = True
        admission.lose(first.n, ad.REASON_INSTANCE_LOST)
        again = (await until(lambda: admission.acquired[1:], "it is offered again"))[0]
        assert (again.n, again.model, admission.moves) == (first.n, "small", [])
        if phase == "asked":
            await asyncio.wait_for(gone.connections[0].closed.wait(), 5)
        async with ModelServer(echo(b'{"second":1}')).running() as second:
            admission.address = second.url
            admission.grant(first.n, instance="node/m/2")
            answer = await asking
            assert (answer.status, answer.body) == (200, b'{"second":1}')
            assert len(second.seen) == 1


@pytest.mark.parametrize("reason", [ad.REASON_INSTANCE_LOST, ad.REASON_REVOKED])
async def test_a_lease_that_is_lost_while_its_server_answers_ends_the_request(
    shared: Bench, reason: ad.Reason.ValueType
) -> None:
    """Half an answer can't be begun anew: the server's connection closes, and an error ends the stream."""

    async def streaming(connection: Connection) -> None:
        await connection.request()
        await connection.begin_events()
        await connection.chunk(b"data: 1\n\n")
        await connection.gone()

    async with served(shared, streaming) as server:
        client = await shared.client()
        await client.send("POST", CHAT, STREAM)
        await client.head()
        got = await client.piece()
        shared.admission.lose(shared.admission.acquired[0].n, reason)
        while piece := await client.piece():
            got += piece
        assert b'"code":"lease_lost"' in got
        assert len(shared.admission.acquired) == 1
        await asyncio.wait_for(server.connections[0].closed.wait(), 5)


async def test_a_connection_that_is_never_made_ends_by_its_timeout(shared: Bench) -> None:
    """`connect_timeout`: a server that doesn't accept is given up, and tried again elsewhere."""
    admission = shared.admission
    async with served(shared, echo(b"{}")) as server, full() as address:
        admission.address = address
        asking = asyncio.ensure_future(shared.chat())
        await until(lambda: admission.acquired, "a ticket")
        admission.address = server.url
        assert (await asking).status == 200
        assert [move.outcome for move in admission.moves] == [ad.OUTCOME_CONNECT_FAILED]


@contextlib.asynccontextmanager
async def full() -> AsyncIterator[str]:
    """A port whose queue of connections is full: the kernel answers nobody any more."""
    with socket.socket() as listening, contextlib.ExitStack() as stack:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        address = listening.getsockname()
        for _ in range(4):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(address)
        yield f"http://127.0.0.1:{address[1]}"


async def test_nine_of_ten_requests_under_load_use_a_kept_connection(shared: Bench) -> None:
    """40 clients at once, again and again; never more connections than requests at a time."""

    async def script(connection: Connection) -> None:
        while await connection.request():
            await asyncio.sleep(0.01)  # a model server's work, not a wait for something
            await connection.answer(b"{}")

    async with served(shared, script) as server:

        async def loop() -> None:
            client = await Client.to(shared.edge.port)
            for _ in range(15):
                await client.send("POST", CHAT, b'{"model":"small"}')
                assert (await client.whole()).status == 200
            client.leave()

        before = await figures(shared)
        shared.admission.queue = ad.QueueState(max_concurrent=40)
        await asyncio.gather(*[loop() for _ in range(40)])
        after = await figures(shared)
        name = "tidegate_edge_upstream_requests_total"
        kept = after.total(name, connection="reused") - before.total(name, connection="reused")
        assert kept / 600 > 0.9
        assert len(server.connections) <= 40


async def figures(shared: Bench) -> Figures:
    return Figures((await ask(shared.edge.port, "GET", "/metrics")).body.decode())


async def endless(connection: Connection) -> None:
    """A stream without an end, as fast as it is taken."""
    await connection.request()
    await connection.begin_events()
    while not connection.writer.transport.is_closing():
        await connection.chunk(b"data: " + b"x" * 16_384 + b"\n\n")


async def test_a_client_that_takes_nothing_holds_little_memory(shared: Bench) -> None:
    """At most 256 KiB each, what lies unread and unsent together, however fast its server is."""
    assert shared.edge.process is not None
    pid, count = shared.edge.process.pid, 40
    async with served(shared, endless) as server, contextlib.AsyncExitStack() as stack:
        before, written = resident(pid), [0]
        clients: list[Client] = []
        for _ in range(count):
            client = await Client.to(shared.edge.port)
            clients.append(client)
            stack.callback(client.writer.transport.abort)
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.send("POST", CHAT, STREAM)

        async def stuck() -> bool:
            """Nobody has got rid of anything since the last look."""
            await asyncio.sleep(0.05)
            last, written[0] = (
                written[0],
                sum(one.writer.transport.get_write_buffer_size() for one in server.connections),
            )
            return len(server.connections) == count and written[0] > 0 and written[0] == last

        await until(stuck, "nothing moves any more", 20)
        growth = (resident(pid) - before) * 1024 / count
    say(f"a client that takes nothing: {growth:.0f} KiB")
    assert growth <= 256, growth
