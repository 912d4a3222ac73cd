"""The application in this process: a request can be ended at any step, and time limits can be short."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.edge.fakes import Admission, Connection, ModelServer, Script, control, echo
from tests.support.inside import Request
from tests.support.until import until
from tidegate.admission.v1 import admission_pb2 as ad
from tidegate_chassis.keyfile import KeyFile
from tidegate_edge.app import App
from tidegate_edge.catalog import Catalog
from tidegate_edge.guard import Guard
from tidegate_edge.intake import Body
from tidegate_edge.relay import Relay
from tidegate_edge.session import Session
from tidegate_edge.settings import EdgeSettings
from tidegate_edge.shared import Edge
from tidegate_edge.status import Status
from tidegate_edge.ticket import Ticket
from tidegate_edge.upstream import Upstream


@contextlib.asynccontextmanager
async def application(
    script: Script, **changed: Any
) -> AsyncIterator[tuple[App, Edge, Admission, ModelServer]]:
    async with control() as (admission, _, address), ModelServer(script).running() as server:
        admission.address = server.url
        settings = EdgeSettings().model_copy(update=changed)
        session, catalog, upstream = Session(address, 600), Catalog(address), Upstream(1.0)
        edge, status = Edge(settings, session, catalog, upstream), Status(address, address)
        guard = Guard(settings, Path("no keys"), KeyFile(exists=False))
        links = [asyncio.create_task(session.run()), asyncio.create_task(catalog.run())]
        try:
            await until(lambda: not edge.ready(), "the edge is ready")
            yield App(edge, status, guard), edge, admission, server
        finally:
            for link in links:
                link.cancel()
            await asyncio.wait(links)
            await upstream.close()


async def events(connection: Connection) -> None:
    """A stream of ten events per request."""
    while await connection.request():
        await connection.begin_events()
        for i in range(10):
            await connection.chunk(b"data: %d\n\n" % i)
            await asyncio.sleep(0)
        await connection.say(b"0\r\n\r\n")


@pytest.mark.parametrize("how", ["the client leaves", "the task is cancelled"])
@pytest.mark.parametrize("body", [b'{"model":"small"}', b'{"model":"small","stream":true}'])
async def test_nothing_leaks_at_whatever_step_a_request_ends(how: str, body: bytes) -> None:
    """Ended after each number of loop steps: every ticket ends exactly once and nothing is held on."""
    async with application(events) as (app, edge, admission, _):
        for steps in range(0, 800, 10):
            request = Request(app, body)
            for _ in range(steps):
                await asyncio.sleep(0)
            if how == "the client leaves":
                request.leave()
            else:
                request.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait_for(request.task, 5)
            assert len(edge.relays) == edge.spools.memory.total == 0, steps
            assert not edge.session.held | edge.session.waiting, steps
        await until(lambda: len(admission.done) >= len(admission.acquired), "every ticket has ended")
        assert admission.twice == 0


@pytest.fixture
def no_collector() -> Iterator[None]:
    """The garbage collector rests: what is free now was freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def silent(connection: Connection) -> None:
    """Takes a request and never answers."""
    await connection.request()
    await connection.gone()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("how", ["served", "streamed", "refused", "timed out", "the client leaves"])
async def test_a_request_that_has_ended_leaves_nothing_to_the_garbage_collector(how: str) -> None:
    """Otherwise bodies and tickets of thousands of refused requests stay in memory, counted by nobody."""
    script = {"streamed": events, "timed out": silent, "the client leaves": silent}.get(how, echo())
    async with application(script, response_timeout=0.2 if how == "timed out" else 60.0) as made:
        app, _, admission, server = made
        if how == "refused":
            admission.refusal = ad.Refusal(reason=ad.REASON_QUEUE_FULL, message="full", retry_after_ms=1000)
        for _ in range(3):
            request = Request(app, b'{"model":"small","stream":true}')
            if how == "the client leaves":
                await until(lambda: server.seen, "the model server has it")
                server.seen.clear()
                request.leave()
            await asyncio.wait_for(request.task, 5)
            del request
        await until(lambda: not left(), f"nothing is left: {left()}")


def left() -> list[str]:
    """What still exists of requests."""
    kinds = (Relay, Ticket, Body)
    return [type(one).__name__ for one in gc.get_objects() if type(one) in kinds]


@pytest.mark.usefixtures("no_collector")
async def test_a_body_is_held_no_longer_than_it_is_counted() -> None:
    """While the answer streams, the request's body is neither counted as buffered nor in memory."""
    go_on = asyncio.Event()

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.begin_events()
        await connection.chunk(b"data: 1\n\n")
        await go_on.wait()
        await connection.say(b"0\r\n\r\n")
        await connection.gone()

    body = b'{"model":"warm","padding":"%s"}' % (b"x" * 1000)
    before = sys.getrefcount(body)
    async with application(script) as (app, edge, _, _):
        request = Request(app, body)
        await until(lambda: len(request.sent) > 1, "the first chunk")
        assert edge.spools.memory.total == 0
        assert sys.getrefcount(body) == before
        go_on.set()
        await asyncio.wait_for(request.task, 5)


async def test_a_model_server_that_never_answers_is_a_504() -> None:
    """Nothing within response_timeout: 504, upstream closed, TIMEOUT told; never tried again."""

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.gone()

    async with application(script, response_timeout=0.2) as (app, _, admission, server):
        request = Request(app, b'{"model":"small"}')
        await request.task
        assert request.status == 504
        assert b'"upstream_timeout"' in request.said
        assert await admission.outcome() == "TIMEOUT"
        await asyncio.wait_for(server.connections[0].closed.wait(), 5)
        assert len(server.connections) == 1


async def test_a_stream_may_last_longer_than_every_limit() -> None:
    """Limits are for silences: what keeps coming, and is taken, goes on for as long as it likes."""
    limit = 0.25
    clock = asyncio.get_running_loop().time

    async def script(connection: Connection) -> None:
        await connection.request()
        await connection.begin_events()
        end = clock() + 4 * limit
        while clock() < end:
            await connection.chunk(b": still here\n\n")
            await asyncio.sleep(limit / 10)
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.say(b"0\r\n\r\n")

    limits = dict.fromkeys(("response_timeout", "stream_idle_timeout", "write_timeout"), limit)
    async with application(script, **limits) as (app, _, admission, _):
        request = Request(app, b'{"model":"small","stream":true}')
        await asyncio.wait_for(request.task, 10)
        assert request.said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert await admission.outcome() == "OK"


async def test_an_error_of_our_own_gives_the_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in the middle of a request is a 500 in the envelope, and the slot is free."""

    async def bug(*_: Any) -> None:
        raise LookupError("secret detail")

    async with application(echo()) as (app, edge, admission, _):
        monkeypatch.setattr("tidegate_edge.relay.Relay._pass_on", bug)
        request = Request(app, b'{"model":"small"}')
        await request.task
        assert request.status == 500
        assert b"secret" not in request.said
        assert admission.acquired
        await admission.outcome()
        assert len(edge.relays) == edge.spools.memory.total == 0


async def test_an_error_of_our_own_in_a_page_is_a_500(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the envelope, with its id, and without a word of what it was."""

    async def bug() -> None:
        raise LookupError("secret detail")

    async with application(echo()) as (app, *_):
        monkeypatch.setattr("tidegate_edge.operations.Operations.find", lambda *_: bug)
        request = Request(app, b"", "/gateway/models/small/load")
        await request.task
        assert request.status == 500
        assert b'"code":"internal_error"' in request.said
        assert b"x-request-id: " in request.said
        assert b"secret" not in request.said


async def test_a_failing_log_handler_costs_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens while a request is written down, its slot has been given back before."""

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    async with application(echo()) as (app, edge, admission, _):
        monkeypatch.setattr("tidegate_edge.record.Record.close", broken)
        with contextlib.suppress(OSError):
            await Request(app, b'{"model":"small"}').task
        assert await admission.outcome() == "OK"
        assert not edge.session.held
        assert len(edge.relays) == 0
