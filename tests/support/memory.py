"""gRPC in memory: a channel and a server for the generated stubs and servicers, on any asyncio loop.

It keeps what the services' shells meet in grpc.aio (`tests/proof/test_memory.py` puts the same questions to
both): messages are copied, arrive late and in order; a write waits while the peer takes nothing, and fails
once the call has ended; cancelling a task that reads or writes cancels its call; a cancelled call cancels the
handler's task and ends its requests, in either order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc import aio

from tidegate_chassis import rpc

EOF = object()
_OK = (grpc.StatusCode.OK, "", ())
_CUT = (grpc.StatusCode.UNAVAILABLE, "the connection broke", ())
_LEFT = (grpc.StatusCode.CANCELLED, "Locally cancelled by application!", ())

Status = tuple[grpc.StatusCode, str, Any]


class Closed(Exception):
    """Nobody reads any more."""


class Lane:
    """One direction of a call: messages in order, late, and only so many that weren't taken."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._coming: deque[Any] = deque()
        self._ready: deque[Any] = deque()
        self._latest = 0.0
        self._changed = asyncio.Event()
        self.closed = False
        self.stuck = False
        """What is sent vanishes: half a connection is dead, and nobody was told."""

    async def put(self, item: Any) -> None:
        """Sends; waits while there is no room. Raises Closed."""
        await asyncio.sleep(0)
        while len(self._coming) + len(self._ready) >= self._network.room and not self.closed:
            await self._change()
        if self.closed:
            raise Closed
        self.send(item)

    def send(self, item: Any) -> None:
        """Sends whether there is room or not."""
        if self.stuck or self.closed:
            return
        loop = asyncio.get_running_loop()
        self._coming.append(item)
        self._latest = max(self._latest, loop.time() + self._network.delay())
        loop.call_at(self._latest, self._arrive)

    def _arrive(self) -> None:
        if self._coming:
            item = self._coming.popleft()
            if callable(item):  # the call's status: it isn't read, it is known
                item()
            else:
                self._ready.append(item)
            self._wake()

    async def get(self) -> Any:
        """The next message; EOF at the end."""
        await asyncio.sleep(0)
        while not self._ready and not self.closed:
            await self._change()
        if not self._ready:
            return EOF
        item = self._ready.popleft() if self._ready[0] is not EOF else EOF
        self._wake()
        return item

    def close(self, drop: bool = True) -> None:
        """The end; what has arrived can still be read unless it is dropped."""
        self.closed = True
        self._coming.clear()
        if drop:
            self._ready.clear()
        self._wake()

    async def _change(self) -> None:
        changed = self._changed
        await changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Network:
    """Addresses, who serves there, and the calls that are under way."""

    def __init__(self, delay: Callable[[], float] = lambda: 0.0, room: int = 8) -> None:
        """`delay`: seconds that a message takes. `room`: messages of a call that may wait to be taken."""
        self.delay, self.room = delay, room
        self.linger = delay
        """Seconds after which a server notices that a call has ended."""
        self.servers: dict[str, Server] = {}
        self.calls: dict[Call, None] = {}
        self._started = asyncio.Event()

    def channel(self, address: str) -> Any:
        """Stands for `rpc.channel`."""
        return Channel(self, address)

    def server(self, listen: str, setting: str = "", services: Any = ()) -> Server:
        """Stands for `rpc.Server`."""
        return Server(self, listen)

    def cut(self, address: str, method: str = "") -> int:
        """Breaks all calls to an address (of one method only); how many."""
        found = [one for one in self.calls if one.address == address and one.method.endswith(method)]
        for one in found:
            one.end(_CUT)
        return len(found)

    def stick(self, address: str) -> None:
        """Half-opens all calls to an address: nothing arrives any more, and nobody is told."""
        for one in self.calls:
            if one.address == address:
                one.up.stuck = one.down.stuck = True

    def started(self) -> None:
        """A server has begun to listen."""
        self._started.set()
        self._started = asyncio.Event()

    async def reach(self, address: str) -> Server:
        """Waits until somebody listens."""
        while address not in self.servers:
            await self._started.wait()
        return self.servers[address]


class Channel:
    """As `grpc.aio.Channel`, as far as the generated stubs use it."""

    def __init__(self, network: Network, address: str) -> None:
        self.network, self.address = network, address
        self.calls: dict[Call, None] = {}

    def unary_unary(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        """One request, one response."""
        return lambda request, **options: UnaryCall(
            Call(self, method, request_serializer, response_deserializer, **options), request
        )

    def unary_stream(self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        """One request, many responses."""

        def start(request: Any, **options: Any) -> Call:
            call = Call(self, method, request_serializer, response_deserializer, **options)
            call.up.send(request_serializer(request))
            call.up.send(EOF)
            return call

        return start

    def stream_stream(
        self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any
    ) -> Any:
        """Many requests, many responses."""
        return lambda **options: Call(self, method, request_serializer, response_deserializer, **options)

    async def channel_ready(self) -> None:
        """Waits until somebody listens."""
        await self.network.reach(self.address)

    async def close(self, grace: float | None = None) -> None:
        """Cancels what is under way."""
        for call in list(self.calls):
            call.cancel()

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Call:
    """A call as its client sees it."""

    def __init__(
        self,
        channel: Channel,
        method: str,
        serialize: Any,
        deserialize: Any,
        timeout: float | None = None,
        metadata: Any = (),
        wait_for_ready: bool = False,
    ) -> None:
        self.address, self.method, self.metadata = channel.address, method, metadata
        self.up, self.down = Lane(channel.network), Lane(channel.network)
        self.status: Status | None = None
        self._channel, self._network = channel, channel.network
        self._serialize, self._deserialize = serialize, deserialize
        self._messages: AsyncIterator[Any] | None = None
        self._half_closed = False
        self._connected = asyncio.Event()
        self._handler: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self.deadline = None if timeout is None else loop.time() + timeout
        self._timer = None if timeout is None else loop.call_later(timeout, self.end, _too_late())
        self._network.calls[self] = channel.calls[self] = None
        self._dialling = asyncio.create_task(self._dial(wait_for_ready), name="grpc: dial")

    async def _dial(self, patient: bool) -> None:
        if not patient and self.address not in self._network.servers:
            self.end(_CUT)
            return
        server = await self._network.reach(self.address)
        if self.status is None:
            self._connected.set()
            self._handler = server.start_call(self)

    def end(self, status: Status) -> None:
        """The call is over for its client now, and for its server a little later."""
        if self.status is not None:
            return
        self.status = status
        if self._timer is not None:
            self._timer.cancel()
        self._network.calls.pop(self, None)
        self._channel.calls.pop(self, None)
        self._dialling.cancel()
        self.down.close(drop=status is _LEFT)
        asyncio.get_running_loop().call_later(self._network.linger(), self._end_handler)

    def _end_handler(self) -> None:
        self.up.close(drop=False)
        if self._handler is not None and not self._handler.done():
            asyncio.get_running_loop().call_soon(self._handler.cancel)

    def finish(self, status: Status) -> None:
        """The server's last word; the client knows it when it has arrived."""
        self.down.send(lambda: self.end(status))

    # --- what stubs give ---------------------------------------------------------------------------------

    def cancel(self) -> bool:
        """Ends it from the client's side."""
        if self.status is not None:
            return False
        self.end(_LEFT)
        return True

    def done(self) -> bool:
        """It has ended."""
        return self.status is not None

    def cancelled(self) -> bool:
        """It was ended by `cancel`."""
        return self.status is _LEFT

    def raise_for_status(self) -> None:
        """Raises what the end means."""
        if self.cancelled():
            raise asyncio.CancelledError
        assert self.status is not None
        code, words, trailing = self.status
        if code is not grpc.StatusCode.OK:
            raise aio.AioRpcError(code, aio.Metadata(), aio.Metadata(*trailing), words)

    async def wait_for_connection(self) -> None:
        """Until the server is reached; as in grpc.aio this goes on when the call ends before."""
        await self._connected.wait()
        if self.done():
            self.raise_for_status()

    async def write(self, request: Any) -> None:
        """Sends a request; waits as `wait_for_connection`."""
        if self.done() or self._half_closed:
            raise asyncio.InvalidStateError("RPC already finished")
        try:
            await self._connected.wait()
            await self.up.put(self._serialize(request))
        except Closed:
            self.raise_for_status()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self.done():
            self.raise_for_status()

    async def done_writing(self) -> None:
        """No more requests."""
        if not self.done() and not self._half_closed:
            self._half_closed = True
            await asyncio.sleep(0)
            self.up.send(EOF)

    async def read(self) -> Any:
        """The next response, or EOF."""
        try:
            message = await self.down.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return EOF if message is EOF else self._deserialize(message)

    def __aiter__(self) -> AsyncIterator[Any]:
        self._messages = self._messages or self._responses()
        return self._messages

    async def _responses(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not EOF:
            yield message
        self.raise_for_status()


def _too_late() -> Status:
    return (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", ())


class UnaryCall:
    """A unary call: awaited for its response."""

    def __init__(self, call: Call, request: Any) -> None:
        self._call = call
        call.up.send(call._serialize(request))
        call.up.send(EOF)
        self._response = asyncio.create_task(self._read(), name="grpc: unary call")

    async def _read(self) -> Any:
        message = await self._call.read()
        while not self._call.done():
            await self._call.read()
        self._call.raise_for_status()
        return message

    def cancel(self) -> bool:
        """Ends it."""
        return self._call.cancel()

    def __await__(self) -> Any:
        try:
            return (yield from self._response.__await__())
        except asyncio.CancelledError:
            self._call.cancel()
            raise


class Server:
    """Serves what generated code adds to it, behind the border of every service (`rpc.Server`)."""

    def __init__(self, network: Network, listen: str) -> None:
        self.listen, self.server, self._network = listen, self, network
        self._handlers: dict[str, Any] = {}
        self.tasks: dict[asyncio.Task[None], Call] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """What old stubs call."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """What new stubs call."""
        self._handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    async def start(self) -> str:
        """Listens."""
        self._network.servers[self.listen] = self
        self._network.started()
        return self.listen

    async def set_serving(self, serving: bool) -> None:
        """Health; nobody asks here."""

    async def stop(self, grace: float) -> None:
        """Takes no new calls, and ends running ones after `grace` seconds."""
        if self._network.servers.get(self.listen) is self:
            del self._network.servers[self.listen]
        if self.tasks:
            await asyncio.wait(list(self.tasks), timeout=grace)
        calls = list(self.tasks.values())
        for call in calls:
            call.end(_CUT)
        for task in self.tasks:
            task.cancel()
        if self.tasks:
            await asyncio.wait(list(self.tasks))

    def start_call(self, call: Call) -> asyncio.Task[None]:
        """A call has come."""
        task = asyncio.create_task(self._serve(call), name=f"grpc: {call.method.rpartition('/')[2]}")
        self.tasks[task] = call
        task.add_done_callback(self.tasks.pop)
        return task

    async def _serve(self, call: Call) -> None:
        try:
            await self._handle(call)
        except (asyncio.CancelledError, aio.AbortError, Closed):
            pass  # a handler that was cancelled on its own side says nothing: its client waits on
        except Exception as error:
            call.finish((grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}", ()))
        else:
            call.finish(_OK)

    async def _handle(self, call: Call) -> None:
        async def found(_: Any) -> Any:
            return self._handlers[call.method]

        details: Any = type("Details", (), {"method": call.method})
        handler = await rpc._Border().intercept_service(found, details)
        context = Context(call)
        requests = self._requests(call, handler)
        request = requests if handler.request_streaming else await anext(requests)
        if handler.response_streaming:
            method = handler.stream_stream or handler.unary_stream
            async for response in method(request, context):
                await call.down.put(handler.response_serializer(response))
        else:
            response = await handler.unary_unary(request, context)
            await call.down.put(handler.response_serializer(response))

    async def _requests(self, call: Call, handler: Any) -> AsyncIterator[Any]:
        while (message := await call.up.get()) is not EOF:
            yield handler.request_deserializer(message)


class Context:
    """As `aio.ServicerContext`, as far as services use it."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def peer(self) -> str:
        """Who calls."""
        return "memory"

    def invocation_metadata(self) -> Any:
        """What came with the call."""
        return self._call.metadata

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline."""
        deadline = self._call.deadline
        return None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())

    async def abort(self, code: grpc.StatusCode, words: str = "", trailing: Any = ()) -> None:
        """Ends the call with a status."""
        self._call.finish((code, words, trailing))
        raise aio.AbortError("Locally aborted.")

    async def abort_with_status(self, status: grpc.Status) -> None:
        """Ends the call with a rich status."""
        await self.abort(status.code, status.details, status.trailing_metadata)


@contextlib.contextmanager
def installed(network: Network) -> Any:
    """The services' own channels and servers go through this network meanwhile."""
    before = rpc.channel, rpc.Server
    rpc.channel, rpc.Server = network.channel, network.server  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        rpc.channel, rpc.Server = before  # type: ignore[misc]
