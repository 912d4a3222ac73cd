"""An edge under attack, in front of a model server that remembers each request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.edge.fakes import Admission, Connection, EdgeProcess, ModelServer, Seen, control
from tests.edge.wire.kernel import silent
from tests.edge.wire.raw import LAST, MARK, Reply, Talk, Wire, talk
from tests.support.certificates import Authority
from tests.support.figures import resident
from tests.support.until import until

SETTINGS: dict[str, Any] = {"max_body": "1MiB", "auth": "none"}
FLOOD = b'"flood"'
"""In a request's body: the answer is a stream without end."""
GROWTH = 50.0
"""MiB by which attacks may make the edge grow."""


@dataclass
class Attacked:
    """An edge and what is around it."""

    admission: Admission
    server: ModelServer
    edge: EdgeProcess
    busy: set[int] = field(default_factory=set)
    """Connections on which the model server has a request."""
    flooding: set[int] = field(default_factory=set)
    """Connections with a stream without end."""
    most: int = 0
    """How many of them at one time, at most."""

    tls: ssl.SSLContext | None = None
    """What its clients trust; None = it speaks plain HTTP."""
    stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)

    async def wire(self) -> Wire:
        """A connection that is closed at the module's end at the latest."""
        wire = await Wire.to(self.port, self.tls)
        self.stack.push_async_callback(wire.closed)
        return wire

    def silent(self) -> socket.socket:
        """A connection that nothing reads, closed at the module's end at the latest."""
        sock = silent(self.port)
        self.stack.callback(sock.close)
        return sock

    @property
    def port(self) -> int:
        return self.edge.port

    @property
    def pid(self) -> int:
        assert self.edge.process is not None
        return self.edge.process.pid

    def memory(self) -> float:
        """The edge's resident memory in MiB."""
        return resident(self.pid)

    async def serve(self, connection: Connection) -> None:
        """Answers each request with its own body."""
        while (seen := await connection.request()) is not None:
            self.busy.add(connection.number)
            self.most = max(self.most, len(self.busy))
            await asyncio.sleep(0)  # another one that were sent at the same time would be seen
            self.busy.discard(connection.number)
            if FLOOD in seen.body:
                await self._flood(connection)
            else:
                await connection.answer(seen.body or b"{}")

    async def _flood(self, connection: Connection) -> None:
        """A stream without end, as fast as it is taken."""
        self.flooding.add(connection.number)
        await connection.begin_events()
        while not connection.writer.transport.is_closing():
            await connection.chunk(b"data: " + b"x" * 65536 + b"\n\n")
            await asyncio.sleep(0)
        self.flooding.discard(connection.number)

    async def sees(self, data: bytes, cuts: Sequence[int] = ()) -> tuple[Talk, list[Seen]]:
        """What comes back for these bytes, cut at these places, and what the model server sees of them."""
        before = len(self.server.seen)
        places = [0, *cuts, len(data)]
        pieces = [data[begin:end] for begin, end in itertools.pairwise(places)]
        answers = await talk(self.port, pieces, self.tls)
        seen = self.server.seen[before:]
        assert not any(
            MARK in one.line or one.body.startswith(b'{"model":"inner/small","x":"' + MARK) for one in seen
        )
        return answers, seen

    async def refuses(self, data: bytes, *statuses: int, whole: bool = True) -> Reply:
        """These bytes are answered with one error and a close, however they are cut, and lead nowhere.

        `whole`: also byte by byte."""
        cuts: list[Sequence[int]] = [(), (len(data),)]
        if whole:
            cuts.append(range(1, len(data) + len(LAST)))
        for cut in cuts:
            answers, seen = await self.sees(data + LAST, cut)
            assert len(answers.answers) == 1, answers
            assert not answers.reset, answers
            reply = answers.answers[0]
            assert reply.status in statuses, (reply, statuses)
            assert reply.error["type"], reply
            assert reply.header("connection") == "close", reply
            assert not seen
        return reply

    async def reads(self, data: bytes, *bodies: bytes, whole: bool = True) -> list[Reply]:
        """These bytes are requests whose bodies the model server sees, one after the other, and the
        connection goes on; however they are cut."""
        for cut in [(), range(1, len(data) + len(LAST))] if whole else [()]:
            answers, seen = await self.sees(data + LAST, cut)
            assert [one.body for one in seen] == [passed(body) for body in bodies], answers
            assert answers.statuses[-1] == 200, answers
            assert answers.answers[-1].body == b'{"status":"ok"}', answers
            assert not answers.reset, answers
        return answers.answers[:-1]

    async def ready(self) -> bool:
        """Requests can be served."""
        answers, _ = await self.sees(LAST.replace(b"/health", b"/ready"))
        return answers.statuses == [200]

    async def serves(self) -> None:
        """Others are served."""
        answers, seen = await self.sees(post_and_close())
        assert answers.statuses == [200], answers
        assert len(seen) == 1


def passed(body: bytes) -> bytes:
    """A body as the model server gets it: its name for the model is another one."""
    return body.replace(b'"model":"small"', b'"model":"inner/small"')


def post_and_close() -> bytes:
    """A chat request on a connection of its own."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 17\r\nconnection: close\r\n\r\n"
        b'{"model":"small"}'
    )


@contextlib.asynccontextmanager
async def attacked(folder: Path, tls: bool = False, **settings: Any) -> AsyncIterator[Attacked]:
    """An edge with these settings beside SETTINGS; nothing may be left of any request when it ends."""
    authority = Authority(folder / "tls")
    authority.issue()
    if tls:
        settings["tls"] = authority.server()
    async with contextlib.AsyncExitStack() as stack:
        admission, _, address = await stack.enter_async_context(control())
        server = ModelServer(_nobody)
        edge = EdgeProcess(folder, address, **(SETTINGS | settings))
        one = Attacked(admission, server, edge, tls=authority.client() if tls else None)
        server.script = one.serve
        await stack.enter_async_context(server.running())
        admission.address = server.url
        stack.push_async_callback(edge.kill)
        await edge.start(ready=not tls)
        await until(one.ready, "it is ready")
        async with one.stack:
            yield one
        assert not [line for line in edge.lines() if "exception" in line]
        assert edge.process is not None
        assert edge.process.returncode in (None, 0), edge.log()[-2000:]
        assert not admission.twice


async def _nobody(_: Connection) -> None:
    raise AssertionError("the script is set before it listens")
