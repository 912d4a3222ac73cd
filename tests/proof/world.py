"""Edges and admission in one process, on a loop with virtual time: the services' own code from `serve` down.

What is not theirs is in memory: gRPC between them, TCP to model servers, lifecycle, and the HTTP server
before the edge. A service that ends by an error is started again, as `tidegate serve` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import random
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.support.memory import Call, Network, Server, installed
from tests.support.shuffle import ShuffleLoop
from tests.support.wires import Wires
from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate.lifecycle.v1 import lifecycle_pb2_grpc as pb_grpc
from tidegate_admission import __main__ as admission_main
from tidegate_admission import settings as admission_settings
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.holder import Holder
from tidegate_admission.ticket import LeaseEnd
from tidegate_admission.views import conservation_error
from tidegate_chassis import process
from tidegate_edge import __main__ as edge_main
from tidegate_edge import settings as edge_settings
from tidegate_edge.app import App
from tidegate_edge.relay import Relay
from tidegate_edge.session import Session
from tidegate_edge.shared import Edge
from tidegate_edge.ticket import Phase, Ticket

ADMISSION, LIFECYCLE = "unix:/a", "unix:/l"
TTL = 2.0
HANDLERS = (
    "hello", "acquire", "done", "move", "heartbeat", "statement", "goodbye", "supply", "demand", "tick",
    "settle",
)  # fmt: skip
"""The dispatcher's handlers that shells call."""
RESTART = 0.2
"""Seconds until a service that ended is started again."""


class Lifecycle(pb_grpc.LifecycleServiceServicer):
    """A catalogue, and instances as the test says."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.instances: dict[str, str] = {}
        """Address by instance."""
        self.generation = 1
        self.roster: list[str] | None = None
        self.restarted = False
        """Admission has been started again: instances are older than it."""
        self._changed = asyncio.Event()

    def say(self, **instances: str) -> None:
        """These instances of the model are ready, and no others."""
        self.instances = instances
        self.generation += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def Coordinate(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.CoordinateResponse]:
        """The link to admission."""
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while True:
                changed = self._changed
                yield pb.CoordinateResponse(supply=self._report())
                await changed.wait()
        finally:
            reader.cancel()

    async def WatchCatalog(self, request: Any, context: Any) -> AsyncIterator[pb.WatchCatalogResponse]:
        """One model, for ever."""
        entry = pb.CatalogModel(name="m", state=pb.MODEL_STATE_READY)
        yield pb.WatchCatalogResponse(generation=pb.Generation(incarnation=1, n=1), models=[entry])
        await asyncio.Event().wait()

    async def _read(self, requests: Any) -> None:
        async for request in requests:
            if request.demand.settled or request.demand.roster:
                self.roster = list(request.demand.roster)

    def _report(self) -> pb.SupplyReport:
        age = 10_000_000 if self.restarted else 0
        found = [
            pb.InstanceSupply(
                instance_id=name, address=address, state=pb.INSTANCE_STATE_READY, slots=self.slots, age_ms=age
            )
            for name, address in self.instances.items()
        ]
        return pb.SupplyReport(
            generation=pb.Generation(incarnation=1, n=self.generation),
            whole=True,
            settled=True,
            models=[
                pb.ModelSupply(
                    model="m",
                    state=pb.MODEL_STATE_READY,
                    instances=found,
                    max_concurrent=self.slots,
                    max_queue=4,
                )
            ],
            catalog_generation=pb.Generation(incarnation=1, n=1),
            roster=self.roster or [],
            roster_known=self.roster is not None,
        )


class _OtherServer(Server):
    """Lifecycle's: its calls are told apart from admission's by their coroutine."""

    async def _serve(self, call: Call) -> None:
        await super()._serve(call)


class _Front:
    """Stands for the edge's HTTP server."""

    def __init__(self, w: World, app: App) -> None:
        self._world, self._app = w, app

    async def start(self, listening: Any, certificates: Any) -> None:
        """Requests may come."""
        self._world.app = self._app

    async def stop(self, patience: float) -> None:
        """No more requests."""
        self._world.app = None


class World:
    """See the module. Made by `world`."""

    def __init__(self, loop: ShuffleLoop, network: Network, wires: Wires, slots: int) -> None:
        self.loop, self.network, self.wires = loop, network, wires
        self.dice = loop.dice
        self.lifecycle = Lifecycle(slots)  # type: ignore[abstract]  # the rest isn't asked
        self.dispatcher: Dispatcher
        """Admission's, of its present process."""
        self.deaths: list[BaseException | None] = []
        """What processes ended by."""
        self.sessions: list[Session] = []
        self.left_alone: set[Session] = set()
        """Those that said goodbye."""
        self.tickets: list[Ticket] = []
        self.clients: list[tuple[Session, asyncio.Task[Any]]] = []
        """Requests of bare sessions."""
        self.app: App | None = None
        """The edge's application, of its present process; None while there is none."""
        self.edge: Edge
        self._stop_edge: asyncio.Event
        self.on_call: Callable[[str], None] = _ignore
        """Called with the name of each of the dispatcher's handlers that is called."""
        self._processes: list[asyncio.Task[None]] = []
        self._admission_process: asyncio.Task[None] | None = None

    def now(self) -> float:
        """Virtual seconds."""
        return self.loop.time()

    async def start(self, **instances: str) -> None:
        """Lifecycle and admission; returns when admission knows the supply."""
        server = _OtherServer(self.network, LIFECYCLE)
        pb_grpc.add_LifecycleServiceServicer_to_server(self.lifecycle, server)  # type: ignore[arg-type]
        await server.start()
        self.lifecycle.say(**instances)
        self.supervise(self._admission)
        await self.until(lambda: hasattr(self, "dispatcher") and self.dispatcher.gates, "supply is known")

    def supervise(self, serve: Callable[[asyncio.Event], Any]) -> None:
        """Runs a service as a process: it is started again when it ends by an error."""
        self._processes.append(asyncio.create_task(self._supervise(serve), name="supervisor"))

    async def _supervise(self, serve: Callable[[asyncio.Event], Any]) -> None:
        while True:
            running = asyncio.create_task(serve(asyncio.Event()), name="process")
            try:
                await asyncio.wait([running])
            finally:
                running.cancel()
            if not running.cancelled() and running.exception() is not None:
                self.deaths.append(running.exception())
            self.lifecycle.restarted = True
            await asyncio.sleep(RESTART)

    def kill_admission(self) -> None:
        """As kill -9; it is started again."""
        assert self._admission_process is not None
        self.network.servers.pop(ADMISSION, None)
        self.network.cut(ADMISSION)
        self._admission_process.cancel()

    async def _admission(self, stop: asyncio.Event) -> None:
        self._admission_process = asyncio.current_task()
        await admission_main.serve(_admission_settings(), stop)

    def _made(self, *args: Any) -> Dispatcher:
        self.dispatcher = Dispatcher(*args)
        for name in HANDLERS:
            setattr(self.dispatcher, name, self._counted(name, getattr(self.dispatcher, name)))
        return self.dispatcher

    def _counted(self, name: str, handler: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = handler(*args)
            self.on_call(name)
            return result

        return call

    async def start_edge(self, **changed: Any) -> None:
        """A whole edge, behind an HTTP server that isn't there: `app` is called."""
        self.supervise(functools.partial(self._serve_edge, changed))
        await self.until(lambda: self.app is not None and not self.edge.ready(), "the edge is ready")

    async def _serve_edge(self, changed: dict[str, Any], stop: asyncio.Event) -> None:
        self._stop_edge = stop
        loaded = _edge_settings()
        loaded = dataclasses.replace(loaded, edge=loaded.edge.model_copy(update=changed))
        try:
            await edge_main.serve(loaded, stop)
        finally:
            self.app = None  # with the process its requests end, too
            for session, task in self.clients:
                if session is self.edge.session:
                    task.cancel()
            for relay in self.edge.relays.now():
                if isinstance(relay, Relay) and relay._task is not None:
                    relay._task.cancel()

    def stop_edge(self) -> None:
        """SIGTERM; another one is started afterwards."""
        self._stop_edge.set()

    def _made_edge(self, *args: Any) -> Edge:
        self.edge = Edge(*args)
        self.sessions = [self.edge.session]
        return self.edge

    async def session(self) -> Session:
        """An edge's session alone, opened."""
        session = Session(ADMISSION, 600.0, self.now)
        self.sessions.append(session)
        self._processes.append(asyncio.create_task(session.run(), name="session"))
        await self.until(lambda: session.connected, "a session is open")
        return session

    async def until(self, condition: Callable[[], Any], what: str, seconds: float = 30.0) -> None:
        """Waits for a condition, looking each 10 ms of virtual time."""
        end = self.now() + seconds
        while not condition():
            assert self.now() < end, (
                f"not within {seconds} s: {what}; deaths {self.deaths}, uncaught {self.loop.errors}"
            )
            await asyncio.sleep(0.01)

    # --- what must hold ----------------------------------------------------------------------------------

    def check(self) -> None:
        """At every moment: admission's books agree."""
        if hasattr(self, "dispatcher"):
            assert conservation_error(self.dispatcher) == 0

    def check_calls(self) -> None:
        """While admission lives: a unary ticket has a call that waits for it."""
        if not hasattr(self, "dispatcher"):
            return
        server = self.network.servers.get(ADMISSION)
        for session in self.dispatcher.sessions.values():
            if isinstance(session, Holder) and session.tickets and server is not None:
                calls = [task for task in server.tasks if task.get_name() == "grpc: Acquire"]
                assert len(session.tickets) <= len(calls), "a ticket that no call waits for"

    def nothing(self) -> bool:
        """No ticket, lease or slot is taken anywhere."""
        book = self.dispatcher
        return not (
            any(gate.waiting or gate.active for gate in book.gates.values())
            or any(one.tickets or one.leases for one in book.sessions.values())
            or any(session.held or session.waiting for session in self.sessions)
        )

    def lease_ends(self) -> set[LeaseEnd]:
        """The ways in which leases have ended."""
        tallies = self.dispatcher.tallies.values()
        return {end for tally in tallies for end, count in tally.lease_ends.items() if count}

    def reclaimed(self) -> int:
        """Leases that admission took back because nobody held them."""
        return sum(tally.lease_ends[LeaseEnd.RECLAIMED] for tally in self.dispatcher.tallies.values())

    async def settled(self, seconds: float = TTL + 1.0) -> None:
        """All is free again."""
        await self.until(self.nothing, f"nothing is left over, but {self.left()}", seconds)
        self.check()

    def left(self) -> str:
        """What is still taken, for messages."""
        gates = [
            (gate.model, list(gate.waiting), list(gate.slots.values()))
            for gate in self.dispatcher.gates.values()
        ]
        edges = [(one, sorted(one.held), sorted(one.waiting)) for one in self.sessions]
        return f"gates {gates}, book {list(self.dispatcher.sessions)}, edges {edges}"

    async def stop(self) -> None:
        """Ends every process."""
        for task in self._processes:
            task.cancel()
        await asyncio.gather(*self._processes, return_exceptions=True)


@contextlib.asynccontextmanager
async def world(
    slots: int = 2, delay: Callable[[], float] | None = None, room: int = 8
) -> AsyncIterator[World]:
    """A world on the running ShuffleLoop; without a `delay`, messages take no time."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ShuffleLoop)
    network, wires = Network(delay or _none, room), Wires(loop, delay or _none)
    with installed(network), _owned(loop):
        made = World(loop, network, wires, slots)
        with (
            mock.patch.object(admission_main, "Dispatcher", made._made),
            mock.patch.object(edge_main, "Edge", made._made_edge),
            mock.patch.object(edge_main, "bind", mock.MagicMock()),
            mock.patch.object(edge_main, "url_of", return_value="http://front"),
            mock.patch.object(edge_main, "Server", lambda app, *_: _Front(made, app)),
        ):
            try:
                yield made
            finally:
                await made.stop()


@contextlib.contextmanager
def _owned(loop: ShuffleLoop) -> Iterator[None]:
    """Clock and dice are the loop's."""
    random.seed(loop.dice.random())
    clock = SimpleNamespace(monotonic=loop.time)
    with (
        mock.patch.object(process, "time", clock),
        mock.patch.object(gc, "freeze", _none),
        mock.patch.object(secrets, "token_hex", lambda n: f"{loop.dice.getrandbits(8 * n):x}"),
        mock.patch.object(secrets, "randbits", loop.dice.getrandbits),
    ):
        yield


def _none() -> float:
    return 0.0


def _ignore(name: str) -> None:
    """Nobody counts."""


@functools.cache
def _admission_settings() -> admission_settings.Loaded:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tidegate.yaml"
        path.write_text(
            f"admission: {{listen: '{ADMISSION}', lease_ttl: {TTL:.0f}s}}\n"
            f"lifecycle: {{listen: '{LIFECYCLE}'}}\n"
        )
        return admission_settings.load(path)


@functools.cache
def _edge_settings() -> edge_settings.Loaded:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tidegate.yaml"
        path.write_text(f"admission: {{listen: '{ADMISSION}'}}\nlifecycle: {{listen: '{LIFECYCLE}'}}\n")
        return edge_settings.load(path)


__all__ = ["ADMISSION", "LIFECYCLE", "TTL", "Phase", "World", "world"]
