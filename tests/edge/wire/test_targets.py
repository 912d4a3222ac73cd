"""The request line and Host: what is named, in which form, and in which version."""

from __future__ import annotations

import pytest

from tests.edge.wire.attacked import Attacked, passed
from tests.edge.wire.raw import BODY, CHAT, HIDDEN, LAST, post

pytestmark = pytest.mark.asyncio(loop_scope="module")

EDGE = {"idle_timeout": "3s"}


def line(text: bytes, *fields: bytes) -> bytes:
    """A request of this first line, with a Host unless one is given."""
    return b"\r\n".join([text, *(fields or (b"host: x",))]) + b"\r\n\r\n"


BAD_LINES = {
    "HTTP/0.9": (b"GET /health\r\n\r\n", (400, 505)),
    "a lone method": (b"GET\r\n\r\n", (400,)),
    "no target": (line(b"GET  HTTP/1.1"), (400,)),
    "two blanks": (line(b"GET  /health HTTP/1.1"), (400,)),
    "a tab for a blank": (line(b"GET\t/health HTTP/1.1"), (400,)),
    "a vertical tab for a blank": (line(b"GET\x0b/health HTTP/1.1"), (400,)),
    "a blank first": (line(b" GET /health HTTP/1.1"), (400,)),
    "a blank behind": (line(b"GET /health HTTP/1.1 "), (400,)),
    "a blank in the target": (line(b"GET /health HTTP/1.1 HTTP/1.1"), (400,)),
    "a NUL in the target": (line(b"GET /hea\x00lth HTTP/1.1"), (400,)),
    "a NUL in the query": (line(b"GET /health?a=\x00 HTTP/1.1"), (400,)),
    "a CR in the target": (line(b"GET /hea\rlth HTTP/1.1"), (400,)),
    "an LF in the target": (line(b"GET /hea\nlth HTTP/1.1"), (400,)),
    "an escape in the target": (line(b"GET /hea\x1blth HTTP/1.1"), (400,)),
    "a DEL in the target": (line(b"GET /hea\x7flth HTTP/1.1"), (400,)),
    "letters beyond ASCII": (line("GET /größe HTTP/1.1".encode()), (400,)),
    "no slash": (line(b"GET health HTTP/1.1"), (400,)),
    "a fragment": (line(b"GET /health#top HTTP/1.1"), (400,)),
    "a star with GET": (line(b"GET * HTTP/1.1"), (400,)),
    "an authority with GET": (line(b"GET x:80 HTTP/1.1"), (400,)),
    "another scheme": (line(b"GET ftp://x/health HTTP/1.1"), (400, 404, 421)),
    "no host in an absolute form": (line(b"GET http:///health HTTP/1.1"), (400,)),
    "a user in an absolute form": (line(b"GET http://u@x/health HTTP/1.1"), (400,)),
    "CONNECT": (line(b"CONNECT x:443 HTTP/1.1"), (400, 405, 501)),
    "CONNECT with a path": (line(b"CONNECT /health HTTP/1.1"), (400, 405, 501)),
    "a method with a NUL": (line(b"GE\x00T /health HTTP/1.1"), (400,)),
    "a method with a parenthesis": (line(b"G(T /health HTTP/1.1"), (400,)),
    "a method of a thousand letters": (line(b"G" * 1000 + b" /health HTTP/1.1"), (400, 501)),
    "a lower-case version": (line(b"GET /health http/1.1"), (400,)),
    "another protocol": (line(b"GET /health HTTQ/1.1"), (400,)),
    "RTSP": (line(b"GET /health RTSP/1.0"), (400,)),
    "no minor version": (line(b"GET /health HTTP/1"), (400, 505)),
    "a version of two digits": (line(b"GET /health HTTP/1.10"), (400, 505)),
    "a version with zeros": (line(b"GET /health HTTP/01.1"), (400, 505)),
    "HTTP/0.9 by name": (line(b"GET /health HTTP/0.9"), (400, 505)),
    "HTTP/2.0": (line(b"GET /health HTTP/2.0"), (400, 505)),
    "HTTP/3.1": (line(b"GET /health HTTP/3.1"), (400, 505)),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00", (400, 505)),
    "a TLS greeting": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 40, (400,)),
    "an SSH greeting": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", (400,)),
    "bytes": (bytes(range(256)), (400,)),
    "no Host": (line(b"GET /health HTTP/1.1", b"x: y"), (400,)),
    "two Hosts": (line(b"GET /health HTTP/1.1", b"host: x", b"host: x"), (400,)),
    "two different Hosts": (line(b"GET /health HTTP/1.1", b"host: x", b"Host: y"), (400,)),
    "two Hosts in HTTP/1.0": (line(b"GET /health HTTP/1.0", b"host: x", b"Host: y"), (400,)),
    "a Host with a blank": (line(b"GET /health HTTP/1.1", b"host: x y"), (400,)),
    "a Host with a path": (line(b"GET /health HTTP/1.1", b"host: x/y"), (400,)),
    "a Host with a user": (line(b"GET /health HTTP/1.1", b"host: u@x"), (400,)),
    "a Host with a list": (line(b"GET /health HTTP/1.1", b"host: x, y"), (400,)),
}


@pytest.mark.parametrize("case", BAD_LINES)
async def test_what_is_no_request_line_is_refused(edge: Attacked, case: str) -> None:
    """In the envelope, closed, and nothing behind it is read."""
    data, statuses = BAD_LINES[case]
    await edge.refuses(data + HIDDEN, *statuses)


GOOD_LINES = {
    "plain": line(b"GET /health HTTP/1.1"),
    "an empty line first": b"\r\n" + line(b"GET /health HTTP/1.1"),
    "a query": line(b"GET /health?a=b&c=%00%0d%0a HTTP/1.1"),
    "an empty query": line(b"GET /health? HTTP/1.1"),
    "an absolute form": line(b"GET http://x/health HTTP/1.1"),
    "an absolute form of another host": line(b"GET http://other:81/health?q HTTP/1.1"),
    "an absolute form in capitals": line(b"GET HTTP://X/health HTTP/1.1"),
    "an absolute form with TLS": line(b"GET https://x/health HTTP/1.1"),
    "an empty Host": line(b"GET /health HTTP/1.1", b"host:"),
    "a Host with a port": line(b"GET /health HTTP/1.1", b"Host: x:80"),
    "a Host of IPv6": line(b"GET /health HTTP/1.1", b"HOST: [::1]:80"),
    "letters beyond ASCII in a value": line(b"GET /health HTTP/1.1", b"host: x", "x: größe".encode()),
    "an empty value": line(b"GET /health HTTP/1.1", b"host: x", b"x:"),
    "tabs in a value": line(b"GET /health HTTP/1.1", b"host: x", b"x:\ta\tb\t"),
    "an upgrade": line(b"GET /health HTTP/1.1", b"host: x", b"connection: upgrade", b"upgrade: websocket"),
}


@pytest.mark.parametrize("case", GOOD_LINES)
async def test_what_is_a_request_line_is_read(edge: Attacked, case: str) -> None:
    """And the connection goes on."""
    replies = await edge.reads(GOOD_LINES[case] * 2)
    assert [reply.status for reply in replies] == [200, 200]


async def test_http_1_0_is_answered_and_closed(edge: Attacked) -> None:
    """It needs no Host, gets no chunks, and keeps the connection only when it asks for that."""
    answers, _ = await edge.sees(b"GET /health HTTP/1.0\r\n\r\n" + LAST)
    assert answers.statuses == [200]
    answers, seen = await edge.sees(post(b"connection: keep-alive").replace(b"1.1", b"1.0", 1) + LAST)
    assert answers.statuses in ([200, 200], [200])
    assert [one.body for one in seen] == [passed(BODY)]
    if len(answers.answers) == 2:
        assert answers.answers[0].header("connection") == "keep-alive"


@pytest.mark.parametrize("target", [b"*", b"/v1/chat/completions", b"/health"])
async def test_options_lead_nowhere(edge: Attacked, target: bytes) -> None:
    """Of the server as a whole or of a route: answered here, never passed on."""
    answers, seen = await edge.sees(line(b"OPTIONS " + target + b" HTTP/1.1") + LAST)
    assert answers.statuses[0] in (200, 204, 404, 405)
    assert answers.statuses[1:] == [200]
    assert not seen


@pytest.mark.parametrize("method", [b"TRACE", b"PUT", b"DELETE", b"PATCH", b"get", b"BREW", b"M-SEARCH"])
async def test_other_methods_lead_nowhere(edge: Attacked, method: bytes) -> None:
    """404, 405 or 501 in the envelope; methods have case."""
    for target in (CHAT, b"/health", b"/v1/models"):
        answers, seen = await edge.sees(line(method + b" " + target + b" HTTP/1.1") + LAST)
        assert answers.answers[0].status in (404, 405, 501)
        assert answers.answers[0].error
        assert not seen


@pytest.mark.parametrize(
    "target",
    [
        b"/sleep", b"/v1/chat/completions/../../sleep", b"/v1/../sleep", b"/%2e%2e/sleep", b"/..%2fsleep",
        b"/v1/chat/completions%2f..%2f..%2f..%2fsleep", b"/v1/chat/completions/%2e%2e/%2e%2e/%2e%2e/sleep",
        b"/v1/chat/completions;/../../sleep", b"/v1/chat/completions%00", b"/v1/chat/completions%0d%0a",
        b"//sleep", b"///v1/chat/completions", b"/./v1/chat/completions", b"/v1/chat/completions/.",
        b"http://x/sleep", b"http://x//v1/chat/completions", b"http://x/v1/../sleep", b"http://x?/v1/models",
        b"/\\sleep", b"/v1\\chat\\completions", b"/%76%31/chat/completions", b"/v1/models/..%2f..%2fsleep",
        b"/v1/models/%2e%2e%2f%2e%2e%2fsleep", b"/v1/models/%00", b"/v1/models/%0d%0ax:%20y",
        b"/v1/models/%ff",
        b"/collective_rpc?x=/v1/chat/completions", b"/v1/load_lora_adapter", b"/metrics/../sleep",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", [b"POST", b"GET"])
async def test_no_path_leads_beyond_the_list(edge: Attacked, method: bytes, target: bytes) -> None:
    """However it is written: 400, 404 or 405, and no model server hears of it."""
    head = line(method + b" " + target + b" HTTP/1.1", b"host: x", b"content-length: 17")
    answers, seen = await edge.sees(head + BODY + LAST)
    assert answers.answers[0].status in (400, 404, 405)
    assert answers.answers[0].error
    assert not seen


async def test_an_absolute_form_is_relayed_by_its_path(edge: Attacked) -> None:
    """A server must take it (RFC 9112, 3.2.2); the model server gets the path alone."""
    replies = await edge.reads(post(path=b"http://x" + CHAT + b"?q=http://y/%0d%0a"), BODY)
    assert replies[0].status == 200
    assert edge.server.seen[-1].line == b"POST " + CHAT + b"?q=http://y/%0d%0a HTTP/1.1"


@pytest.mark.parametrize(
    "identity",
    [b"a\x00b", b"a\rx-evil: 1", b"a\nx-evil: 1", b"a\r\n x-evil: 1"],
    ids=["NUL", "CR", "LF", "fold"],
)
@pytest.mark.parametrize("name", [b"x-request-id", b"traceparent", b"x-tidegate-affinity", b"authorization"])
async def test_nothing_splits_a_header(edge: Attacked, name: bytes, identity: bytes) -> None:
    """CR, LF and NUL never get into a field that is passed on or echoed."""
    reply = await edge.refuses(post(name + b": " + identity), 400)
    assert reply.header("x-evil") is None


@pytest.mark.parametrize("kept", [b"a", b"A.b_c-9", b"x" * 128])
async def test_a_sane_request_id_is_kept(edge: Attacked, kept: bytes) -> None:
    """On answers, pages and errors alike, and the model server hears it."""
    field = b"x-request-id: " + kept
    replies = await edge.reads(
        post(field)
        + line(b"GET /health HTTP/1.1", b"host: x", field)
        + line(b"GET /no HTTP/1.1", b"host: x", field),
        BODY,
    )
    assert [reply.status for reply in replies] == [200, 200, 404]
    assert [reply.header("x-request-id") for reply in replies] == [kept.decode()] * 3
    assert edge.server.seen[-1].header(b"x-request-id") == kept
    reply = await edge.refuses(post(field, b"expect: the worst"), 417)
    assert reply.header("x-request-id") == kept.decode()


async def test_who_sends_nothing_is_closed_without_a_word(edge: Attacked) -> None:
    """Before the first request and between two: that is no error."""
    silent_one, kept = await edge.wire(), await edge.wire()
    await kept.say(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await kept.answer()).status == 200
    for wire in (silent_one, kept):
        talk = await wire.rest()
        assert (talk.answers, talk.reset) == ([], False)
