"""Heads, bodies and values beyond all measure: refused as soon as that is known, and nothing grows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.edge.wire.attacked import GROWTH, Attacked, passed
from tests.edge.wire.raw import BODY, CHAT, LAST, PATIENCE, Talk, chunked, post, talk

pytestmark = pytest.mark.asyncio(loop_scope="module")

EDGE = {"max_body": "4MiB"}
MIB = b"x" * 2**20

HEADS = {
    "a field of 1 MB": post(b"x: " + MIB),
    "a name of 1 MB": post(MIB + b": y"),
    "a target of 1 MB": post(path=CHAT + b"?" + MIB),
    "a method of 1 MB": MIB + b" /health HTTP/1.1\r\nhost: x\r\n\r\n",
    "1 MB without a line end": MIB,
    "1 MB of blanks": b"GET /health HTTP/1.1\r\nhost:" + b" " * 2**20 + b"x\r\n\r\n",
    "1 MB of empty lines": b"\r\n" * 2**19,
    "100,000 tiny fields": post(*[b"a:b"] * 100_000),
    "100,000 fields, none of them twice": post(*[b"a%d:" % number for number in range(100_000)]),
    "100,000 parts of one field": post(b"connection: " + b"a," * 100_000),
    "1,000 fields": post(*[b"a:"] * 1000),
}


@pytest.mark.parametrize("case", HEADS)
async def test_a_head_beyond_the_limit_is_refused(edge: Attacked, case: str) -> None:
    """431 (or 400, where there never was a line) as soon as it is too large, and the client can read it."""
    before = edge.memory()
    reply = await edge.refuses(HEADS[case], 400, 431, whole=False)
    if case.endswith(("fields", "1 MB")) and "method" not in case and "name" not in case:
        assert reply.status == 431
    assert edge.memory() - before <= GROWTH
    await edge.serves()


async def test_a_head_that_is_merely_large_is_read(edge: Attacked) -> None:
    """Cookies and tokens of some kilobytes are usual."""
    replies = await edge.reads(post(b"cookie: " + b"x" * 6000, b"x: " + b"y" * 6000), BODY, whole=False)
    assert replies[0].status == 200


def _pieces(head: bytes, count: int, piece: bytes) -> Iterator[bytes]:
    yield head
    for _ in range(count):
        yield piece


async def test_a_body_of_100_mb_is_refused_before_it_comes(edge: Attacked) -> None:
    """By its length: the answer doesn't wait for one byte of it."""
    wire = await edge.wire()
    await wire.say(post(b"content-length: 100000000", length=False, body=b""))
    reply = await wire.answer()
    assert (reply.status, reply.error["code"], reply.header("connection")) == (413, "body_too_large", "close")


@pytest.mark.parametrize("coding", ["length", "chunks"])
async def test_who_sends_100_mb_all_the_same_hears_that_it_is_too_much(edge: Attacked, coding: str) -> None:
    """A client that writes first and reads then gets 413, not a reset; and it costs no memory."""
    before, head = edge.memory(), post(b"content-length: 100000000", length=False, body=b"")
    piece = MIB
    if coding == "chunks":
        head, piece = chunked(b'6\r\n{"x":"\r\n'), b"100000\r\n" + MIB + b"\r\n"

    async def one() -> Talk:
        return await talk(edge.port, _pieces(head, 95, piece))

    for answers in await asyncio.gather(*(one() for _ in range(8))):
        assert answers.statuses == [413]
        assert answers.answers[0].error["code"] == "body_too_large"
    assert edge.memory() - before <= GROWTH
    await edge.serves()


JSON = {
    "10,000 deep": b'{"model":"small","x":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "10,000 objects deep": b'{"model":"small","x":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001,
    "1,000,000 deep and open": b'{"model":"small","x":' + b"[" * 1_000_000,
    "a million empty lists": b'{"model":"small","x":[' + b"[]," * 1_000_000 + b"[]]}",
    "NaN": b'{"model":"small","temperature":NaN}',
    "Infinity": b'{"model":"small","temperature":Infinity}',
    "-Infinity": b'{"model":"small","temperature":-Infinity}',
    "a NUL": b'{"model":"small"\x00}',
    "a NUL in a text": b'{"model":"sm\x00all"}',
    "a line break in a text": b'{"model":"sm\r\nall"}',
    "no UTF-8": b'{"model":"small","x":"\xff\xfe"}',
    "an overlong UTF-8": b'{"model":"small","x":"\xc0\xaf"}',
    "half a surrogate": b'{"model":"small","x":"\xed\xa0\x80"}',
    "UTF-16": '{"model":"small"}'.encode("utf-16"),
    "a mark in front": b"\xef\xbb\xbf" + BODY,
    "two documents": BODY + BODY,
    "a comma too many": b'{"model":"small",}',
    "a comment": b'{"model":"small"/**/}',
    "single quotes": b"{'model':'small'}",
    "a list": b'["model"]',
    "a text": b'"model"',
    "nothing": b"",
    "a number for the model": b'{"model":1}',
    "null for the model": b'{"model":null}',
    "a list for the model": b'{"model":["small"]}',
    "the model twice": b'{"model":"small","model":"small"}',
    "the model twice, once escaped": b'{"model":"small","mo\\u0064el":"warm"}',
}


@pytest.mark.parametrize("case", JSON)
async def test_json_that_two_could_read_differently_is_400(edge: Attacked, case: str) -> None:
    """Within a moment, in the envelope, and no model server hears of it. The connection goes on, unless that
    was known before all of it had come."""
    before = edge.memory()
    answers, seen = await edge.sees(post(body=JSON[case]) + LAST)
    first = answers.answers[0]
    assert answers.statuses == ([400] if first.header("connection") == "close" else [400, 200])
    assert first.error["type"] == "invalid_request_error"
    assert len(answers.answers) == 2 or len(JSON[case]) > 2**19
    assert not seen
    assert edge.memory() - before <= GROWTH


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"small","seed":' + b"9" * 4000 + b"}",
        b'{"model":"small","x":1e400}',
        b'{"x":{"model":"warm"},"model":"small"}',
        b'{"model":"small","x":"\\ud800"}',
    ],
    ids=[
        "a number of 4,000 digits",
        "a number beyond all",
        "another model inside",
        "an escaped half surrogate",
    ],
)
async def test_odd_json_is_passed_on_as_it_came_or_refused(edge: Attacked, body: bytes) -> None:
    """What is judged is what is sent."""
    answers, seen = await edge.sees(post(body=body) + LAST)
    assert answers.statuses in ([200, 200], [400, 200])
    assert [one.body for one in seen] == ([passed(body)] if answers.statuses[0] == 200 else [])


@pytest.mark.parametrize(
    "model", ["m\\r\\nx-evil: 1", "m\\u0000", "../../sleep", "m" * 100_000, "<script>", "%0d%0a"]
)
async def test_no_model_name_gets_into_a_header_or_a_path(edge: Attacked, model: str) -> None:
    """400 or 404 with a message that is bounded and printable."""
    answers, seen = await edge.sees(post(body=b'{"model":"%s"}' % model.encode()) + LAST)
    assert answers.statuses in ([404, 200], [400, 200])
    assert answers.answers[0].error["code"] in ("model_not_found", "missing_model", "too_complex")
    assert not seen


async def test_expect_is_obeyed_once(edge: Attacked) -> None:
    """100 comes before a body that will be read, 413 instead of it, 417 for another expectation."""
    wire = await edge.wire()
    await wire.say(post(b"expect: 100-continue", b"content-length: 17", body=b"", length=False))
    line = await asyncio.wait_for(wire.reader.readuntil(b"\r\n\r\n"), PATIENCE)
    assert line.startswith(b"HTTP/1.1 100 ")
    await wire.say(BODY, LAST)
    answers = await wire.rest()
    assert (answers.statuses, answers.interim) == ([200, 200], [])
    answers, seen = await edge.sees(post(b"expect: 100-continue", body=b"x" * 2**23, length=True))
    assert (answers.statuses, answers.interim) == ([413], [])
    answers, seen = await edge.sees(post(b"Expect: 100-Continue") + LAST)
    assert answers.statuses == [200, 200]
    assert len(seen) == 1
    await edge.refuses(post(b"expect: 100-continue, x"), 417)
    await edge.refuses(post(b"expect: 200-ok"), 417)
