"""Where a request's body ends: one meaning, or none. Nothing gets a second request past the edge."""

from __future__ import annotations

import pytest

from tests.edge.wire.attacked import Attacked, passed
from tests.edge.wire.raw import BODY, CHAT, HIDDEN, chunked, post

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHUNK = b"%x\r\n%s\r\n" % (len(BODY), BODY)
END = b"0\r\n\r\n"
TE = b"transfer-encoding: chunked"


def declared(*lengths: bytes) -> bytes:
    """A POST with these lines about its length, and a hidden request behind its body."""
    return post(*lengths, length=False) + HIDDEN


LENGTHS = {
    "length and chunked": declared(b"content-length: 17", TE),
    "chunked and length": declared(TE, b"content-length: 17"),
    "chunked and length 0": post(TE, b"content-length: 0", length=False, body=CHUNK + END) + HIDDEN,
    "length 0 and a cased Chunked": post(b"CONTENT-LENGTH: 0", b"Transfer-ENCODING: Chunked", length=False)
    + HIDDEN,
    "two lengths": declared(b"content-length: 17", b"content-length: 170"),
    "two equal lengths": declared(b"content-length: 17", b"content-length: 17"),
    "a list of lengths": declared(b"content-length: 17, 17"),
    "a length with a sign": declared(b"content-length: +17"),
    "a negative length": declared(b"content-length: -17"),
    "a length in hex": declared(b"content-length: 0x11"),
    "a length with an underscore": declared(b"content-length: 1_7"),
    "a length with a fraction": declared(b"content-length: 17.0"),
    "a length with a word": declared(b"content-length: 17 bytes"),
    "an empty length": declared(b"content-length:"),
    "a length in other digits": declared("content-length: １７".encode()),
    "a superscript length": declared(b"content-length: \xb2"),
    "a length of twenty digits": declared(b"content-length: 18446744073709551633"),
    "a length of a thousand digits": declared(b"content-length: " + b"0" * 998 + b"17"),
    "a length behind a NUL": declared(b"content-length: 17\x00"),
    "a length behind a vertical tab": declared(b"content-length:\x0b17"),
    "a space before the colon": declared(b"content-length : 17"),
    "a tab before the colon": declared(b"content-length\t: 17"),
    "a folded length": declared(b"content-length: 1\r\n 7"),
    "a length that begins on the next line": declared(b"content-length:\r\n 17"),
    "a first field that is folded": declared(b" x: y", b"content-length: 17"),
    "a bare CR in a value": declared(b"x: y\rcontent-length: 17"),
    "a bare LF between fields": declared(b"x: y\ncontent-length: 17"),
    "a bare LF at the end of the head": b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 17\n\n%s%s"
    % (CHAT, BODY, HIDDEN),
    "LF for all line ends": b"POST %s HTTP/1.1\nhost: x\ncontent-length: 17\n\n%s%s" % (CHAT, BODY, HIDDEN),
    "CR for all line ends": b"POST %s HTTP/1.1\rhost: x\rcontent-length: 17\r\r%s%s\r\n\r\n"
    % (CHAT, BODY, HIDDEN),
    "CR CR LF": declared(b"content-length: 17\r"),
    "a line without a colon": declared(b"content-length 17"),
    "an empty name": declared(b": 17", b"content-length: 17"),
    "a NUL in a name": declared(b"content\x00-length: 17", b"content-length: 17"),
    "a letter beyond ASCII in a name": declared("cöntent-length: 17".encode(), b"content-length: 17"),
    "a parenthesis in a name": declared(b"content(length): 17", b"content-length: 17"),
    "a NUL in a value": declared(b"x: a\x00b", b"content-length: 17"),
    "an escape in a value": declared(b"x: a\x1bb", b"content-length: 17"),
    "a DEL in a value": declared(b"x: a\x7fb", b"content-length: 17"),
}


@pytest.mark.parametrize("case", LENGTHS)
async def test_a_length_that_two_could_read_differently_is_refused(edge: Attacked, case: str) -> None:
    """400, closed; what was hidden behind it is never a request."""
    await edge.refuses(LENGTHS[case], 400)


CODINGS = {
    "xchunked": (b"transfer-encoding: xchunked",),
    "chunkedx": (b"transfer-encoding: chunkedx",),
    "identity": (b"transfer-encoding: identity",),
    "chunked, identity": (b"transfer-encoding: chunked, identity",),
    "identity, chunked": (b"transfer-encoding: identity, chunked",),
    "gzip": (b"transfer-encoding: gzip",),
    "gzip, chunked": (b"transfer-encoding: gzip, chunked",),
    "chunked, gzip": (b"transfer-encoding: chunked, gzip",),
    "chunked, chunked": (b"transfer-encoding: chunked, chunked",),
    "two fields": (TE, TE),
    "gzip in one field, chunked in another": (b"transfer-encoding: gzip", TE),
    "chunked in one field, identity in another": (TE, b"transfer-encoding: identity"),
    "nothing": (b"transfer-encoding:",),
    "a comma": (b"transfer-encoding: ,chunked",),
    "quotes": (b'transfer-encoding: "chunked"',),
    "a parameter": (b"transfer-encoding: chunked;q=1",),
    "a vertical tab": (b"transfer-encoding:\x0bchunked",),
    "a form feed": (b"transfer-encoding: chunked\x0c",),
    "a NUL": (b"transfer-encoding: chunked\x00",),
    "a no-break space": (b"transfer-encoding: \xa0chunked",),
    "a space before the colon": (b"transfer-encoding : chunked",),
    "a fold": (b"transfer-encoding:\r\n chunked",),
    "a fold behind": (b"transfer-encoding: chunked\r\n , identity",),
    "a bare LF": (b"x: y\ntransfer-encoding: chunked",),
    "a long s": ("tranſfer-encoding: chunked".encode(),),
    "a Kelvin sign": ("transfer-encoding: chun\u212aed".encode(),),
}


@pytest.mark.parametrize("case", CODINGS)
async def test_a_coding_other_than_chunked_alone_is_refused(edge: Attacked, case: str) -> None:
    """400, or 501 where the coding is one that merely isn't known here; closed."""
    fields = CODINGS[case]
    await edge.refuses(post(*fields, body=CHUNK + END, length=False) + HIDDEN, 400, 501)
    await edge.refuses(post(*fields, body=b"0\r\n\r\n" + HIDDEN), 400, 501)


async def test_chunks_in_http_1_0_are_refused(edge: Attacked) -> None:
    """A relay that knows no chunks would read it differently (RFC 9112, 6.1)."""
    old = chunked(CHUNK, END).replace(b"HTTP/1.1", b"HTTP/1.0")
    await edge.refuses(old + HIDDEN, 400)


@pytest.mark.parametrize(
    "fields",
    [
        (b"Transfer-Encoding: chunked",),
        (b"TRANSFER-ENCODING:CHUNKED",),
        (b"transfer-encoding:\t chunked \t",),
        (b"te: trailers", b"transfer-encoding: chunked", b"trailer: x-sum"),
    ],
)
async def test_chunked_is_read_however_it_is_cased(edge: Attacked, fields: tuple[bytes, ...]) -> None:
    """Names and codings have no case, and blanks around a value don't belong to it."""
    data = post(*fields, body=CHUNK + END, length=False)
    assert [reply.status for reply in await edge.reads(data + data, BODY, BODY)] == [200, 200]


GOOD_CHUNKS = {
    "one byte each": b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + END,
    "upper case": b"A\r\n" + BODY[:10] + b"\r\n7\r\n" + BODY[10:] + b"\r\n" + END,
    "lower case": b"a\r\n" + BODY[:10] + b"\r\n7\r\n" + BODY[10:] + b"\r\n" + END,
    "leading zeros": b"0011\r\n" + BODY + b"\r\n000\r\n\r\n",
    "an extension": b'11;a=b;c="d \\" e";f\r\n' + BODY + b"\r\n0;last\r\n\r\n",
    "trailers": CHUNK + b"0\r\nx-sum: 1\r\nx-more: 2\r\n\r\n",
    "a trailer that would name a tenant": CHUNK + b"0\r\nx-tidegate-tenant: other\r\n\r\n",
}


@pytest.mark.parametrize("case", GOOD_CHUNKS)
async def test_chunks_are_put_together(edge: Attacked, case: str) -> None:
    """Whatever their sizes, extensions and trailers: these are read and left out."""
    replies = await edge.reads(chunked(GOOD_CHUNKS[case]) * 2, BODY, BODY)
    assert [reply.status for reply in replies] == [200, 200]
    assert {ticket.tenant for ticket in edge.admission.acquired[-4:]} == {""}
    for name in (b"x-sum", b"transfer-encoding", b"trailer"):
        assert edge.server.seen[-1].header(name) is None
    assert edge.server.seen[-1].header(b"content-length") == b"23"


BAD_CHUNKS = {
    "0x": b"0x11\r\n" + BODY + b"\r\n" + END,
    "a sign": b"+11\r\n" + BODY + b"\r\n" + END,
    "a minus": b"-11\r\n" + BODY + b"\r\n" + END,
    "minus zero": CHUNK + b"-0\r\n\r\n",
    "an underscore": b"1_1\r\n" + BODY + b"\r\n" + END,
    "a blank before": b" 11\r\n" + BODY + b"\r\n" + END,
    "a blank behind": b"11 \r\n" + BODY + b"\r\n" + END,
    "a tab behind": b"11\t\r\n" + BODY + b"\r\n" + END,
    "no digit": b"\r\n" + BODY + b"\r\n" + END,
    "no digit but an extension": b";a=b\r\n" + BODY + b"\r\n" + END,
    "no hex digit": b"g\r\n" + BODY + b"\r\n" + END,
    "other digits": "１１\r\n".encode() + BODY + b"\r\n" + END,
    "too many digits": b"10000000000000011\r\n" + BODY + b"\r\n" + END,
    "very many digits": b"f" * 5000 + b"\r\n" + BODY + b"\r\n" + END,
    "very many zeros": b"0" * 70_000 + b"11\r\n" + BODY + b"\r\n" + END,
    "LF behind the size": b"11\n" + BODY + b"\r\n" + END,
    "CR behind the size": b"11\r" + BODY + b"\r\n" + END,
    "CR CR LF behind the size": b"11\r\r\n" + BODY + b"\r\n" + END,
    "a NUL behind the size": b"11\x00\r\n" + BODY + b"\r\n" + END,
    "a comma": b"11,11\r\n" + BODY + b"\r\n" + END,
    "an extension with LF": b"11;a\nb\r\n" + BODY + b"\r\n" + END,
    "an extension with CR": b"11;a\rb\r\n" + BODY + b"\r\n" + END,
    "an extension with a NUL": b"11;a\x00\r\n" + BODY + b"\r\n" + END,
    "an extension with CRLF in quotes": b'11;a="b\r\n0\r\n\r\n' + HIDDEN,
    "an endless extension": b"11;" + b"a" * 70_000 + b"\r\n" + BODY + b"\r\n" + END,
    "data without CRLF": b"11\r\n" + BODY + END,
    "data with LF": b"11\r\n" + BODY + b"\n" + END,
    "data with CR": b"11\r\n" + BODY + b"\r" + END,
    "data with two bytes too many": b"11\r\n" + BODY + b"XX" + END,
    "data with XX for CRLF and a hidden end": b"11\r\n" + BODY + b"XX0\r\n\r\n",
    "data that is too short": b"14\r\n" + BODY + b"\r\n" + END,
    "the last one with LF": CHUNK + b"0\n\n",
    "the last one without its empty line": CHUNK + b"0\r\nX" + END,
    "a trailer with a blank before the colon": CHUNK + b"0\r\nx : y\r\n\r\n",
    "a trailer that would lengthen it": CHUNK + b"0\r\nContent-Length: 500\r\n\r\n",
    "a trailer that would begin another one": CHUNK + b"0\r\ntransfer-encoding: chunked\r\n\r\n",
    "a trailer without a colon": CHUNK + b"0\r\nxy\r\n\r\n",
    "a trailer that is folded": CHUNK + b"0\r\nx: y\r\n z\r\n\r\n",
    "a trailer with a blank first": CHUNK + b"0\r\n x: y\r\n\r\n",
    "a trailer with LF": CHUNK + b"0\r\nx: y\n\r\n\r\n",
    "a trailer with a bare CR": CHUNK + b"0\r\nx: y\rz\r\n\r\n",
    "a trailer with a NUL": CHUNK + b"0\r\nx: \x00\r\n\r\n",
    "a trailer with an empty name": CHUNK + b"0\r\n: y\r\n\r\n",
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
async def test_a_bad_chunk_is_refused(edge: Attacked, case: str) -> None:
    """400 in the envelope, closed; the part before it leads nowhere."""
    data = BAD_CHUNKS[case]
    await edge.refuses(chunked(data) + HIDDEN, 400, whole=len(data) < 1000)


@pytest.mark.parametrize(
    "trailers", [b"x: " + b"y" * 200_000 + b"\r\n", b"x: y\r\n" * 100_000], ids=["long", "many"]
)
async def test_trailers_are_bounded_like_heads(edge: Attacked, trailers: bytes) -> None:
    """They are a way to send headers without end."""
    await edge.refuses(chunked(CHUNK, b"0\r\n", trailers, b"\r\n"), 400, 431, whole=False)


async def test_chunks_with_nothing_but_extensions_are_bounded(edge: Attacked) -> None:
    """A byte of body may not cost kilobytes of extensions: what the body's limit counts would be nothing."""
    for length, count in ((4000, 5000), (900, 50)):
        one = b"1;%s\r\n \r\n" % (b"a" * length)
        await edge.refuses(chunked(one * count, CHUNK, END), 400, whole=False)


async def test_a_body_is_what_its_length_says(edge: Attacked) -> None:
    """A request inside a body is a body; what follows is the next request."""
    body = b'{"model":"small"}'
    wrapped = b'{"model":"small","s":"' + b"A" * 40 + b'"}'
    replies = await edge.reads(
        post(body=body) + post(body=wrapped) + chunked(CHUNK, END), body, wrapped, BODY
    )
    assert [reply.body for reply in replies] == [passed(body), passed(wrapped), passed(BODY)]
    answers, seen = await edge.sees(post(b"connection: close", body=BODY) + HIDDEN)
    assert answers.statuses == [200]  # nothing is read behind a request that said it is the last
    assert len(seen) == 1


async def test_a_body_of_a_page_is_no_request(edge: Attacked) -> None:
    """GET with a body: it is read away as its length says, or the connection is closed; never a request."""
    get = b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(HIDDEN), HIDDEN)
    answers, seen = await edge.sees(get + post(b"connection: close"))
    assert answers.statuses in ([200, 200], [200], [400])
    assert len(seen) == (len(answers.answers) == 2)
    refused = post(body=HIDDEN, path=b"/no/such/route")
    answers, seen = await edge.sees(refused + post(b"connection: close"))
    assert answers.statuses in ([404, 200], [404])
    assert len(seen) == (len(answers.answers) == 2)
    upgrade = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    answers, seen = await edge.sees(upgrade + post(b"connection: close"))
    assert answers.statuses == [200, 200]  # what isn't understood is ignored
    assert len(seen) == 1
