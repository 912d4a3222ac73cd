"""The ways of a request through edge and admission, each once, in a world that goes on afterwards."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from grpc import aio

from tests.edge.fakes import Connection
from tests.proof.actors import client, vanish
from tests.proof.world import ADMISSION, TTL, World
from tests.support import inside
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc
from tidegate_chassis import rpc

NOWHERE = "http://h:1"
"""Nobody listens there."""

Path = Callable[[World], Awaitable[None]]
PATHS: dict[str, Path] = {}


def path(walk: Path) -> Path:
    """Adds one to the list."""
    PATHS[walk.__name__] = walk
    return walk


class Request:
    """One request to the edge's application, and what it said."""

    def __init__(self, w: World, **body: Any) -> None:
        said = '{"model":"m"' + "".join(f',"{key}":{value}' for key, value in body.items()) + "}"
        self._world = w
        self._inside = inside.Request(w.app, said.encode()) if w.app else None

    def leave(self) -> None:
        """The client goes away."""
        if self._inside is not None:
            self._inside.leave()

    async def over(self) -> int:
        """Its end, whatever it is; the status, 0 when there is none."""
        if self._inside is None:
            return 0
        with contextlib.suppress(BaseException):
            await asyncio.wait([self._inside.task])
            self._inside.task.result()
        return self._inside.status

    async def heard(self, writes: int) -> None:
        """Waits for writes, or the end."""
        one = self._inside
        await self._world.until(lambda: not one or len(one.sent) >= writes or one.task.done(), "an answer")


async def script(connection: Connection) -> None:
    """The model server: does what the body says."""
    while (seen := await connection.request()) is not None:
        if b'"stream"' not in seen.body:
            if b'"silent"' in seen.body:
                await connection.gone()
                return
            await connection.answer(b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}')
            continue
        await connection.begin_events()
        for i in range(4):
            await connection.chunk(b"data: %d\n\n" % i)
            await asyncio.sleep(0.05)
            if i == 2 and b'"break"' in seen.body:
                connection.abort()
                return
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.say(b"0\r\n\r\n")


@path
async def plain(w: World) -> None:
    """A plain answer."""
    await Request(w).over()


@path
async def streamed(w: World) -> None:
    """A streamed answer."""
    await Request(w, stream="true").over()


@path
async def left_in_the_queue(w: World) -> None:
    """The client leaves while it waits, with comments coming."""
    holders = [client(w, w.edge.session, hold=0.4) for _ in range(2)]
    await asyncio.sleep(0.05)
    request = Request(w, stream="true")
    w.loop.call_later(0.3, request.leave)
    await request.over()
    await asyncio.wait(holders)


@path
async def commented(w: World) -> None:
    """It waits with comments, and is served."""
    holders = [client(w, w.edge.session, hold=0.25) for _ in range(2)]
    await asyncio.sleep(0.05)
    await Request(w, stream="true").over()
    await asyncio.wait(holders)


@path
async def left_before_the_first_byte(w: World) -> None:
    """The client leaves while the model server is silent."""
    request = Request(w, silent="1")
    w.loop.call_later(0.2, request.leave)
    await request.over()


@path
async def left_in_mid_stream(w: World) -> None:
    """The client leaves in the middle."""
    request = Request(w, stream="true")
    await request.heard(3)
    request.leave()
    await request.over()


@path
async def refused(w: World) -> None:
    """The queue is full."""
    others = [client(w, w.edge.session, hold=0.1) for _ in range(6)]
    await asyncio.sleep(0.05)
    await Request(w).over()
    await asyncio.wait(others)


@path
async def broken_off(w: World) -> None:
    """The model server breaks off."""
    await Request(w, **{"stream": "true", "break": "1"}).over()


@path
async def moved(w: World) -> None:
    """No connection to the first instance can be made."""
    holders = [client(w, w.edge.session, hold=0.5) for _ in range(2)]
    await asyncio.sleep(0.1)
    served = w.lifecycle.instances["i1"]
    w.lifecycle.say(i0=NOWHERE, i1=served)
    await asyncio.sleep(0.2)
    await Request(w).over()
    w.lifecycle.say(i1=served)
    await asyncio.wait(holders)


@path
async def reopened(w: World) -> None:
    """The session's stream breaks while one relays and one waits."""
    relayed = [Request(w, stream="true") for _ in range(3)]
    await relayed[0].heard(2)
    w.network.cut(ADMISSION, "Session")
    for request in relayed:
        await request.over()


@path
async def unary(w: World) -> None:
    """Acquire, with a wait and a repeat, Renew, Release."""
    stub = pb_grpc.AdmissionServiceStub(rpc.channel(ADMISSION))

    async def hold(request_id: str) -> None:
        request = pb.AcquireRequest(holder_id="h", request_id=request_id, model="m")
        with contextlib.suppress(aio.AioRpcError):
            lease = (await stub.Acquire(request, timeout=2.0)).lease_id
            await asyncio.sleep(0.1)
            renewal = pb.RenewRequest(holder_id="h", lease_id=lease, model="m", instance_id="i1")
            await stub.Renew(renewal, timeout=1.0)
            await stub.Release(pb.ReleaseRequest(holder_id="h", lease_id=lease), timeout=1.0)

    serial = w.loop.steps
    await asyncio.gather(*[hold(f"{serial} {name}") for name in "aabbc"])


@path
async def vanished(w: World) -> None:
    """A relay is gone without a word: the next heartbeat tells."""
    session = w.edge.session
    gone = asyncio.create_task(vanish(w, session))
    w.clients.append((session, gone))
    await asyncio.wait([gone])
    await asyncio.sleep(TTL)


@path
async def stopped(w: World) -> None:
    """The edge is told to stop while it relays: it says goodbye. Another one is started."""
    request = Request(w, stream="true")
    await request.heard(2)
    edge = w.edge
    w.stop_edge()
    await request.over()
    await w.until(lambda: w.edge is not edge, "another edge")


@path
async def idle(w: World) -> None:
    """Nothing but heartbeats, ticks and reports."""
    await asyncio.sleep(0.8)
