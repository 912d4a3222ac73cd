"""The HTTP client towards model servers, against scripted sockets: what it takes, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import Mock

import pytest

from tests.edge.fakes import Connection, ModelServer, Script, echo
from tests.support.until import until
from tidegate_edge import connection as wire
from tidegate_edge import upstream as pool
from tidegate_edge.upstream import Broken, ConnectFailed, Reply, Upstream

OK = b"HTTP/1.1 200 OK\r\n"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"


def says(*parts: bytes, then_closes: bool = False) -> Script:
    """Answers every request with these bytes, part by part."""

    async def script(connection: Connection) -> None:
        while await connection.request():
            for part in parts:
                await connection.say(part)
                await asyncio.sleep(0)
            if then_closes:
                return

    return script


@contextlib.asynccontextmanager
async def peers(script: Script) -> AsyncIterator[tuple[Upstream, ModelServer]]:
    async with ModelServer(script).running() as server:
        upstream = Upstream(1.0)
        try:
            yield upstream, server
        finally:
            await upstream.close()


async def ask(upstream: Upstream, server: ModelServer, method: str = "POST", **options: Any) -> Reply:
    body = options.get("body", b"{}")
    return await upstream.open(method, server.url + "/v1/x?a=b", [(b"x-own", b"1")], body)


async def whole(reply: Reply) -> bytes:
    """The body to its end."""
    body = b""
    while piece := await reply.read():
        body += piece
    return body


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK + b"content-length: 5\r\n\r\nhello", b"hello"),
        (OK + b"content-length: 0\r\n\r\n", b""),
        (CHUNKED + b"3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nx-trailer: 1\r\n\r\n", b"hello"),
        (INTERIM + CHUNKED + b"0\r\n\r\n", b""),
        (b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n", b""),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", b""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("piecewise", [False, True])
async def test_valid_answers_leave_the_connection_in_use(answer: bytes, body: bytes, piecewise: bool) -> None:
    """Every framing, at once or byte by byte: the body, its end told once, the connection used again."""
    parts = [answer[i : i + 1] for i in range(len(answer))] if piecewise else [answer]
    ends: list[int] = []
    async with peers(says(*parts)) as (upstream, server):
        for i in range(3):
            reply = await ask(upstream, server)
            reply.on_end(lambda i=i: ends.append(i))  # type: ignore[misc]
            assert await whole(reply) == body
            assert b"link" not in dict(reply.headers)
            assert b"x-trailer" not in dict(reply.headers)
            assert (reply.reused, reply.open_ended) == (i > 0, False)
        assert ends == [0, 1, 2]
        assert len(server.connections) == 1


async def test_an_answer_to_head_has_no_body() -> None:
    """Its length is the one that GET would have. Nothing is waited for; if it comes all the same, it isn't
    taken for the next answer."""
    async with peers(says(OK + b"content-length: 5\r\n\r\n")) as (upstream, server):
        for _ in range(2):
            reply = await ask(upstream, server, "HEAD", body=b"")
            assert (await whole(reply), reply.reused) == (b"", False)
        assert server.seen[0].line == b"HEAD /v1/x?a=b HTTP/1.1"
        assert server.seen[0].header(b"content-length") is None


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        OK + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\nhi",
        OK + b"content-length: x\r\n\r\nhi",
        OK + b"content-length: -1\r\n\r\nhi",
        OK + b"content-length: 99999999999999999999999\r\n\r\nhi",
        OK + b"transfer-encoding: gzip\r\n\r\nhi",
        OK + b"transfer-encoding: chunked, gzip\r\n\r\nhi",
        OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        OK + b"bad header\r\n\r\n",
        OK + b"x-big: " + b"x" * 70_000 + b"\r\ncontent-length: 0\r\n\r\n",
        OK + b"x-endless: " + b"x" * 70_000,
        OK + b"x: y\r\n" * 20_000 + b"content-length: 0\r\n\r\n",
        OK + b"content-le",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"nothing of HTTP\r\n\r\n",
    ],
)  # fmt: skip
async def test_a_malformed_head_is_broken(answer: bytes) -> None:
    """What two readers could understand differently is no answer, and the connection is closed."""
    async with peers(says(answer, then_closes=True)) as (upstream, server):
        with pytest.raises(Broken):
            await ask(upstream, server)
        with pytest.raises(Broken):
            await ask(upstream, server)
        assert len(server.connections) == 2


@pytest.mark.parametrize(
    "rest",
    [
        b"zz\r\nmore\r\n0\r\n\r\n",
        b"-1\r\nx\r\n",
        b"ffffffffffffffffff\r\nx\r\n",
        b"2\r\nmore\r\n0\r\n\r\n",
        b"4\r\nmo",
        b"4\r\nmore\r\n",
    ],
)
async def test_a_bad_chunk_breaks_the_answer_off(rest: bytes) -> None:
    """What came before it is passed on; the end is an error, never a silent one; nobody is told of an end."""
    ends: list[None] = []

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.say(CHUNKED + b"5\r\nhello\r\n")
        await taken.wait()
        await connection.say(rest)

    taken = asyncio.Event()
    async with peers(script) as (upstream, server):
        reply = await ask(upstream, server)
        reply.on_end(lambda: ends.append(None))
        assert await reply.read() == b"hello"
        taken.set()
        with pytest.raises(Broken):
            await whole(reply)
        assert not ends


async def test_bytes_behind_the_end_close_the_connection() -> None:
    """The answer stands; a connection that says more than it was asked is not used again."""
    more = b"content-length: 2\r\n\r\nhi"
    async with peers(says(OK + more + OK + more)) as (upstream, server):
        for _ in range(2):
            reply = await ask(upstream, server)
            assert await whole(reply) == b"hi"
            assert not reply.reused
        assert len(server.connections) == 2


async def test_bytes_between_two_requests_close_the_connection() -> None:
    """An idle connection that speaks is closed: its bytes could be taken for the next answer."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.answer(b"{}")
        await heard.wait()
        await connection.say(b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n")
        await connection.gone()

    heard = asyncio.Event()
    async with peers(script) as (upstream, server):
        await whole(await ask(upstream, server))
        heard.set()
        await asyncio.wait_for(server.connections[0].closed.wait(), 5)
        reply = await ask(upstream, server)
        assert (reply.status, reply.reused) == (200, False)


@pytest.mark.parametrize(
    "head", [b"HTTP/1.0 200 OK\r\n\r\n", OK + b"\r\n", OK + b"connection: close\r\n\r\n"]
)
async def test_without_a_length_the_end_of_the_connection_ends_the_body(head: bytes) -> None:
    """Such an answer says that it is open-ended; its connection can't be used again."""
    async with peers(says(head + b"he", b"llo", then_closes=True)) as (upstream, server):
        for _ in range(2):
            reply = await ask(upstream, server)
            assert reply.open_ended
            assert await whole(reply) == b"hello"
        assert len(server.connections) == 2


async def test_a_kept_connection_that_closes_under_a_request_is_replaced_once() -> None:
    """Closed before any byte of the answer: asked again on a new connection, and only there."""

    async def script(connection: Connection) -> None:
        await connection.request()
        if connection.number == 0:
            await connection.answer(b"{}")
            await connection.request()

    async with peers(script) as (upstream, server):
        await whole(await ask(upstream, server))
        with pytest.raises(ConnectFailed):
            await ask(upstream, server)
        assert [len(server.connections), len(server.seen)] == [2, 3]


async def test_a_kept_connection_that_breaks_within_its_answer_is_not_replaced() -> None:
    """One byte of an answer, and the server has worked: it is not asked again."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.answer(b"{}")
        await connection.request()
        await connection.say(b"H")

    async with peers(script) as (upstream, server):
        await whole(await ask(upstream, server))
        with pytest.raises(Broken):
            await ask(upstream, server)
        assert len(server.connections) == 1


async def test_idle_connections_are_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the server would: so no request meets a connection that is just being closed."""
    monkeypatch.setattr(pool, "_KEEP_ALIVE", 0.05)
    monkeypatch.setattr(pool, "_SWEEP", 0.02)
    async with peers(echo()) as (upstream, server):
        await whole(await ask(upstream, server))
        await asyncio.wait_for(server.connections[0].closed.wait(), 5)
        assert not (await ask(upstream, server)).reused


async def test_a_slow_reader_pauses_the_server() -> None:
    """What is not read stays with the server: here lies a bounded share of it, and nothing is lost."""
    size = 8 * 1024 * 1024
    written = 0

    async def script(connection: Connection) -> None:
        nonlocal written
        await connection.request()
        await connection.say(OK + b"content-length: %d\r\n\r\n" % size)
        while written < size:
            await connection.say(b"x" * 65536)
            written += 65536

    async with peers(script) as (upstream, server):
        reply = await ask(upstream, server)
        await until(lambda: reply.unread > wire._UNREAD, "the limit is reached")
        for _ in range(200):
            await asyncio.sleep(0)
        assert reply.unread <= wire._UNREAD + wire.INCOMING + 2 * wire._PER_PIECE
        assert written < size
        assert len(await whole(reply)) == size
        assert (await ask(upstream, server)).status == 200


async def test_a_big_body_waits_for_a_server_that_is_slow_to_read() -> None:
    """It is written in pieces, as the server takes them, and arrives whole."""
    body = bytes(range(256)) * 32_768
    async with peers(echo()) as (upstream, server):
        assert (await ask(upstream, server, body=body)).status == 200
        assert server.seen[0].body == body


async def test_an_answer_before_the_request_was_read_closes_the_connection() -> None:
    """The rest of the request would be taken for the next one."""

    async def script(connection: Connection) -> None:
        await connection.reader.readuntil(b"\r\n\r\n")
        connection.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await connection.answer(b"too long", "413 Content Too Large")
        await asyncio.Event().wait()

    async with peers(script) as (upstream, server):
        for _ in range(2):
            reply = await ask(upstream, server, body=b"x" * 32 * 1024 * 1024)
            assert (reply.status, reply.reused) == (413, False)
            assert await whole(reply) == b"too long"


async def test_a_reply_that_is_given_up_closes_its_connection() -> None:
    """`close` is synchronous; the server sees the end, and who still reads gets an error."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.say(CHUNKED)
        await connection.gone()

    async with peers(script) as (upstream, server):
        reply = await ask(upstream, server)
        reading = asyncio.ensure_future(reply.read())
        await asyncio.sleep(0)
        reply.close()
        reply.close()
        with pytest.raises(Broken):
            await reading
        await asyncio.wait_for(server.connections[0].closed.wait(), 5)


async def test_a_cancelled_request_closes_its_connection() -> None:
    """A wait for a head that is cancelled leaves no half-used connection."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.gone()

    async with peers(script) as (upstream, server):
        asking = asyncio.ensure_future(ask(upstream, server))
        await until(lambda: server.seen, "the request arrived")
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(server.connections[0].closed.wait(), 5)


async def test_a_wait_that_is_cancelled_too_late_leaves_the_next_request_alone() -> None:
    """The answer had come and the connection was taken by another request: only the wait ends."""
    transport = Mock(spec=asyncio.Transport)
    transport.is_closing.return_value = False
    transport.get_write_buffer_size.return_value = 0
    incoming = memoryview(bytearray(wire.INCOMING))
    answer = OK + b"content-length: 0\r\n\r\n"
    incoming[: len(answer)] = answer
    one = wire.Connection("", incoming, lambda _: None, lambda _: None)
    one.connection_made(transport)
    first = asyncio.create_task(one.exchange(b"", b"", False))
    await asyncio.sleep(0)
    second = asyncio.create_task(one.exchange(b"", b"", False))  # runs before `first` hears of its answer
    one.buffer_updated(len(answer))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    one.buffer_updated(len(answer))
    assert (await second).status == 200
    transport.abort.assert_not_called()


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "http://[::1]:9/x", "https://127.0.0.1:9/x"])
async def test_no_connection_is_said_as_such(url: str) -> None:
    """Nobody listens: IPv4, IPv6 and TLS."""
    upstream = Upstream(1.0)
    with pytest.raises(ConnectFailed):
        await upstream.open("POST", url, [], b"")
    await upstream.close()


async def test_a_server_without_tls_is_no_https_server() -> None:
    """A handshake that fails is a connection that was not made."""
    async with peers(says(OK)) as (upstream, server):
        with pytest.raises(ConnectFailed):
            await upstream.open("POST", server.url.replace("http:", "https:") + "/x", [], b"")


async def test_a_line_break_in_a_field_is_an_error_of_ours() -> None:
    """It would be another request on the wire; nothing is sent."""
    async with peers(echo()) as (upstream, server):
        with pytest.raises(ValueError, match="line break"):
            await upstream.open("POST", server.url + "/x", [(b"a", b"b\r\nc: d")], b"")
        assert not server.connections


async def test_no_more_idle_connections_are_kept_than_the_server_has_slots() -> None:
    """Of those that come free at once the longest idle ones are closed."""
    release = asyncio.Event()

    async def script(connection: Connection) -> None:
        while await connection.request():
            await release.wait()
            await connection.answer(b"{}")

    async with peers(script) as (upstream, server):
        asking = [
            asyncio.ensure_future(upstream.open("POST", server.url + "/x", [], b"", slots=3))
            for _ in range(8)
        ]
        await until(lambda: len(server.seen) == 8, "all have arrived")
        release.set()
        for reply in await asyncio.gather(*asking):
            await whole(reply)
        await until(lambda: sum(one.closed.is_set() for one in server.connections) == 5, "five are closed")
        replies = [await upstream.open("POST", server.url + "/x", [], b"", slots=3) for _ in range(3)]
        assert all(reply.reused for reply in replies)


async def test_a_server_that_has_gone_keeps_no_idle_connections() -> None:
    """Told so, or when no new connection can be made: the idle ones to it are closed at once."""
    async with peers(echo()) as (upstream, server):
        for gone in ("told", "seen"):
            server.connections.clear()
            replies = await asyncio.gather(*[upstream.open("POST", server.url, [], b"", 5) for _ in "abc"])
            for reply in replies:
                await whole(reply)
            assert upstream._idle[server.url]
            if gone == "told":
                upstream.forget(server.url + "/v1/x")
            else:
                upstream._kept = lambda origin: None  # type: ignore[method-assign]  # all are in use
                upstream._timeout = 0.0
                with pytest.raises(ConnectFailed):
                    await upstream.open("POST", server.url, [], b"")
            assert server.url not in upstream._idle
            await until(lambda: all(one.closed.is_set() for one in server.connections), "all are closed")


async def test_requests_to_a_server_that_has_gone_fail_at_once() -> None:
    """Told so: one that is connecting and one without a byte of an answer may be tried elsewhere; one that
    has half a head may not; one that is being answered goes on."""
    said = [b"", b"HTTP/1.1 200", CHUNKED]

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.say(said[connection.number])
        await connection.gone()

    async with peers(script) as (upstream, server), asyncio.timeout(5):
        asking = []
        for number in range(3):
            asking.append(asyncio.ensure_future(ask(upstream, server)))
            await until(lambda: len(server.seen) > number, "it has arrived")  # noqa: B023
        stream = await asking[2]
        replies = [one._reply for one in upstream._open if one._reply is not None]
        await until(lambda: sum(one.answered for one in replies) == 2, "half a head has come")
        connecting = asyncio.ensure_future(ask(upstream, server))
        await asyncio.sleep(0)
        upstream.forget(server.url)
        for one, error in ((connecting, ConnectFailed), (asking[0], ConnectFailed), (asking[1], Broken)):
            with pytest.raises(error):
                await one
        assert (stream.ended, upstream._connecting) == (False, {})
        await until(lambda: sum(one.closed.is_set() for one in server.connections) >= 2, "they are closed")
        assert not server.connections[2].closed.is_set()
        stream.close()
