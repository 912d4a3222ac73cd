"""Those who use slots in the proofs: requests of an edge, and callers of the unary verbs."""

from __future__ import annotations

import asyncio

from grpc import aio

from tests.proof.world import ADMISSION, World
from tidegate.admission.v1 import admission_pb2 as pb
from tidegate.admission.v1 import admission_pb2_grpc as pb_grpc
from tidegate_chassis import rpc
from tidegate_edge.session import Session
from tidegate_edge.ticket import Outcome, Ticket, TicketRefused


def client(
    w: World,
    session: Session,
    hold: float = 0.1,
    moves: int = 0,
    leave: float | None = None,
    deadline: float = 0.0,
    flees: str = "",
    hold_before: float = 0.0,
) -> asyncio.Task[str]:
    """One request, as the relay drives its ticket; its result says how it ended.

    `hold` and `leave` (the client goes) in seconds; the lease is moved `moves` times first. From the instance
    `flees` it is moved after `hold_before` seconds: its server has died.
    """
    ticket = session.acquire("m", deadline=deadline)
    w.tickets.append(ticket)
    place: list[str] = []
    task = asyncio.create_task(_request(ticket, place, hold, moves, flees, hold_before), name="client")
    lost: list[str] = []

    def on_lost(reason: str) -> None:
        lost.append(f"{reason} as a {place[-1]}")
        task.cancel()

    ticket.on_lost(on_lost)
    if leave is not None:
        w.loop.call_later(leave, task.cancel)
    w.clients.append((session, task))
    return asyncio.create_task(_told(task, lost), name="client's end")


async def _told(task: asyncio.Task[str], lost: list[str]) -> str:
    try:
        return await task
    except asyncio.CancelledError:
        return f"lost {lost[0]}" if lost else "left"


async def _request(
    ticket: Ticket, place: list[str], hold: float, moves: int, flees: str, hold_before: float
) -> str:
    outcome = Outcome.CLIENT_GONE
    try:
        place.append("waiter")
        grant = await ticket.granted()
        place.append("holder")
        while moves or grant.instance_id == flees:
            await asyncio.sleep(hold_before)
            moves = max(0, moves - 1)
            ticket.move(grant.instance_id, Outcome.CONNECT_FAILED)
            place.append("waiter")
            grant = await ticket.granted()
            place.append("holder")
        await asyncio.sleep(hold)
        outcome = Outcome.OK
    except TicketRefused as refused:
        return f"refused {refused.reason}"
    finally:
        ticket.done(outcome)
    return "served"


async def vanish(w: World, session: Session) -> int:
    """A relay is granted a slot and is never heard of again; 0 when it was refused."""
    ticket = session.acquire("m")
    try:
        await ticket.granted()
    except TicketRefused:
        return 0
    return 1


class Unaries:
    """A unary holder and its calls."""

    def __init__(self, w: World) -> None:
        self._w = w
        self._stub = pb_grpc.AdmissionServiceStub(rpc.channel(ADMISSION))
        self._calls: list[asyncio.Task[str]] = []
        self._released: set[str] = set()

    def start(
        self, request_id: str, hold: float, leave: float | None = None, timeout: float | None = None
    ) -> asyncio.Task[str]:
        """One call; the lease is released after `hold` seconds. `leave` and `timeout` in seconds."""
        task = asyncio.create_task(self._call(request_id, hold, timeout), name="unary caller")
        if leave is not None:
            self._w.loop.call_later(leave, task.cancel)
        self._calls.append(task)
        return task

    async def _call(self, request_id: str, hold: float, timeout: float | None) -> str:
        request = pb.AcquireRequest(holder_id="h", request_id=request_id, model="m")
        try:
            lease = await self._stub.Acquire(request, timeout=timeout)
        except aio.AioRpcError as error:
            return f"{error.code().name} {rpc.reason_of(error)}"
        await asyncio.sleep(hold)
        await self._stub.Release(pb.ReleaseRequest(holder_id="h", lease_id=lease.lease_id), timeout=5.0)
        return "served"

    async def over(self) -> int:
        """Waits for all calls; how many there were."""
        if self._calls:
            await asyncio.wait(self._calls)
        return len(self._calls)


__all__ = ["Unaries", "client", "vanish"]
