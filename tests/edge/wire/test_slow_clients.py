"""Clients that send slowly, read nothing, or leave by halves: bounded in memory and in time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import pytest

from tests.edge.wire.attacked import FLOOD, GROWTH, Attacked
from tests.edge.wire.kernel import queues
from tests.edge.wire.raw import Talk, Wire, post
from tests.support.until import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

EDGE = {"head_timeout": "1s", "write_timeout": "2s", "max_body": "32MiB"}
GET = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
STREAM = post(body=b'{"model":"small","stream":true,"x":%s}' % FLOOD)
LARGEST_QUEUE = 512 * 1024
"""Bytes that the kernel may hold for one client."""


async def drip(port: int, data: bytes, begin: int) -> Talk:
    """Sends the beginning, then a byte each tenth of a second, and hears what comes."""
    wire = await Wire.to(port)

    async def send() -> None:
        await wire.say(data[:begin])
        for byte in data[begin:]:
            if not wire.reader.at_eof():
                await wire.say(bytes([byte]))
                await asyncio.sleep(0.1)

    sending = asyncio.ensure_future(send())
    try:
        return await wire.rest()
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await wire.closed()


async def test_five_hundred_dripping_clients_are_ended_and_others_served(edge: Attacked) -> None:
    """Half of them never finish a head, half never a body: 408 when their time is over, however busy they
    seem, and no model server hears of them."""
    before, seen = edge.memory(), len(edge.server.seen)
    head = post(*[b"x: y"] * 100)
    body = post(b"content-length: 1000", length=False, body=b" " * 900)
    begin = body.index(b"\r\n\r\n") + 4
    dripping = [asyncio.ensure_future(drip(edge.port, head, 1)) for _ in range(250)]
    dripping += [asyncio.ensure_future(drip(edge.port, body, begin)) for _ in range(250)]
    served = 0
    while not all(one.done() for one in dripping):
        await edge.serves()
        served += 1
    talks = await asyncio.gather(*dripping)
    assert [talk.statuses for talk in talks] == [[408]] * 500
    assert {talk.answers[0].error["code"] for talk in talks} == {"request_timeout"}
    assert {talk.answers[0].header("connection") for talk in talks} == {"close"}
    assert served
    assert len(edge.server.seen) == seen + served
    assert edge.memory() - before <= GROWTH


@pytest.mark.parametrize("what", ["a stream", "pages"])
async def test_who_reads_nothing_is_bounded_and_cut_on_the_wire(edge: Attacked, what: str) -> None:
    """Fifty of them: a few hundred KiB each in the kernel, little in the edge, and after write_timeout the
    connection is gone, and so is the stream it took."""
    before = edge.memory()
    clients = [edge.silent() for _ in range(50)]
    ports = {client.getsockname()[1] for client in clients}
    for client in clients:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.sendall(STREAM if what == "a stream" else GET * 5000)
    largest, grown = 0, 0.0

    def gone() -> bool:
        nonlocal largest, grown
        now, grown = queues(edge.port), max(grown, edge.memory() - before)
        largest = max([largest, *(now[port] for port in ports & now.keys())])
        return not ports & now.keys()

    await until(gone, "all of them are cut", 40)
    assert 0 < largest <= LARGEST_QUEUE
    assert grown <= GROWTH
    await until(lambda: not edge.flooding, "their streams have ended")
    for client in clients:
        client.close()
    await edge.serves()


async def test_who_reads_slowly_but_reads_is_not_cut(edge: Attacked) -> None:
    """Pages of some size together, taken in pieces over more than write_timeout, come whole."""
    sock = edge.silent()
    sock.sendall(
        GET.replace(b"/openapi.json", b"/v1/models") * 3000
        + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    )
    got, begun = b"", time.monotonic()
    while piece := await asyncio.to_thread(sock.recv, 65536):
        got += piece
        await asyncio.sleep(0.06 if time.monotonic() - begun < 3 else 0)
    assert got.count(b"HTTP/1.1 200 ") == 3001
    assert time.monotonic() - begun > 2.5
    sock.close()


@pytest.mark.parametrize("body", [b'{"model":"small"}', b'{"model":"small","x":%s}' % FLOOD])
async def test_who_has_closed_its_half_leaves_nothing_behind(edge: Attacked, body: bytes) -> None:
    """A client that sends no more counts as gone, or is answered: either way its connection ends, and what
    was begun for it."""
    sock = edge.silent()
    sock.sendall(post(body=body))
    sock.shutdown(socket.SHUT_WR)
    ours = sock.getsockname()[1]
    await until(lambda: ours not in queues(edge.port), "its connection is closed")
    await until(lambda: not edge.flooding, "its stream has ended")
    sock.close()
    half = edge.silent()
    half.sendall(post(body=body)[:-5])
    half.shutdown(socket.SHUT_WR)
    ours = half.getsockname()[1]
    await until(lambda: ours not in queues(edge.port), "its connection is closed")
    half.close()
    await edge.serves()


async def test_who_leaves_a_stream_ends_it(edge: Attacked) -> None:
    """Closed, half-closed or reset, in mid-stream."""
    for how in ("close", "half", "reset"):
        wire = await Wire.to(edge.port)
        await wire.say(STREAM)
        await wire.reader.readuntil(b"data: ")
        await until(lambda: edge.flooding, "it streams")
        if how == "half":
            wire.writer.write_eof()
        elif how == "close":
            wire.writer.close()
        else:
            wire.writer.transport.abort()
        await until(lambda: not edge.flooding, f"the stream has ended: {how}")
        await wire.closed()
