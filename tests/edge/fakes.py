"""Small, honest peers of an edge under test, on real sockets: control plane, model servers, clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import yaml

from tests.support.gateway import GUARD
from tests.support.until import until
from tidegate.admission.v1 import admission_pb2 as ad
from tidegate.admission.v1 import admission_pb2_grpc
from tidegate.lifecycle.v1 import lifecycle_pb2 as lc
from tidegate.lifecycle.v1 import lifecycle_pb2_grpc

QUEUE = ad.QueueState(waiting=1, active=2, max_concurrent=3, max_queue=4)


class Admission(admission_pb2_grpc.AdmissionServiceServicer):
    """Grants every ticket at once on `address`, unless told otherwise; keeps what it was told."""

    def __init__(self) -> None:
        self.address = ""
        self.holding = False
        """Tickets wait until `grant` is called."""
        self.refusal: ad.Refusal | None = None
        self.queue = QUEUE
        self.rates: ad.RateState | None = None
        """What is left of the tenant's rates, told with each grant."""
        self.acquired: list[ad.Acquire] = []
        self.done: dict[int, ad.Done] = {}
        self.moves: list[ad.Move] = []
        self.twice = 0
        """Tickets that were ended more than once."""
        self.goodbyes = 0
        self._out: asyncio.Queue[ad.Answer] = asyncio.Queue()
        self.stop_server: Callable[[], Awaitable[None]]

    async def Session(
        self, requests: AsyncIterator[ad.SessionRequest], context: Any
    ) -> AsyncIterator[ad.SessionResponse]:
        self._out = asyncio.Queue()
        self.say(ad.Answer(welcome=ad.Welcome(incarnation=1, lease_ttl_ms=6000)))
        reader = asyncio.create_task(self._read(requests))
        seq = 0
        try:
            while True:
                answers = [await self._out.get()]
                while not self._out.empty():
                    answers.append(self._out.get_nowait())
                seq += 1
                yield ad.SessionResponse(seq=seq, answers=answers)
        finally:
            reader.cancel()

    async def _read(self, requests: AsyncIterator[ad.SessionRequest]) -> None:
        async for request in requests:
            for operation in request.operations.operations:
                self._take(operation)
            if request.HasField("heartbeat"):
                self.say(ad.Answer(heartbeat_ack=ad.HeartbeatAck(number=request.heartbeat.number)))
            self.goodbyes += request.HasField("goodbye")

    def _take(self, operation: ad.Operation) -> None:
        kind = operation.WhichOneof("verb")
        if kind == "acquire":
            self.acquired.append(operation.acquire)
            if self.refusal is not None:
                refusal = ad.Refusal()
                refusal.CopyFrom(self.refusal)
                refusal.n = operation.acquire.n
                self.say(ad.Answer(refusal=refusal))
            elif not self.holding:
                self.grant(operation.acquire.n)
        elif kind == "done":
            if operation.done.outcome == ad.OUTCOME_UNUSED:  # the grant crossed the end on its way
                self.done.setdefault(operation.done.n, operation.done)
                return
            self.twice += operation.done.n in self.done
            self.done[operation.done.n] = operation.done
        else:
            self.moves.append(operation.move)
            if not self.holding:
                self.grant(operation.move.n, operation.move.moves)

    def say(self, answer: ad.Answer) -> None:
        self._out.put_nowait(answer)

    def grant(self, n: int, moves: int = 0, instance: str = "node/m/1") -> None:
        grant = ad.Grant(n=n, moves=moves, instance_id=instance, address=self.address, queue=self.queue)
        if self.rates is not None:
            grant.rates.CopyFrom(self.rates)
        self.say(ad.Answer(grant=grant))

    def lose(self, n: int, reason: ad.Reason.ValueType) -> None:
        self.say(ad.Answer(lost=ad.Lost(n=n, reason=reason)))

    def progress(
        self, position: int, ready_in: float = 0.0, loading: bool = False, rate: float = 0.25
    ) -> None:
        told = ad.Progress(model="small", bands=[ad.BAND_NORMAL], position=position, step=2, loading=loading)
        told.drain_rate, told.ready_in_ms = rate, int(ready_in * 1000)
        self.say(ad.Answer(progress=told))

    async def GetQueues(self, request: Any, context: Any) -> ad.GetQueuesResponse:
        entry = ad.ModelQueue(model="small", queue=QUEUE)
        return ad.GetQueuesResponse(queues=ad.Queues(incarnation=2**63, models=[entry], version="9"))

    async def outcome(self, n: int | None = None) -> str:
        """How a ticket (by default the first) ended, once it has."""
        wanted = n or (await until(lambda: self.acquired, "a ticket"))[0].n
        done = await until(lambda: self.done.get(wanted), f"the end of ticket {wanted}")
        return ad.Outcome.Name(done.outcome).removeprefix("OUTCOME_")


class Lifecycle(lifecycle_pb2_grpc.LifecycleServiceServicer):
    """A catalogue of three models."""

    async def WatchCatalog(self, request: Any, context: Any) -> AsyncIterator[lc.WatchCatalogResponse]:
        models = [
            lc.CatalogModel(
                name="small", aliases=["gpt-small"], upstream_model="inner/small", state=lc.MODEL_STATE_READY
            ),
            lc.CatalogModel(name="org/Plain-7B", state=lc.MODEL_STATE_STOPPED),
            lc.CatalogModel(name="warm", request_defaults_json='{"temperature": 0.5, "top_k": 7}'),
        ]
        yield lc.WatchCatalogResponse(generation=lc.Generation(incarnation=3, n=4), models=models)
        await asyncio.Event().wait()

    async def GetStatus(self, request: Any, context: Any) -> lc.GetStatusResponse:
        model = lc.ModelStatus(model="small", state=lc.MODEL_STATE_READY, load_time_ms=1234)
        return lc.GetStatusResponse(version="8", settled=True, models=[model])


@contextlib.asynccontextmanager
async def control(
    kinds: tuple[Any, Any] = (Admission, Lifecycle),
) -> AsyncIterator[tuple[Any, Any, str]]:
    """Both services on one port."""
    # The contract's other methods answer UNIMPLEMENTED, as the generated base classes do.
    admission, lifecycle = kinds[0](), kinds[1]()
    server = grpc.aio.server()
    admission_pb2_grpc.add_AdmissionServiceServicer_to_server(admission, server)
    lifecycle_pb2_grpc.add_LifecycleServiceServicer_to_server(lifecycle, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    admission.stop_server = lambda: server.stop(0)
    try:
        yield admission, lifecycle, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


class Connection:
    """A model server's side of one connection, in the hands of a script."""

    def __init__(
        self, server: ModelServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._server = server
        self.reader, self.writer = reader, writer
        self.number = len(server.connections)
        server.connections.append(self)
        self.closed = asyncio.Event()

    async def request(self) -> Seen | None:
        """The next request; None when the client closes."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            self.closed.set()
            return None
        line, *fields = head[:-4].split(b"\r\n")
        headers = [(name, value.strip()) for name, _, value in (field.partition(b":") for field in fields)]
        length = next((int(value) for name, value in headers if name.lower() == b"content-length"), 0)
        seen = Seen(line, headers, await self.reader.readexactly(length))
        self._server.seen.append(seen)
        return seen

    async def say(self, data: bytes) -> None:
        if self.writer.transport.is_closing():
            return
        self.writer.write(data)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def answer(self, body: bytes, status: str = "200 OK", kind: str = "application/json") -> None:
        await self.say(
            f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )

    async def begin_events(self) -> None:
        await self.say(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )

    async def chunk(self, data: bytes) -> None:
        await self.say(b"%x\r\n%s\r\n" % (len(data), data))

    async def gone(self) -> None:
        """Waits until the client has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass
        self.closed.set()

    def abort(self) -> None:
        self.writer.transport.abort()


class Seen:
    """A request as a model server saw it."""

    def __init__(self, line: bytes, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        self.line, self.headers, self.body = line, headers, body

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key.lower() == name), None)


Script = Callable[[Connection], Awaitable[None]]


class ModelServer:
    """A raw socket server that does with each connection what its script says."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.connections: list[Connection] = []
        self.seen: list[Seen] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            await self.script(Connection(self, reader, writer))
        finally:
            self.tasks.discard(task)
            writer.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[ModelServer]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            for task in list(self.tasks):
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)


def echo(body: bytes = b'{"id":"x","usage":{"prompt_tokens":3,"completion_tokens":4}}') -> Script:
    """Answers every request of a connection with the same JSON."""

    async def script(connection: Connection) -> None:
        while await connection.request():
            await connection.answer(body)

    return script


class EdgeProcess:
    """A real edge: its own process, port and configuration."""

    def __init__(self, folder: Path, address: str, **edge: Any) -> None:
        self.path = folder / "tidegate.yaml"
        self.log_path = folder / "edge.log"
        settings = {
            "listen": "127.0.0.1:0",
            "admission_address": address,
            "lifecycle_address": address,
            **edge,
        }
        telemetry = settings.pop("telemetry", {"log_format": "json"})
        self.path.write_text(yaml.safe_dump({"edge": settings, "telemetry": telemetry}))
        self.port = 0
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, ready: bool = True) -> EdgeProcess:
        with self.log_path.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tidegate_edge", "--config", str(self.path),
                stdout=out, stderr=out, env=os.environ | {"PYTHONPATH": str(GUARD)},
            )  # fmt: skip
        await until(lambda: self._listening() or self._ended(), "the edge listens", 60)
        assert self.port, f"the edge did not start:\n{self.log()}"
        if ready:
            await self.readiness(200)
        return self

    async def readiness(self, status: int) -> None:
        """Waits until /ready answers with `status`."""

        async def so() -> bool:
            return (await ask(self.port, "GET", "/ready")).status == status

        await until(so, f"/ready is {status}")

    def _ended(self) -> bool:
        return self.process is not None and self.process.returncode is not None

    def _listening(self) -> bool:
        for line in self.lines():
            text = str(line.get("event", ""))
            if text.startswith(("listening on http://", "listening on https://")):
                self.port = int(text.rsplit(":", 1)[1])
        return bool(self.port)

    def log(self) -> str:
        return self.log_path.read_text()

    def lines(self) -> Iterator[dict[str, Any]]:
        for line in self.log().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)

    async def access(self, count: int = 1) -> list[dict[str, Any]]:
        """The access lines, once there are `count` of them."""

        def lines() -> list[dict[str, Any]]:
            found = [line for line in self.lines() if line.get("event") == "request"]
            return found if len(found) >= count else []

        found: list[dict[str, Any]] = await until(lines, f"{count} access lines")
        return found

    async def kill(self) -> None:
        """Ends it at once; a test that looks at stopping does it itself."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def ended(self) -> int:
        assert self.process is not None
        try:
            return await asyncio.wait_for(self.process.wait(), 10)
        except TimeoutError:
            self.process.kill()
            raise


class Answer:
    """A response as a client saw it."""

    def __init__(self, head: bytes) -> None:
        line, *fields = head[:-4].split(b"\r\n")
        self.status = int(line.split()[1])
        self.fields = [
            (name.lower().decode(), value.strip().decode())
            for name, _, value in (f.partition(b":") for f in fields)
        ]
        self.body = b""
        self.complete = False

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.fields if key == name), None)

    @property
    def error(self) -> dict[str, Any]:
        inner: dict[str, Any] = json.loads(self.body)["error"]
        return inner


class Client:
    """One connection of a client, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, port: int, tls: ssl.SSLContext | None = None) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=tls))

    async def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        fields = {"host": "gateway", **{name.replace("_", "-"): value for name, value in headers.items()}}
        if body or method == "POST":
            fields.setdefault("content-length", str(len(body)))
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        await self.writer.drain()

    async def head(self) -> Answer:
        return Answer(await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 15))

    async def piece(self) -> bytes:
        """The next chunk of a chunked body; empty at its proper end."""
        size = int(await asyncio.wait_for(self.reader.readuntil(b"\r\n"), 15), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def whole(self) -> Answer:
        """A response with its body; `complete` is False when it was cut."""
        answer = await self.head()
        try:
            if answer.header("transfer-encoding") == "chunked":
                while piece := await self.piece():
                    answer.body += piece
            else:
                length = int(answer.header("content-length") or 0) if answer.status != 304 else 0
                while len(answer.body) < length:
                    piece = await asyncio.wait_for(self.reader.read(length - len(answer.body)), 15)
                    if not piece:
                        return answer
                    answer.body += piece
        except (asyncio.IncompleteReadError, ConnectionError):
            return answer
        answer.complete = True
        return answer

    def leave(self) -> None:
        self.writer.close()


async def ask(
    port: int, method: str, path: str, body: bytes | dict[str, Any] = b"", **headers: str
) -> Answer:
    """One request on a connection of its own."""
    client = await Client.to(port)
    try:
        raw = json.dumps(body).encode() if isinstance(body, dict) else body
        await client.send(method, path, raw, **headers)
        return await (client.head() if method == "HEAD" else client.whole())
    finally:
        client.leave()
