"""Any bytes of a model server, cut anywhere: one outcome, no hang, no second use after trouble."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.edge.answers import Feeding, Outcome, corpus, cut, valid
from tests.support.depth import examples

KEPT = corpus()
TOKENS = [
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b";", b"0", b"-1", b"ffffffff", b"1\r\n", b"\xff",
    b"HTTP/1.1 ", b"200 OK\r\n", b"100 Continue\r\n\r\n", b"transfer-encoding: chunked\r\n",
    b"content-length: 5\r\n", b"content-length: 0\r\n", b"connection: close\r\n", b"0\r\n\r\n",
    b"5\r\nhello\r\n", b"upgrade: x\r\n",
]  # fmt: skip


def outcome(data: bytes, at: Iterable[int] = (), bodiless: bool = False) -> Outcome:
    """What becomes of these bytes, cut at these places."""

    async def run() -> Outcome:
        return await Feeding().outcome(cut(data, at), bodiless)

    return LOOP.run_until_complete(run())


LOOP = asyncio.new_event_loop()


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterable[None]:
    yield
    LOOP.close()


def all_cuts(data: bytes) -> Iterable[Iterable[int]]:
    """Whole, byte by byte, and once at each place."""
    yield ()
    yield range(len(data))
    yield from ([place] for place in range(1, min(len(data), 400)))


@pytest.mark.parametrize("name", KEPT)
def test_each_kept_answer_has_one_outcome_however_it_is_cut(name: str) -> None:
    """Those in `whole` are whole, those in `broken` are broken."""
    data = KEPT[name]
    found = {outcome(data, at) for at in all_cuts(data)}
    assert len(found) == 1
    assert found.pop().end == name.partition("/")[0]


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A kept answer with some bytes taken out, doubled, overwritten or put in."""
    data = draw(st.sampled_from(list(KEPT.values())))
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.integers(begin, min(len(data), begin + 20)))
        middle = draw(
            st.one_of(
                st.sampled_from(TOKENS), st.just(b""), st.just(data[begin:end] * 2), st.binary(max_size=4)
            )
        )
        data = data[:begin] + middle + data[end:]
    return data


ANY = st.one_of(
    spoiled(), st.lists(st.sampled_from(TOKENS), max_size=30).map(b"".join), st.binary(max_size=200)
)


@settings(max_examples=examples(400), deadline=None)
@given(ANY, st.lists(st.integers(0, 400), max_size=8), st.booleans())
def test_any_bytes_cut_anywhere(data: bytes, at: list[int], bodiless: bool) -> None:
    """One outcome, by rules: no connection = no byte; broken = closed for good; nothing hangs."""
    found = outcome(data, at, bodiless)
    assert found == outcome(data, (), bodiless)
    assert found == outcome(data, range(len(data)), bodiless)
    assert (found.end == "no connection") == (not data.strip(b"\r\n"))


@settings(max_examples=examples(200), deadline=None)
@given(valid(), st.lists(st.integers(0, 900), max_size=8), st.integers(0, 900))
def test_a_valid_answer_is_what_it_says_and_no_part_of_it_is_whole(
    answer: tuple[bytes, Outcome], at: list[int], end: int
) -> None:
    """Status, fields, body and the connection's further use; cut off anywhere before its end it is broken,
    unless nothing but the end of the connection tells where the body ends."""
    data, meant = answer
    assert outcome(data, at) == meant
    part = data[: end % len(data)]
    if meant.kept or b"content-length" in dict(meant.headers) or b"transfer-encoding" in dict(meant.headers):
        assert outcome(part, at).end == ("broken" if part else "no connection")


@pytest.mark.parametrize(
    ("head", "end"), [(65_536, "whole"), (65_537, "broken"), (70_000, "broken"), (1_000_000, "broken")]
)
@pytest.mark.parametrize("filling", ["value", "values", "padding", "reason", "interims"])
def test_a_head_has_a_bound_however_it_is_filled_and_cut(head: int, end: str, filling: str) -> None:
    """64 KiB, interim answers and all that the parser skips included; exactly."""
    begin, rest = b"HTTP/1.1 200 ", b"content-length: 2\r\n\r\n"
    room = head - len(begin) - len(rest)
    ways = {
        "value": lambda: begin + b"\r\nx:" + b"y" * (room - 6) + b"\r\n",
        "values": lambda: (
            begin
            + b"\r\n"
            + b"x:y\r\n" * ((room - 2) // 5 - 1)
            + b"z:"
            + b"y" * ((room - 2) % 5 + 1)
            + b"\r\n"
        ),
        "padding": lambda: begin + b"\r\nx:" + b" " * (room - 7) + b"y\r\n",
        "reason": lambda: begin + b"y" * (room - 2) + b"\r\n",
        "interims": lambda: _interims(room - 2) + begin + b"\r\n",
    }
    data = ways[filling]() + rest
    assert len(data) == head
    for at in ((), range(0, len(data), 1000), [65_530, 65_535, 65_536], [head - 1]):
        found = outcome(data + b"hi", at)
        assert found.end == end, at


def _interims(size: int) -> bytes:
    one = b"HTTP/1.1 100 %s\r\n\r\n"
    count, rest = divmod(size, len(one) - 2)
    return (one % b"") * (count - 1) + one % (b"y" * rest)


@pytest.mark.parametrize(
    "filling", [b"2;" + b"x" * 300_000, b"0\r\nx: " + b"y" * 300_000, b"0\r\n" + b"x: y\r\n" * 60_000]
)
def test_what_is_no_body_has_a_bound_too(filling: bytes) -> None:
    """Extensions and trailers without an end break the answer off."""
    data = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n" + filling
    for at in ((), range(0, len(data), 1000)):
        found = outcome(data, at)
        assert (found.end, found.body) == ("broken", b"hi")


def test_a_body_in_tiny_chunks_costs_no_more_than_its_bytes() -> None:
    """Pieces are put together; what is held stays near what was read at a time."""
    feeding = Feeding()
    data = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"2\r\nhi\r\n" * 30_000

    async def run() -> None:
        asking = asyncio.ensure_future(feeding.connection.exchange(b"", b"", False))
        await asyncio.sleep(0)
        for piece in cut(data, range(0, len(data), 7)):
            if feeding.transport.reading:
                feeding.connection.get_buffer(-1)[: len(piece)] = piece
                feeding.connection.buffer_updated(len(piece))
        reply = await asking
        assert not feeding.transport.reading
        assert reply.unread < 40_000
        assert len(reply._pieces) <= 65
        reply.close()

    LOOP.run_until_complete(run())
