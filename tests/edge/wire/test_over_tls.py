"""The same attacks inside TLS: what is read, refused and closed is the same."""

from __future__ import annotations

import asyncio

import pytest

from tests.edge.wire.attacked import GROWTH, Attacked, passed
from tests.edge.wire.raw import BODY, HIDDEN, LAST, chunked, post
from tests.edge.wire.test_framing import BAD_CHUNKS, CHUNK, CODINGS, END, LENGTHS
from tests.edge.wire.test_sizes import HEADS
from tests.edge.wire.test_targets import BAD_LINES, GOOD_LINES

pytestmark = pytest.mark.asyncio(loop_scope="module")

EDGE = {"tls": True}


async def test_bad_framing_is_refused(edge: Attacked) -> None:
    """Lengths, codings and chunks."""
    assert edge.tls is not None
    for data in LENGTHS.values():
        await edge.refuses(data, 400, whole=False)
    for fields in CODINGS.values():
        await edge.refuses(post(*fields, body=CHUNK + END, length=False) + HIDDEN, 400, 501, whole=False)
    for data in BAD_CHUNKS.values():
        await edge.refuses(chunked(data) + HIDDEN, 400, whole=False)


async def test_bad_request_lines_and_heads_are_refused(edge: Attacked) -> None:
    """The answer arrives, and TLS is ended in good order behind it."""
    for data, statuses in BAD_LINES.values():
        await edge.refuses(data + HIDDEN, *statuses, whole=False)
    before = edge.memory()
    for data in HEADS.values():
        await edge.refuses(data, 400, 431, whole=False)
    assert edge.memory() - before <= GROWTH


async def test_good_requests_are_read_one_after_the_other(edge: Attacked) -> None:
    """However they are cut into records."""
    for data in GOOD_LINES.values():
        assert [reply.status for reply in await edge.reads(data * 2)] == [200, 200]
    answers, seen = await edge.sees((post() + chunked(CHUNK, END)) * 200 + LAST, range(1, 20_000, 700))
    assert answers.statuses == [200] * 401
    assert [one.body for one in seen] == [passed(BODY)] * 400


async def test_a_body_that_is_too_large_is_refused(edge: Attacked) -> None:
    """Who sends it all the same hears that."""
    big = post(body=b"x" * 20_000_000)
    before = edge.memory()
    for answers, _ in await asyncio.gather(
        *(edge.sees(big, range(100_000, len(big), 100_000)) for _ in range(4))
    ):
        assert answers.statuses == [413]
    assert edge.memory() - before <= GROWTH
