"""The links between the processes: gRPC calls whose messages travel through queues with delays.

A call is a connection of its own. Within it nothing overtakes; it can be cut so that both ends see it or only
one does (half-open: the other end's messages vanish, until its keepalive or the healed link tells it).
"""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc import status_pb2
from grpc import aio

from tests.simulation.process import Process
from tidegate_chassis import rpc
from tidegate_chassis.errors import Refused

if TYPE_CHECKING:
    from tests.simulation.world import World

KEEPALIVE = (2.0, 14.0)
"""Seconds after which an end that wasn't told notices by its pings that a connection is dead."""


class Network:
    """All links. The processes find each other by name."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.processes: dict[str, Process] = {}
        self.down: set[frozenset[str]] = set()
        """Pairs of names between which nothing gets through."""
        self.slow: set[frozenset[str]] = set()
        """Pairs whose messages take up to half a second."""
        self.calls: set[Call] = set()

    def reachable(self, call: Call) -> Process | None:
        """The process that a call wants, if it listens and the link is up."""
        server = self.processes.get(call.target)
        if server is None or not server.alive or call.method not in server.methods:
            return None
        return None if call.pair in self.down else server

    def delay(self, pair: frozenset[str]) -> float:
        """Seconds that a message takes."""
        dice = self.world.random
        return dice.uniform(0.01, 0.5) if pair in self.slow else dice.uniform(0.0002, 0.005)

    def connect(self, call: Call) -> None:
        """Opens a call as soon as its server can be reached: tried again with gRPC's own back-off."""
        if not call.client.alive or call.over:
            return
        if self.reachable(call) is None:
            pause = self.world.random.uniform(0.1, 1.0)
            self.world.at(self.world.now + pause, functools.partial(self.connect, call))
            return
        self.world.at(self.world.now + self.delay(call.pair), functools.partial(self._establish, call))

    def _establish(self, call: Call) -> None:
        server = self.reachable(call)
        if server is None or not call.client.alive or call.over:
            self.connect(call)
            return
        self.calls.add(call)
        call.server = server
        server.post(call.serve)
        call.client.post(call.opened)

    def between(self, one: str, other: str) -> list[Call]:
        """The open calls between two processes."""
        pair = frozenset((one, other))
        return sorted((call for call in self.calls if call.pair == pair), key=lambda call: call.number)

    def cut(self, one: str, other: str, told: tuple[str, ...]) -> None:
        """Cuts the open calls; only the processes in `told` see it now."""
        for call in self.between(one, other):
            call.cut(told)

    def heal(self, one: str, other: str) -> None:
        """The link works again: an end that still believes in an old connection is told by a reset."""
        pair = frozenset((one, other))
        self.down.discard(pair)
        self.slow.discard(pair)
        for call in self.between(one, other):
            if call.broken:
                call.tell()

    def left(self, process: Process) -> None:
        """A process is dead: its peers are told by the kernel, unless the link is down."""
        for call in sorted(self.calls, key=lambda call: call.number):
            if process in (call.client, call.server):
                call.cut(() if call.pair in self.down else (call.client.name, call.target))


class Channel:
    """What `rpc.channel` gives in a simulated process."""

    def __init__(self, network: Network, client: Process, target: str) -> None:
        self._open: Callable[..., Any] = functools.partial(Call, network, client, target)

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def channel_ready(self) -> None:
        """Its calls wait for the server themselves."""

    def stream_stream(
        self, method: str, request_serializer: Any, response_deserializer: Any, **_: object
    ) -> Callable[..., Call]:
        return lambda: self._open(method, request_serializer, response_deserializer)

    def unary_stream(
        self, method: str, request_serializer: Any, response_deserializer: Any, **_: object
    ) -> Callable[..., Call]:
        return lambda request: self._open(method, request_serializer, response_deserializer, request)

    def unary_unary(
        self, method: str, request_serializer: Any, response_deserializer: Any, **_: object
    ) -> None:
        """The simulated services make none of these calls."""

    stream_unary = unary_unary


class Call:
    """One call: the client's end, and the server's task on the other side."""

    def __init__(
        self, network: Network, client: Process, target: str, method: str, packed: Any, unpacked: Any,
        request: Any = None,
    ) -> None:  # fmt: skip
        self.network, self.client, self.target, self.method = network, client, target, method
        self.pair = frozenset((client.name, target))
        self.number = network.world.count()
        self.server: Process | None = None
        self.over = False
        """The client's end is closed."""
        self.broken = False
        """Nothing travels on it any more, whatever its ends believe."""
        self._packed, self._unpacked, self._request = packed, unpacked, request
        self._opened = asyncio.Event()
        self._answers: deque[Any] = deque()
        self._wake = asyncio.Event()
        self._error: BaseException | None = None
        self._up = self._down = 0.0
        self._inbox: asyncio.Queue[Any] | None = None
        self._task: asyncio.Task[None] | None = None
        network.connect(self)

    # The client's end.

    def opened(self) -> None:
        """It is connected."""
        self._opened.set()
        if self._request is not None:
            self._send(self._request)

    async def wait_for_connection(self) -> None:
        """Until messages can be sent."""
        await self._opened.wait()
        if self.over:
            raise asyncio.InvalidStateError("the call is over")

    async def write(self, message: Any) -> None:
        """Sends a message, when the call is connected."""
        await self.wait_for_connection()
        self._send(message)

    async def done_writing(self) -> None:
        """The server's iterator of requests ends."""
        self._travel_up(functools.partial(self._arrive, None))

    def cancel(self) -> bool:
        """Ends the call from the client's side."""
        if not self.over:
            self._close(asyncio.CancelledError())
            if self.server is not None and not self.broken:
                self._travel_up(self._end_serving)
        return True

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            while self._answers:
                yield self._unpacked(self._answers.popleft())
            if self.over:
                if self._error is not None:
                    raise self._error
                return
            self._wake.clear()
            await self._wake.wait()

    def _send(self, message: Any) -> None:
        self._travel_up(functools.partial(self._arrive, self._packed(message)))

    def _close(self, error: BaseException | None) -> None:
        if self.over:
            return
        self.over, self._error = True, error
        self._wake.set()
        self._opened.set()
        self._retire()

    def _answer(self, message: bytes) -> None:
        if not self.over:
            self._answers.append(message)
            self._wake.set()

    # On the way.

    def _travel_up(self, arrival: Callable[[], None]) -> None:
        world = self.network.world
        self._up = max(self._up, world.now + self.network.delay(self.pair))
        world.at(self._up, lambda: None if self.broken or not self.server else self.server.post(arrival))

    def _travel_down(self, arrival: Callable[..., None], *args: Any) -> None:
        world = self.network.world
        self._down = max(self._down, world.now + self.network.delay(self.pair))
        world.at(self._down, lambda: None if self.broken else self.client.post(arrival, *args))

    def cut(self, told: tuple[str, ...]) -> None:
        """Nothing travels any more. Who isn't told now notices later, by pings, or by the link that heals."""
        world = self.network.world
        self.broken = True
        ends = [(self.client.name, self._lost), (self.target, self._unserved)]
        for name, tell in ends:
            soon = name in told
            if soon or self.client.name not in world.edges or world.random.random() < 0.5:
                pause = self.network.delay(self.pair) if soon else world.random.uniform(*KEEPALIVE)
                world.at(world.now + pause, tell)

    def tell(self) -> None:
        """Both ends are told that it is broken."""
        self._lost()
        self._unserved()

    def _lost(self) -> None:
        if not self.over:
            self.client.post(self._close, _error(grpc.StatusCode.UNAVAILABLE, "the connection is lost"))

    def _unserved(self) -> None:
        if self.server is not None:
            self.server.post(self._end_serving)

    def _retire(self) -> None:
        if self.over and (self._task is None or self._task.done()):
            self.network.calls.discard(self)

    # The server's end.

    def serve(self) -> None:
        """Begins the handler's task. Runs on the server's loop."""
        assert self.server is not None
        self._inbox = asyncio.Queue()
        self._task = self.server.spawn(self._handle())

    def _arrive(self, message: bytes | None) -> None:
        if self._inbox is not None:
            self._inbox.put_nowait(message)

    def _end_serving(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
        self._retire()

    async def _handle(self) -> None:
        assert self.server is not None
        handler = self.server.methods[self.method]
        error: BaseException | None = None
        try:
            if handler.request_streaming:
                answers = handler.stream_stream(self._requests(handler), None)
            else:
                answers = handler.unary_stream(await anext(self._requests(handler)), None)
            try:
                async for answer in answers:
                    self._travel_down(self._answer, handler.response_serializer(answer))
            finally:
                await answers.aclose()
        except Refused as refused:
            error = _error(refused.code, refused.message, rpc.to_status(refused))
        self._travel_down(self._close, error)

    async def _requests(self, handler: Any) -> AsyncIterator[Any]:
        assert self._inbox is not None
        while (message := await self._inbox.get()) is not None:
            yield handler.request_deserializer(message)


class Server:
    """What the generated code registers a service's methods with."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The registered methods are the same ones."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Takes the methods in."""
        self._process.methods.update({f"/{service}/{name}": handler for name, handler in handlers.items()})


def _error(code: grpc.StatusCode, words: str, status: status_pb2.Status | None = None) -> aio.AioRpcError:
    trailing = aio.Metadata()
    if status is not None:
        trailing.add("grpc-status-details-bin", status.SerializeToString())
    return aio.AioRpcError(code, aio.Metadata(), trailing, words)
