"""Very many connections, and requests one behind the other on one."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.edge.wire.attacked import GROWTH, Attacked, attacked, passed
from tests.edge.wire.kernel import many
from tests.edge.wire.raw import BODY, LAST, Wire, chunked, post
from tests.support.figures import descriptors, say
from tests.support.until import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

EDGE = {"max_head": "4KiB"}
IDLE = 6000


async def test_six_thousand_idle_connections_keep_nobody_out(edge: Attacked) -> None:
    """/health and chat answer, and they cost little."""
    before, files = edge.memory(), descriptors(edge.pid)
    crowd = await asyncio.to_thread(many, edge.port, IDLE)
    try:
        await until(lambda: descriptors(edge.pid) > files + IDLE - 20, "they are accepted", 20)
        for _ in range(20):
            answers, _ = await edge.sees(LAST)
            assert answers.statuses == [200]
            await edge.serves()
        grown = edge.memory() - before
        say(f"{IDLE} idle connections: {grown:.1f} MiB")
        assert grown <= GROWTH
    finally:
        for one in crowd:
            one.close()
    await until(lambda: descriptors(edge.pid) < files + 100, "all are closed", 20)
    await edge.serves()


async def test_refused_clients_that_stay_are_closed_all_the_same(edge: Attacked) -> None:
    """They are left a moment to read their answers, not their connections; write_timeout is for others."""
    files = descriptors(edge.pid)
    for _ in range(50):
        sock = edge.silent()
        sock.sendall(b"no request\r\n\r\n")
        assert sock.recv(12) == b"HTTP/1.1 400"
    assert descriptors(edge.pid) > files
    await until(lambda: descriptors(edge.pid) <= files, "they are closed", 20)


async def test_pipelined_requests_are_answered_in_order_one_at_a_time(edge: Attacked) -> None:
    """However they are cut, and whatever they are: one is with a model server at a time."""
    dice = random.Random(5)
    for _ in range(5):
        edge.most = 0
        bodies, data, expected = [], b"", []
        for number in range(60):
            body = b'{"model":"small","n":%d,"s":"%s"}' % (number, b"x" * dice.choice((0, 1, 500, 3000)))
            kind = dice.choice(("length", "chunked", "page", "error"))
            if kind == "page":
                data += b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
                expected.append(b'{"status":"ok"}')
                continue
            if kind == "error":
                data += post(body=b"{")
                expected.append(b"")
                continue
            bodies.append(passed(body))
            expected.append(passed(body))
            data += (
                post(body=body) if kind == "length" else chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            )
        cuts = sorted(dice.sample(range(1, len(data)), dice.choice((0, 10, 1000))))
        answers, seen = await edge.sees(data + LAST, cuts)
        assert [one.body for one in seen] == bodies
        assert len(answers.answers) == 61
        for answer, body in zip(answers.answers, expected, strict=False):
            assert answer.status == (200 if body else 400)
            assert answer.body == body or not body
        assert edge.most == 1


async def test_a_request_behind_one_that_is_held_waits(edge: Attacked) -> None:
    """Nothing behind a request is begun before it is answered; what comes meanwhile is bounded."""
    before, edge.admission.holding = edge.memory(), True
    begun = len(edge.admission.acquired)
    wire = await edge.wire()
    sending = asyncio.ensure_future(wire.say(*[post()] * 100_000))
    try:
        await until(lambda: len(edge.admission.acquired) > begun, "a ticket")
        for _ in range(20):
            answers, _ = await edge.sees(LAST)
            assert answers.statuses == [200]
        assert len(edge.admission.acquired) == begun + 1
        assert not sending.done()
        assert edge.memory() - before <= GROWTH
    finally:
        edge.admission.holding = False
        edge.admission.grant(edge.admission.acquired[begun].n)
    for _ in range(200):
        reply = await wire.answer()
        assert (reply.status, reply.body) == (200, passed(BODY))
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    await wire.closed()


async def test_beyond_the_most_connections_the_longest_idle_goes(tmp_path: Path) -> None:
    """And when all are busy, the next one is told to come again."""
    async with attacked(tmp_path, max_connections=20, auth="none") as one:
        idle = [await one.wire() for _ in range(20)]
        for wire in idle:
            await wire.say(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await wire.answer()).status == 200
        await one.serves()
        assert (await idle[0].rest()).answers == []
        await idle[-1].say(LAST)
        assert (await idle[-1].rest()).statuses == [200]
        one.admission.holding = True
        busy = [await one.wire() for _ in range(20)]
        for wire in busy:
            await wire.say(post())
        await until(lambda: len(one.admission.acquired) >= 21, "all of them wait")
        beyond = await Wire.to(one.port)
        talk = await beyond.rest()
        await beyond.closed()
        assert talk.statuses == [503]
        assert talk.answers[0].error["code"] == "server_is_overloaded"
        assert talk.answers[0].header("connection") == "close"
        files = descriptors(one.pid)
        crowd = await asyncio.to_thread(many, one.port, 2000)
        assert descriptors(one.pid) < files + 500  # far beyond it they aren't even told
        for sock in crowd:
            sock.close()
        for ticket in one.admission.acquired[-20:]:
            one.admission.grant(ticket.n)
        for wire in busy:
            assert (await wire.answer()).status == 200
        one.admission.holding = False
        await one.serves()
