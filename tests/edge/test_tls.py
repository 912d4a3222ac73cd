"""HTTPS: what holds for plain connections holds for encrypted ones, and certificates are renewed in use."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.edge.conftest import CHAT, Make
from tests.edge.fakes import Client, Connection
from tests.support.certificates import HOST, Authority, put
from tests.support.until import until
from tidegate_chassis.tls import Certificates, TlsFiles
from tidegate_edge.downstream.exchange import Exchange, Gone
from tidegate_edge.downstream.server import Limits, Server, bind
from tidegate_edge.envelope import Failure

GET = b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n"
PLAIN = [(b"content-type", b"text/plain")]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs the certificate that most tests use."""
    made = Authority(tmp_path_factory.mktemp("tls"))
    made.issue()
    return made


def run(scenario: Coroutine[Any, Any, None]) -> None:
    """On the loop that the edge has: its transports differ from asyncio's own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(scenario, 60))


class Site:
    """An application behind HTTPS in this process."""

    def __init__(self, server: Server, port: int, certificates: Certificates, trust: ssl.SSLContext) -> None:
        self.server, self.port, self.certificates, self.trust = server, port, certificates, trust
        self.refused: list[Failure] = []

    async def open(
        self, trust: ssl.SSLContext | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of a client."""
        # uvloop's own TLS loses what a full reader hasn't taken when the end comes: so it is never full.
        return await asyncio.open_connection(HOST, self.port, ssl=trust or self.trust, limit=2**24)

    async def get(self) -> bytes:
        """One request on a connection of its own; the answer's head."""
        reader, writer = await self.open()
        writer.write(GET)
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return head

    async def empty(self) -> None:
        """Waits until there are no connections."""
        await until(lambda: not len(self.server), "all connections are closed")


@contextlib.asynccontextmanager
async def site(
    authority: Authority, app: Callable[[Exchange], Awaitable[None]], **limits: Any
) -> AsyncIterator[Site]:
    """Serves `app`."""
    keys = authority.server()
    files = TlsFiles("edge.tls", Path(keys["cert"]), Path(keys["key"]))
    refused: list[Failure] = []
    server = Server(app, Limits(**limits), refused.append)
    listening = bind(f"{HOST}:0")
    made = Site(server, listening.getsockname()[1], Certificates(files), authority.client())
    made.refused = refused
    await server.start(listening, made.certificates)
    try:
        yield made
    finally:
        await server.stop(1)


async def hello(exchange: Exchange) -> None:
    """Answers with a word."""
    exchange.whole(200, PLAIN, b"hello")


def test_versions_and_protocol(authority: Authority) -> None:
    """TLS 1.2 and 1.3, HTTP/1.1 chosen although the client would rather speak HTTP/2; 1.1 is refused."""

    async def scenario() -> None:
        async with site(authority, hello) as one:
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                trust = authority.client()
                trust.minimum_version = trust.maximum_version = version
                reader, writer = await one.open(trust)
                secured = writer.get_extra_info("ssl_object")
                assert secured.selected_alpn_protocol() == "http/1.1"
                assert secured.version() == version.name.replace("_", ".")
                writer.write(GET)
                assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200 OK")
                writer.close()
            old = authority.client()
            old.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings(action="ignore"):
                old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
                await one.open(old)
            await one.empty()

    run(scenario())


def test_bytes_arrive_as_they_were_sent(authority: Authority) -> None:
    """A megabyte up and down in odd pieces, on one connection, with requests behind one another."""
    body = os.urandom(1_000_003)

    async def echo(exchange: Exchange) -> None:
        exchange.start(200, PLAIN)
        while piece := await exchange.read():
            for start in range(0, len(piece), 77_777):
                await exchange.more(piece[start : start + 77_777])
        exchange.end()

    async def scenario() -> None:
        async with site(authority, echo) as one:
            client = Client(*await one.open())
            client.writer.write(GET * 20)
            for _ in range(20):
                assert (await client.whole()).complete
            for size in (0, 1, 16384, len(body)):  # behind the last, answered before it had come, it closes
                sending = asyncio.create_task(client.send("POST", "/x", body[:size]))
                answer = await client.whole()
                await sending
                assert (answer.complete, answer.body) == (True, body[:size])
            client.leave()
            await one.empty()

    run(scenario())


def test_a_slow_client_holds_back_the_application_not_memory(authority: Authority) -> None:
    """Who doesn't read has at most 256 KiB of ours; the rest waits, and comes when it reads again."""
    total, piece = 200, b"x" * 65536
    sent: list[int] = []

    async def stream(exchange: Exchange) -> None:
        exchange.start(200, PLAIN)
        for number in range(total):
            sent.append(number)
            await exchange.more(piece)
        exchange.end()

    async def scenario() -> None:
        async with site(authority, stream) as one:
            client = Client(*await one.open())
            client.writer.write(GET)
            (connection,) = one.server._connections
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: connection.stuck, "the client is stuck")
            assert connection.unsent
            transport = connection._transport
            assert transport is not None
            assert 65536 <= transport.get_write_buffer_size() <= 256 * 1024
            assert len(sent) < total
            client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            await client.head()
            for _ in range(total):
                assert await client.piece() == piece
            assert await client.piece() == b""
            client.leave()
            await one.empty()

    run(scenario())


@pytest.mark.parametrize("stuck", [False, True])
def test_a_cut_is_at_once_and_no_end(authority: Authority, stuck: bool) -> None:
    """The client sees that the answer broke off; what it hasn't taken isn't waited for."""
    cut = asyncio.Event()

    async def broken(exchange: Exchange) -> None:
        exchange.start(200, PLAIN)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2 if stuck else None):
                for _ in range(1000 if stuck else 1):
                    await exchange.more(b"x" * 65536)
        exchange.cut()
        cut.set()

    async def scenario() -> None:
        async with site(authority, broken) as one:
            client = Client(*await one.open())
            if stuck:
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.writer.write(GET)
            await cut.wait()
            await one.empty()
            if stuck:
                client.writer.transport.resume_reading()  # type: ignore[attr-defined]
            assert not (await client.whole()).complete

    run(scenario())


@pytest.mark.parametrize("how", ["in good order", "without a word", "by a reset"])
def test_a_client_that_leaves_is_noticed(authority: Authority, how: str) -> None:
    """With TLS's own goodbye, by closing the socket alone, or by RST: in a body, waiting, in mid-stream."""
    gone: list[str] = []
    phase = ""
    reached = asyncio.Event()

    async def linger(exchange: Exchange) -> None:
        left = asyncio.Event()
        exchange.on_gone(left.set)
        if exchange.length:
            with contextlib.suppress(Gone):
                reached.set()
                while await exchange.read():
                    pass
        if exchange.path == b"/stream":
            exchange.start(200, PLAIN)
            await exchange.more(b"some")
        reached.set()
        await left.wait()
        gone.append(phase)

    def leave(raw: socket.socket, writer: asyncio.StreamWriter) -> None:
        if how == "in good order":
            writer.close()
            return
        if how == "by a reset":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            with socket.socket(fileno=os.dup(raw.fileno())) as other:
                other.shutdown(socket.SHUT_WR)

    async def scenario() -> None:
        nonlocal phase
        async with site(authority, linger) as one:
            for doing, request in (
                ("body", b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc"),
                ("waiting", GET),
                ("stream", GET.replace(b"/x", b"/stream")),
            ):
                phase = doing
                reached.clear()
                reader, writer = await one.open()
                writer.write(request)
                await reached.wait()
                leave(writer.get_extra_info("socket"), writer)
                await until(lambda: gone, f"the client's end: {doing}")
                assert gone.pop() == doing
                await one.empty()
                writer.transport.abort()
                del reader

    run(scenario())


def test_slow_handshakes_have_a_time_and_count(authority: Authority) -> None:
    """Who says nothing, or half a word, counts as a connection, goes with the time for heads, and is in
    nobody's way meanwhile; one more than there may be is closed at once."""

    async def scenario() -> None:
        async with site(authority, hello, head_timeout=1.0, connections=5) as one:
            slow = [socket.create_connection((HOST, one.port)) for _ in range(4)]
            for each, part in zip(
                slow, (b"", b"\x16", b"\x16\x03\x01\x02\x00\x01", b"\x16\x03\x01"), strict=True
            ):
                each.sendall(part)
                each.setblocking(False)
            await until(lambda: len(one.server) == 4, "they count")
            assert b"200 OK" in await one.get()
            await until(lambda: len(one.server) == 4, "that one has left")
            more = [await asyncio.open_connection(HOST, one.port) for _ in range(2)]
            assert await more[1][0].read() == b""
            assert [failure.code for failure in one.refused] == ["server_is_overloaded"]
            await until(lambda: not len(one.server), "their time is over", 20)
            loop = asyncio.get_running_loop()
            for each in slow:
                with contextlib.suppress(ConnectionResetError):
                    assert await loop.sock_recv(each, 9) == b""
                each.close()
            for _, writer in more:
                writer.close()
            assert b"200 OK" in await one.get()

    run(scenario())


def test_what_is_no_tls_is_told_or_closed(authority: Authority) -> None:
    """Plain HTTP gets a 400 that says what to do; anything else is closed; nobody else notices."""

    async def scenario() -> None:
        async with site(authority, hello) as one:
            client = Client(*await one.open())
            reader, writer = await asyncio.open_connection(HOST, one.port)
            writer.write(GET)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert b"This port is for https." in answer
            writer.close()
            for garbage in (
                b"\0" * 100,
                b"SSH-2.0-x\r\n",
                b"\x16\x03\x01\xff\xff" + b"x" * 70000,
                os.urandom(999),
            ):
                reader, writer = await asyncio.open_connection(HOST, one.port)
                writer.write(garbage)
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                writer.close()
            await until(lambda: len(one.server) == 1, "all but the good one are closed")
            client.writer.write(GET)
            assert (await client.whole()).body == b"hello"
            client.leave()

    run(scenario())


def test_an_answer_before_the_end_of_a_body_arrives(authority: Authority) -> None:
    """A client that goes on sending megabytes gets the whole answer that came before, and then the end."""

    async def scenario() -> None:
        async with site(authority, hello) as one:
            client = Client(*await one.open())
            client.writer.write(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 9000000\r\n\r\n")
            for _ in range(20):
                client.writer.write(b"x" * 100_000)
            answer = await client.whole()
            assert (answer.complete, answer.body) == (True, b"hello")
            assert await client.reader.read() == b""
            client.leave()
            await one.empty()

    run(scenario())


class Handmade:
    """A client whose records can be spoilt."""

    def __init__(self, trust: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = trust.wrap_bio(self.incoming, self.outgoing, server_hostname=HOST)

    async def shake(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The handshake."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                writer.write(self.outgoing.read())
                self.incoming.write(await reader.read(65536))
            else:
                writer.write(self.outgoing.read())
                return


def test_a_forged_record_ends_the_connection(authority: Authority) -> None:
    """Bytes that weren't encrypted by the client never reach the application."""
    seen: list[bytes] = []

    async def listen(exchange: Exchange) -> None:
        with contextlib.suppress(Gone):
            while piece := await exchange.read():
                seen.append(piece)

    async def scenario() -> None:
        async with site(authority, listen) as one:
            reader, writer = await asyncio.open_connection(HOST, one.port)
            client = Handmade(authority.client())
            await client.shake(reader, writer)
            client.tls.write(b"POST /x HTTP/1.1\r\nhost: a\r\ncontent-length: 999\r\n\r\nabc")
            writer.write(client.outgoing.read())
            await until(lambda: seen == [b"abc"], "the first part")
            client.tls.write(b"def")
            record = bytearray(client.outgoing.read())
            record[-1] ^= 1
            writer.write(bytes(record))
            await one.empty()
            assert seen == [b"abc"]
            writer.close()

    run(scenario())


async def streaming(connection: Connection) -> None:
    """Begins a stream, and ends it when it is told to by the next request on another connection."""
    seen = await connection.request()
    assert seen is not None
    if b'"stream"' not in seen.body:
        await connection.answer(b'{"id":"x"}')
        return
    await connection.begin_events()
    await connection.chunk(b"data: {}\n\n")


async def test_certificates_are_renewed_under_traffic(bench: Make, tmp_path: Path) -> None:
    """A real edge: requests on new and kept connections go on without a single failure while certificate and
    key are replaced, twice well and once badly; the bad pair is refused with one line in the log."""
    authority = Authority(tmp_path / "tls")
    authority.issue()
    one = await bench(streaming, ready=False, tls=authority.server(), keepalive_after="0")
    trust = authority.client()
    served: dict[bytes, int] = {}
    failed: list[str] = []
    ends = asyncio.Event()

    async def request(client: Client) -> None:
        await client.send("POST", CHAT, b'{"model":"small"}')
        answer = await client.whole()
        if not (answer.status == 200 and answer.complete):
            failed.append(f"{answer.status} {answer.body!r}")

    async def come_and_go() -> None:
        while not ends.is_set():
            client = await Client.to(one.edge.port, trust)
            shown = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            await request(client)
            served[shown] = served.get(shown, 0) + 1
            client.leave()

    async def stay(client: Client) -> None:
        while not ends.is_set():
            await request(client)

    async def ready() -> bool:
        client = await Client.to(one.edge.port, trust)
        await client.send("GET", "/ready")
        answer = await client.whole()
        client.leave()
        return answer.status == 200

    def refusals() -> list[dict[str, Any]]:
        return [line for line in one.edge.lines() if "are refused" in str(line.get("event"))]

    await until(ready, "the edge is ready")
    stream = await Client.to(one.edge.port, trust)
    await stream.send("POST", CHAT, b'{"model":"small","stream":true}')
    assert (await stream.head()).status == 200
    kept = await Client.to(one.edge.port, trust)
    workers = [asyncio.create_task(work) for work in (come_and_go(), come_and_go(), stay(kept))]
    await until(lambda: len(served) == 1 and max(served.values()) > 3, "traffic")
    authority.issue()
    await until(lambda: len(served) == 2, "the renewed certificate is shown")
    put(tmp_path / "tls/own.key", (tmp_path / "tls/ca.pem").read_bytes())
    await until(refusals, "the refusal")
    before = sum(served.values())
    await until(lambda: sum(served.values()) > before + 3, "more traffic")
    authority.issue()
    await until(lambda: len(served) == 3, "the next certificate is shown")
    ends.set()
    await asyncio.gather(*workers)
    assert not failed
    assert len(refusals()) == 1
    assert "edge.tls.key" in str(refusals()[0])
    assert await stream.piece() == b"data: {}\n\n"
    for client in (stream, kept):
        client.leave()
