"""A session: what one edge process holds and waits for, and how its own statements are compared with that.

Pure. The comparing functions decide and change nothing; the dispatcher carries out what they say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from tidegate_admission.progress import FlowProgress
from tidegate_admission.ticket import Reason, Refusal, Ticket

_MASK = (1 << 64) - 1


class SupersededError(Exception):
    """A newer stream of this session is open."""


class Outbox(Protocol):
    """Where the dispatcher puts answers for a session; it never waits. Implemented by the stream."""

    seq: int
    """Number of the response that is being filled."""

    def welcome(self) -> None:
        """The session is open."""

    def grant(
        self, ticket: Ticket, address: str, waiting: int, active: int, max_concurrent: int, max_queue: int
    ) -> None:
        """A ticket became a lease; the queue just after."""

    def refuse(self, refusal: Refusal) -> None:
        """A ticket ended without one."""

    def lost(self, n: int, reason: Reason) -> None:
        """A lease ended, not by its session."""

    def ack(self, number: int) -> None:
        """A heartbeat was taken in."""

    def query(self, number: int) -> None:
        """The full held set is asked for."""

    def progress(self, flow: FlowProgress) -> None:
        """How a flow is getting on."""

    def close(self, reason: Reason) -> None:
        """The stream ends; whatever is put in later is dropped."""


@dataclass(frozen=True, slots=True)
class Held:
    """A lease as its edge states it; `age` in seconds."""

    n: int
    model: str
    instance_id: str
    tenant: str = ""
    age: float = 0.0
    moves: int = 0


@dataclass(frozen=True, slots=True)
class Hello:
    """A complete statement."""

    session_id: str
    stream_seq: int
    holder: str
    held: tuple[Held, ...] = ()
    waiting: tuple[Ticket, ...] = ()
    """New tickets, with the age, moves and exclusions that were stated."""


class Session:
    """One edge process. The dispatcher is its only writer."""

    __slots__ = (
        "heard",
        "holder",
        "id",
        "leases",
        "outbox",
        "queried",
        "rostered",
        "stream_seq",
        "tickets",
        "used",
    )

    def __init__(self, session_id: str, now: float) -> None:
        self.id = session_id
        self.holder = ""
        self.stream_seq = 0
        self.outbox: Outbox | None = None
        """None: it has no stream."""
        self.heard = now
        """When it last said Hello or sent a heartbeat."""
        self.tickets: dict[int, Ticket] = {}
        self.leases: dict[int, Ticket] = {}
        self.queried = 0
        """The heartbeat whose held set was asked for; 0 = none is due."""
        self.rostered = False
        self.used = now
        """When it last had a ticket or a lease."""

    def shift(self, gap: float, now: float) -> None:
        """The process stood still for `gap` seconds, in which it could hear nobody."""
        self.heard = min(self.heard + gap, now)

    def judged(self, seen: int) -> Iterable[int]:
        """The leases that a statement speaks about: the edge had read of their grants when it made it."""
        return (n for n, ticket in self.leases.items() if ticket.sent <= seen)


def digest(ns: Iterable[int]) -> tuple[int, int]:
    """(count, sum modulo 2^64 of splitmix64(n)) of a held set; Steele, Lea, Flood: OOPSLA 2014."""
    count = total = 0
    for n in ns:
        z = (n + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        total += z ^ (z >> 31)
        count += 1
    return count, total & _MASK


@dataclass(slots=True)
class Differences:
    """What a statement changes in the book, to be carried out in this order."""

    cancelled: list[Ticket] = field(default_factory=list)
    """Tickets that nobody waits for."""
    reclaimed: list[Ticket] = field(default_factory=list)
    """Leases that nobody holds."""
    moved: list[Ticket] = field(default_factory=list)
    """As stated: given back or moved, and the message got lost."""
    again: list[Ticket] = field(default_factory=list)
    """Leases whose grant got lost."""
    held: list[Held] = field(default_factory=list)
    """Leases that the book lacks."""
    waiting: list[Ticket] = field(default_factory=list)
    """Tickets that the book lacks."""


def compare_hello(session: Session, hello: Hello) -> Differences:
    """What a Hello, the complete statement, changes.

    1. Held as in the book: stays. Held elsewhere or waiting in the book: the statement is the fact.
    2. Held and not in the book: restated.
    3. Waiting, a lease in the book: its grant got lost and is told again; with more moves than the lease
       had, it was given back.
    4. Waiting, in the book too: stays, or is moved up when it has more moves.
    5. Waiting and not in the book: restated.
    6. In the book and not stated: cancelled, or reclaimed.
    """
    found = Differences()
    stated: set[int] = set()
    for item in hello.held:
        stated.add(item.n)
        if lease := session.leases.get(item.n):
            if lease.instance_id == item.instance_id:  # 1
                continue
            found.reclaimed.append(lease)
        elif ticket := session.tickets.get(item.n):
            found.cancelled.append(ticket)
        found.held.append(item)  # 2
    for waiter in hello.waiting:
        n = waiter.id[1]
        if n in stated:
            continue  # said twice: the held one counts
        stated.add(n)
        known = session.leases.get(n) or session.tickets.get(n)
        if known is None:
            found.waiting.append(waiter)  # 5
        elif known.moves < waiter.moves:
            found.moved.append(waiter)  # 3, 4
        elif n in session.leases:
            found.again.append(known)  # 3
    found.cancelled += [ticket for n, ticket in session.tickets.items() if n not in stated]  # 6
    found.reclaimed += [lease for n, lease in session.leases.items() if n not in stated]
    return found


def compare_statement(session: Session, seen: int, held: Iterable[Held]) -> Differences:
    """What a HeldStatement changes; leases granted after `seen` are not judged by it."""
    found = Differences()
    stated = {item.n: item for item in held}
    for n in session.judged(seen):
        item = stated.get(n)
        if item is None or item.instance_id != session.leases[n].instance_id:
            found.reclaimed.append(session.leases[n])
    reclaimed = {ticket.id[1] for ticket in found.reclaimed}
    found.held = [
        item
        for item in stated.values()
        if item.n in reclaimed or (item.n not in session.leases and item.n not in session.tickets)
    ]
    return found
