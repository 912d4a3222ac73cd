"""The relay's client beside aiohttp's: the same bytes are the same answers, but for what is written here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp
from hypothesis import given, settings

from tests.edge.answers import Outcome, corpus, valid
from tests.edge.fakes import Connection, ModelServer
from tests.support.depth import examples
from tidegate_edge.upstream import Broken, ConnectFailed, Upstream

STRICTER = {
    "lines end with CRLF and nothing else (RFC 9112, 2.2: a lone LF may be taken for an end, or not)": (
        "bare-lf", "bare-lf-in-the-head", "bare-lf-at-the-end", "chunk-ended-by-bare-lf",
    ),
    "folded lines are refused (5.2: a proxy either refuses or rewrites them)": (
        "folded", "folded-first", "folded-length", "trailer-folded",
    ),
    "chunked is the only coding, once (6.1: nobody asked for another one)": (
        "coding-chunked-gzip", "coding-gzip-chunked", "coding-identity", "coding-twice", "coding-unknown",
        "coding-with-a-tab",
    ),
    "no spaces in names and sizes (5.1, 7.1)": ("space-before-the-colon", "chunk-size-with-a-space"),
    "no control characters in values (5.5)": ("control-in-a-value",),
    "HTTP/1.0 and 1.1 alone": ("http-0.9", "http-2", "rtsp"),
    "a status has a meaning (RFC 9110, 15: 100 to 599)": ("status-0", "status-99", "status-600"),
    "nobody asked for another protocol": ("switching", "switching-without-a-word"),
}  # fmt: skip
"""What aiohttp takes for an answer, and the relay doesn't; why."""
MILDER = {
    "an answer that is whole stands; the connection that goes on speaking is closed": (
        "chunks-and-garbage-behind", "garbage-behind", "close-and-more", "no-content-in-chunks",
        "no-content-with-a-body", "not-modified-with-a-body",
    ),
    "fields are bounded by their size, not by their number": ("many-fields",),
}  # fmt: skip
"""What aiohttp refuses, and the relay passes on; why."""


@contextlib.asynccontextmanager
async def clients() -> AsyncIterator[tuple[list[bytes], Upstream, aiohttp.ClientSession, str]]:
    """Both, and a server that says what is in the list."""
    said = [b""]

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.say(said[0])
        with contextlib.suppress(OSError):
            connection.writer.write_eof()
            await connection.gone()

    timeout = aiohttp.ClientTimeout(total=10)
    async with ModelServer(script).running() as server:
        upstream = Upstream(5.0)
        try:
            async with aiohttp.ClientSession(auto_decompress=False, timeout=timeout) as session:
                yield said, upstream, session, server.url + "/v1/x"
        finally:
            await upstream.close()


async def ours(upstream: Upstream, url: str) -> Outcome:
    """What the relay's client makes of it."""
    body = b""
    try:
        reply = await upstream.open("POST", url, [], b"{}")
        while piece := await reply.read():
            body += piece
    except (Broken, ConnectFailed):
        return Outcome("broken")
    return Outcome("whole", reply.status, tuple(reply.headers), body)


async def theirs(session: aiohttp.ClientSession, url: str) -> Outcome:
    """What aiohttp makes of it."""
    try:
        async with session.post(url, data=b"{}", allow_redirects=False) as response:
            body = await response.read()
            headers = tuple((name.lower(), value) for name, value in response.raw_headers)
            return Outcome("whole", response.status, headers, body)
    except aiohttp.ClientError:
        return Outcome("broken")


async def test_both_clients_agree_but_for_what_is_listed() -> None:
    """Status, fields and body are the same; each difference has its reason above, and is still there."""
    stricter = {name for names in STRICTER.values() for name in names}
    milder = {name for names in MILDER.values() for name in names}
    found: dict[str, set[str]] = {"stricter": set(), "milder": set()}
    async with clients() as (said, upstream, session, url):
        for path, data in corpus().items():
            said[0], name = data, path.partition("/")[2]
            one, other = await ours(upstream, url), await theirs(session, url)
            if one.end == other.end:
                assert one == other, name
            else:
                found["stricter" if other.end == "whole" else "milder"].add(name)
    assert found == {"stricter": stricter, "milder": milder}


def test_both_clients_read_any_valid_answer_alike() -> None:
    """Answers made by RFC 9112, over sockets."""

    @settings(max_examples=examples(60), deadline=None)
    @given(valid())
    def compare(answer: tuple[bytes, Outcome]) -> None:
        said[0] = answer[0]
        one, other = runner.run(ours(upstream, url)), runner.run(theirs(session, url))
        assert one == other == answer[1]._replace(kept=False)

    with asyncio.Runner() as runner:
        around = clients()
        said, upstream, session, url = runner.run(around.__aenter__())
        compare()
        runner.run(around.__aexit__(None, None, None))
