"""Our reading of requests against llhttp's: what ours takes, llhttp takes, and means the same by it.

llhttp may take more. Counterexamples are kept in `corpus/downstream/` and read again each time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httptools
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.edge.wire.memory import Application, heard
from tests.support.depth import examples

CORPUS = Path(__file__).parents[1] / "corpus" / "downstream"


@dataclass
class Message:
    """A request as llhttp told it."""

    method: str = ""
    target: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    headed: bool = False
    """Its head is complete: what comes now are trailers."""
    whole: bool = False


class Reference:
    """llhttp, by httptools."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._parser = httptools.HttpRequestParser(self)

    def read(self, data: bytes) -> None:
        """Reads as far as it can."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return

    def on_message_begin(self) -> None:
        self.messages.append(Message())

    def on_url(self, url: bytes) -> None:
        self.messages[-1].target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.messages[-1].headed:
            self.messages[-1].headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.messages[-1].headed = True
        self.messages[-1].method = self._parser.get_method().decode()

    def on_body(self, body: bytes) -> None:
        self.messages[-1].body += body

    def on_message_complete(self) -> None:
        self.messages[-1].whole = True


def path_and_query(target: bytes) -> tuple[bytes, bytes]:
    """Of a target in any form, by httptools' own reading of URLs."""
    if target == b"*":
        return target, b""
    found = httptools.parse_url(target)
    return found.path or b"/", found.query or b""


def compare(data: bytes, app: Application) -> None:
    """What ours has read is what llhttp has read."""
    reference = Reference()
    reference.read(data)
    whole = [message for message in reference.messages if message.whole]
    assert not app.overlapped
    assert len(app.heard) <= len(whole), (app.heard, reference.messages)
    for ours, theirs in zip(app.heard, whole, strict=False):
        assert ours.method == theirs.method
        assert (ours.path, ours.query) == path_and_query(theirs.target)
        assert ours.headers == [(name, value.strip(b" \t")) for name, value in theirs.headers]
        assert ours.body == theirs.body


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


METHODS = st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH"])
TARGETS = st.sampled_from(
    [b"/", b"/v1/chat/completions", b"/a?b=c&d", b"/?", b"http://x/a?b", b"//a", b"/a//b/../c", b"/%00%0d"]
    * 16
    + [
        b"*",
        b"http://x",
        b"https://x:1?q",
        b"/a#b",
        b"x",
        b'/<>"^`{|}\\',
        b"/\xff",
        b"",
        b"http:///",
        b"/a b",
    ]
)
VERSIONS = st.sampled_from(
    [b"HTTP/1.1"] * 30 + [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"http/1.1", b"HTTP/1.1 ", b""]
)
BLANKS = st.sampled_from([b" "] * 60 + [b"", b"\t", b"  ", b" \t ", b"\x0b", b"\r\n "])
ENDS = st.sampled_from([b"\r\n"] * 300 + [b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"\x00\r\n"])
VALUES = st.sampled_from(
    [
        b"x",
        b"",
        b"a b",
        b"a,b",
        b"\xe4",
        b"a\tb",
        b"keep-alive",
        b"upgrade",
        b"5",
        b"chunked",
        b"100-continue",
    ]
    * 16
    + [b"close", b"\x00", b"\x7f", b"\x1b", b"a\rb", b"a\nb", b"a, close"]
)
NAMES = st.sampled_from(
    [b"x", b"X-Y", b"connection", b"Connection", b"upgrade", b"te", b"trailer", b"keep-alive", b"cookie"] * 16
    + [b"expect", b"x y", b"x\x00", b"\xe4", b"x(", b"", b" x", b"host", b"content-length "]
)
BODIES = st.binary(max_size=40) | st.sampled_from(
    [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"0\r\n\r\n", b"\r\n"]
)
SIZES = st.sampled_from(
    [b"%x"] * 60
    + [
        b"%X",
        b"0%x",
        b"00000000%x",
        b"0x%x",
        b"+%x",
        b"-%x",
        b" %x",
        b"%x ",
        b"%x\t",
        b"%x;a",
        b"%x;a=b",
        b'%x;a="b\\"c"',
        b"%x ;a",
        b"%x; a",
        b'%x;a="\r\n"',
        b"%x;\n",
        b"%x;a\x00",
        b"1000000000%x",
        b"%x,%x",
        b"_%x",
    ]
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[list[bytes], bytes]:
    """Framing fields and the bytes behind the head, which mostly belong together."""
    body = draw(BODIES)
    kind = draw(st.sampled_from(["length", "length", "chunks", "chunks", "chunks", "none", "odd"]))
    if kind == "none":
        return [], b""
    if kind == "length":
        return [b"Content-Length: %d" % len(body)], body
    chunks = b""
    for piece in [body[:7], body[7:20], body[20:]]:
        if piece:
            size = draw(SIZES)
            line = size.replace(b"%x", b"%x" % len(piece)).replace(b"%X", b"%X" % len(piece))
            chunks += line + draw(ENDS) + piece + draw(ENDS)
    trailers = b"".join(
        draw(st.lists(st.sampled_from([b"x: y\r\n", b"X:\r\n"] * 5 + [b"x :y\r\n", b" x\r\n"]), max_size=2))
    )
    chunks += (
        draw(st.sampled_from([b"0"] * 9 + [b"000", b"0;a", b"-0", b"0 "])) + b"\r\n" + trailers + draw(ENDS)
    )
    if kind == "chunks":
        return [b"Transfer-Encoding: chunked"], chunks
    fields = draw(
        st.lists(
            st.sampled_from(
                [
                    b"Content-Length: %d" % len(body),
                    b"Content-Length: 5",
                    b"Content-Length: +5",
                    b"Content-Length:",
                    b"Content-Length: 5, 5",
                    b"Content-Length: 0005",
                    b"Content-Length : 5",
                    b"Content-Length: \x0b5",
                    b"Transfer-Encoding: chunked",
                    b"transfer-encoding:\tChunked ",
                    b"Transfer-Encoding: identity",
                    b"Transfer-Encoding: gzip, chunked",
                    b"Transfer-Encoding: chunked, chunked",
                    b"Transfer-Encoding:",
                    b"Transfer-Encoding: xchunked",
                    b"Transfer-Encoding : chunked",
                    b"Transfer-Encoding: chunked;a",
                ]
            ),
            max_size=3,
        )
    )
    return fields, draw(st.sampled_from([body, chunks]))


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """One request that is mostly right."""
    first = draw(METHODS) + draw(BLANKS) + draw(TARGETS) + draw(BLANKS) + draw(VERSIONS)
    if draw(st.integers(0, 3)):
        first = draw(METHODS) + b" " + draw(TARGETS) + b" HTTP/1.1"
    framing, body = draw(bodies())
    fields = [b"Host: x"] * draw(st.sampled_from([1] * 30 + [0, 2])) + framing
    for _ in range(draw(st.integers(0, 2))):
        fields.append(draw(NAMES) + b":" + draw(BLANKS) + draw(VALUES))
    fields = draw(st.permutations(fields))
    head = b"".join(line + draw(ENDS) for line in [first, *fields])
    return (
        draw(st.sampled_from([b""] * 20 + [b"\r\n", b"\r\n", b"\n", b"\r", b"\r\n\r\n"]))
        + head
        + draw(ENDS)
        + body
    )


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Some requests, one behind the other, with now and then a byte that is another one."""
    data = bytearray(b"".join(draw(st.lists(requests(), min_size=1, max_size=3))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 1))] = draw(
            st.sampled_from([b"", *(b"%c" % n for n in b"\r\n\x00 \t:;0a,")])
        )
    return bytes(data)


def places(data: bytes, draws: st.DataObject) -> list[int]:
    """Where the bytes are cut."""
    if draws.draw(st.booleans()):
        return list(range(1, len(data)))
    return sorted(draws.draw(st.sets(st.integers(0, len(data)), max_size=5)))


@settings(max_examples=examples(100), deadline=None)
@given(data=streams(), draws=st.data())
def test_what_ours_reads_llhttp_reads_the_same(
    loop: asyncio.AbstractEventLoop, data: bytes, draws: st.DataObject
) -> None:
    """Method, target, headers and body of each request; and however the bytes are cut, ours says the same."""
    whole = loop.run_until_complete(heard(data, ()))
    compare(data, whole)
    event(f"{len(whole.heard)} read, {'refused' if whole.refusals else 'taken'}")
    cuts, pauses = places(data, draws), draws.draw(st.sampled_from([0, 1, 2, 3, 20]))
    cut = loop.run_until_complete(heard(data, cuts, pauses))
    assert cut.heard == whole.heard
    assert not cut.overlapped
    assert [one.status for one in cut.refusals] == [one.status for one in whole.refusals]


def corpus() -> list[Path]:
    return sorted(CORPUS.glob("*.http"))


@pytest.mark.parametrize("path", corpus(), ids=lambda path: path.stem)
def test_what_was_found_stays_mended(loop: asyncio.AbstractEventLoop, path: Path) -> None:
    """Each file once whole and once byte by byte."""
    data = path.read_bytes()
    whole = loop.run_until_complete(heard(data, ()))
    compare(data, whole)
    for pauses in (0, 1, 20):
        cut = loop.run_until_complete(heard(data, range(1, len(data)), pauses))
        assert cut.heard == whole.heard
        assert not cut.overlapped
