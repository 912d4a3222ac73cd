"""The gRPC in memory behaves as grpc.aio does where the services' shells notice: questions put to both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from tests.support.memory import Network, installed
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc
from tidegate_admission.ticket import Reason
from tidegate_admission.unary import refused
from tidegate_chassis import rpc

Stub = Any
Handler = Callable[[AsyncIterator[pb.SessionRequest]], AsyncIterator[pb.SessionResponse]]


class Servicer(pb_grpc.AdmissionServiceServicer):
    """A session as the test plays it; remembers how its handler ended."""

    def __init__(self, play: Handler) -> None:
        self.play = play
        self.ends: list[str] = []
        self.ended = asyncio.Event()

    async def Session(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.SessionResponse]:
        try:
            async for response in self.play(request_iterator):
                yield response
            self.ends.append("returned")
        except BaseException as error:
            self.ends.append(type(error).__name__)
            raise
        finally:
            self.ended.set()

    async def Acquire(self, request: pb.AcquireRequest, context: Any) -> pb.AcquireResponse:
        if request.request_id == "wait":
            await asyncio.Event().wait()
        if request.request_id == "refuse":
            raise refused(Reason.QUEUE_FULL, "full", 2.0)
        return pb.AcquireResponse(lease_id=str(context.time_remaining() is not None))


def servicing(play: Handler) -> Servicer:
    """A servicer that plays."""
    return Servicer(play)  # type: ignore[abstract]  # the rest isn't asked


@pytest.fixture(params=["memory", "grpc.aio"])
async def serve(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[Stub]]]:
    """`await serve(servicer)` gives a stub."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(servicer: Servicer) -> Stub:
            if request.param == "memory":
                stack.enter_context(installed(Network(room=64)))
            server = rpc.Server(f"unix:{tmp_path}/s", "listen", [])
            pb_grpc.add_AdmissionServiceServicer_to_server(servicer, server.server)
            await server.start()
            stack.push_async_callback(server.stop, 0.0)
            channel = await stack.enter_async_context(rpc.channel(f"unix:{tmp_path}/s"))
            return pb_grpc.AdmissionServiceStub(channel)

        yield start


def request(n: int) -> pb.SessionRequest:
    """A message."""
    return pb.SessionRequest(heartbeat=pb.Heartbeat(number=n))


async def echo(requests: AsyncIterator[pb.SessionRequest]) -> AsyncIterator[pb.SessionResponse]:
    """Answers each with its number."""
    async for one in requests:
        yield pb.SessionResponse(seq=one.heartbeat.number)


async def outcome(awaited: Awaitable[Any]) -> str:
    """What comes of it, as a word."""
    try:
        async with asyncio.timeout(1):
            return str(await awaited)
    except aio.AioRpcError as error:
        return f"{error.code().name} {rpc.reason_of(error)}".strip()
    except BaseException as error:
        return type(error).__name__


async def test_messages_come_in_order_and_the_end_is_told(serve: Any) -> None:
    """A stream that is closed by its client ends well."""
    servicer = servicing(echo)
    call = (await serve(servicer)).Session(wait_for_ready=True)
    for n in range(20):
        await call.write(request(n + 1))
    await call.done_writing()
    assert [response.seq async for response in call] == list(range(1, 21))
    assert servicer.ends == ["returned"]
    assert await outcome(call.write(request(1))) == "InvalidStateError"


async def test_a_cancelled_call_raises_in_its_reader_and_in_its_handler(serve: Any) -> None:
    """Whoever reads gets CancelledError without its task being cancelled; the handler is cancelled."""
    servicer = servicing(echo)
    call = (await serve(servicer)).Session(wait_for_ready=True)
    await call.write(request(1))
    reader = asyncio.create_task(_read(call))
    await asyncio.wait_for(reader_ready(call), 5)
    call.cancel()
    assert await outcome(reader) == "CancelledError"
    assert reader.cancelling() == 0
    await asyncio.wait_for(servicer.ended.wait(), 5)
    assert servicer.ends[0] in ("CancelledError", "GeneratorExit", "returned")
    assert await outcome(call.write(request(2))) == "InvalidStateError"


async def _read(call: Any) -> int:
    return len([response async for response in call])


async def reader_ready(call: Any) -> None:
    """The first answer is on its way: enough turns for a reader to have begun."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_cancelled_reader_or_writer_cancels_its_call(serve: Any) -> None:
    """The task's end is the call's end."""
    servicer = servicing(echo)
    call = (await serve(servicer)).Session(wait_for_ready=True)
    await call.write(request(1))
    reader = asyncio.create_task(_read(call))
    await reader_ready(call)
    reader.cancel()
    assert await outcome(reader) == "CancelledError"
    await asyncio.wait_for(servicer.ended.wait(), 5)
    assert call.done()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (refused(Reason.SUPERSEDED, "words", 1.0), "ABORTED REASON_SUPERSEDED"),
        (OSError("x"), "INTERNAL"),
        (asyncio.CancelledError(), "TimeoutError"),
    ],
    ids=["refused", "error", "cancelled"],
)
async def test_a_handler_that_fails_ends_the_call(serve: Any, error: BaseException, told: str) -> None:
    """By its reason, or as INTERNAL; one that is cancelled on its own side says nothing: its client waits."""

    async def play(requests: AsyncIterator[pb.SessionRequest]) -> AsyncIterator[pb.SessionResponse]:
        yield pb.SessionResponse(seq=1)
        raise error

    call = (await serve(servicing(play))).Session(wait_for_ready=True)
    assert await outcome(_read(call)) == told


async def test_a_unary_call_ends_by_answer_refusal_deadline_and_cancel(serve: Any) -> None:
    """As in the services' own tests."""
    stub = await serve(servicing(echo))
    ask = pb.AcquireRequest
    assert (await stub.Acquire(ask(), timeout=5)).lease_id == "True"
    assert (
        await outcome(stub.Acquire(ask(request_id="refuse"), timeout=5))
        == "RESOURCE_EXHAUSTED REASON_QUEUE_FULL"
    )
    assert await outcome(stub.Acquire(ask(request_id="wait"), timeout=0.05)) == "DEADLINE_EXCEEDED"
    waiting = asyncio.create_task(outcome(stub.Acquire(ask(request_id="wait"), timeout=5)))
    await asyncio.sleep(0)
    waiting.cancel()
    assert await outcome(waiting) == "CancelledError"
