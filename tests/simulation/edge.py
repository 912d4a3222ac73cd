"""An edge as a process: its real session with admission, real tickets and catalogue, and relays that keep the
rules of `tidegate_edge.relay` but carry no bytes. And the clients, who are answered exactly once."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.simulation.machine import ModelServer
from tests.simulation.process import Process
from tidegate_edge.catalog import Catalog
from tidegate_edge.session import Session
from tidegate_edge.ticket import Band, Outcome, Phase, Ticket, TicketRefused

if TYPE_CHECKING:
    from tests.simulation.world import World

PATIENCE = 5.0
"""Seconds that a new request waits for admission."""
ATTEMPTS = 3
RETRY_DELAY = 0.2
DRAIN = 5.0
"""Seconds that relays have when the edge leaves."""


@dataclass(eq=False)
class Client:
    """Somebody who sends one request."""

    number: int
    model: str
    tenant: str
    band: Band
    deadline: float = 0.0
    """Its own, in seconds; 0 = none."""
    length: float = 1.0
    """Seconds that the model server takes for it."""
    backpressure: bool = False
    """The model server will answer 429."""
    vanishes: bool = False
    """Its relay will be forgotten by the edge without a word: a bug that the protocol must survive."""
    patience: float = 0.0
    """Seconds after which it leaves; 0 = never."""
    came: float = 0.0
    answers: list[tuple[float, str]] = field(default_factory=list)
    granted: float = 0.0
    """When it was first given a slot; 0 = never."""
    left: bool = False

    def answer(self, what: str, now: float) -> None:
        """The end of its request."""
        assert not self.left, f"{self} had left, and was answered: {what}"
        assert not self.answers, f"{self} was answered twice: {self.answers}, {what}"
        self.answers.append((now, what))


class Edge(Process):
    """One life of an edge."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.session: Session | None = None
        self.catalog: Catalog | None = None
        self.relays: set[Relay] = set()
        self.clients: set[Client] = set()
        """Whoever is connected."""
        self.leaving = False
        self._run: asyncio.Task[None] | None = None
        self._relay_ended = asyncio.Event()

    async def main(self) -> None:
        """Session and catalogue."""
        self.session = Session("admission", self.world.setting.control_grace)
        self.catalog = Catalog("lifecycle")
        self._run = self.spawn(self.session.run())
        await self.catalog.run()

    def arrive(self, client: Client) -> None:
        """A request comes."""
        self.clients.add(client)
        self.post(self._serve, client)

    def _serve(self, client: Client) -> None:
        assert self.session is not None
        relay = Relay(self, client)
        self.relays.add(relay)
        relay.begin()
        if client.patience:
            self.world.after(client.patience, functools.partial(self.post, relay.interrupt, "gone"))

    async def leave(self) -> None:
        """A graceful end, as in `tidegate_edge.__main__`: relays have a while, then the goodbye."""
        assert self.session is not None
        self.world.after(DRAIN, functools.partial(self.post, self._end_relays))
        while self.relays:
            self._relay_ended.clear()
            await self._relay_ended.wait()
        await self.session.close()
        self.world.at(self.world.now, self.kill)
        self.world.after(1.0, functools.partial(self.world.start, self.name))

    def _end_relays(self) -> None:
        for relay in sorted(self.relays, key=lambda relay: relay.number):
            relay.interrupt("draining")

    def kill(self) -> None:
        """The kernel closes its connections: model servers and clients see that."""
        for relay in self.relays:
            relay.close_upstream()
        for client in self.clients:
            client.answer("broken off", self.world.now)
        super().kill()
        self.relays.clear()
        self.session = None


class Relay:
    """One request at an edge."""

    def __init__(self, edge: Edge, client: Client) -> None:
        self.edge, self.client, self.number = edge, client, client.number
        self.ticket: Ticket | None = None
        self.server: ModelServer | None = None
        """The model server that works on it, in truth."""
        self.forgotten = False
        self._cause = ""
        self._upstream: asyncio.Future[str] | None = None
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        """Starts its task."""
        self._task = self.edge.spawn(self._live())

    def interrupt(self, cause: str) -> None:
        """Ends it from outside: the client left, the lease was lost."""
        if not self._cause and self._task is not None:
            self._cause = cause
            self._task.cancel()

    async def _live(self) -> None:
        outcome, words = Outcome.CLIENT_GONE, ""
        try:
            outcome, words = await self._serve()
        except TicketRefused as refused:
            words = f"refused: {refused.reason}"
        except asyncio.CancelledError:
            if not self.edge.alive:
                raise
            words = self._cause
        if self.forgotten:
            self.ticket = None
        self.close_upstream()
        if self.ticket is not None:
            self.ticket.done(outcome)
        self._task = None
        self.edge.relays.discard(self)
        self.edge._relay_ended.set()
        self.edge.clients.discard(self.client)
        if words in ("gone", "forgotten"):
            self.client.left = True
        else:
            self.client.answer(words, self.edge.world.now)

    async def _serve(self) -> tuple[Outcome, str]:
        edge, client = self.edge, self.client
        session, catalog = edge.session, edge.catalog
        assert session is not None
        assert catalog is not None
        if not catalog.known or not await session.available(PATIENCE):
            return Outcome.CLIENT_GONE, "no admission"
        self.ticket = session.acquire(
            client.model,
            tenant=client.tenant,
            band=client.band,
            deadline=client.deadline,
            catalog_generation=catalog.generation,
            wants_progress=client.number % 4 == 0,
        )
        self.ticket.on_lost(lambda reason: self.interrupt(f"lost: {reason}"))
        for left in range(ATTEMPTS - 1, -1, -1):
            grant = await self.ticket.granted()
            client.granted = client.granted or edge.world.now
            server = edge.world.machine.at(grant.address)
            if server is not None:
                return await self._relay(server)
            if left:
                self.ticket.move(grant.instance_id, Outcome.CONNECT_FAILED, RETRY_DELAY)
        return Outcome.CONNECT_FAILED, "no connection"

    async def _relay(self, server: ModelServer) -> tuple[Outcome, str]:
        world, session = self.edge.world, self.edge.session
        assert session is not None
        if self.client.backpressure:
            return Outcome.BACKPRESSURE, "backpressure"
        self._upstream = self.edge.loop.create_future()
        self.server = server
        server.requests.add(self)
        world.at(world.now + self.client.length, functools.partial(self._upstream_ended, server))
        if self.client.vanishes:
            world.at(world.now + self.client.length / 2, functools.partial(self.edge.post, self.forget))
        end = await self._upstream
        if end == "broken":
            return Outcome.UPSTREAM_ERROR, "upstream error"
        if not session.steady:
            await session.steadied()
        return Outcome.OK, "ok"

    def forget(self) -> None:
        """The relay vanishes without a word, as by a bug."""
        if self.ticket is not None and self.ticket.phase is Phase.HELD and not self._cause:
            self.forgotten = True
            self.interrupt("forgotten")

    def close_upstream(self) -> None:
        """Closes the connection to the model server."""
        if self.server is not None:
            self.server.requests.discard(self)
            self.server = None

    def broke(self) -> None:
        """The model server broke the request off."""
        self._told("broken")

    def _upstream_ended(self, server: ModelServer) -> None:
        if self.server is server:
            server.requests.discard(self)
            self._told("ended")

    def _told(self, how: str) -> None:
        self.server = None
        upstream = self._upstream
        if upstream is not None:
            self.edge.post(lambda: None if upstream.done() else upstream.set_result(how))
