"""Tickets and the leases they become: plain values, and the words that the gate says about them.

Numbers of the enums are those of the contract (a test compares them), so that no table stands between.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tidegate_admission.rates import Meter

Id = tuple[str, int]
"""Names a ticket and the lease it becomes: (session, n), chosen by the session."""

Generation = tuple[int, int]
"""(incarnation, n). Lifecycle's incarnation rises with each boot, so its generations have an order."""

NO_GENERATION: Generation = (0, 0)


class Reason(enum.IntEnum):
    """Why a ticket was refused or a lease ended; `tidegate.admission.v1.Reason`."""

    QUEUE_FULL = 1
    RATE_LIMITED = 2
    QUEUE_TIMEOUT = 3
    DEADLINE_UNREACHABLE = 4
    DEADLINE_EXCEEDED = 5
    MODEL_NOT_FOUND = 6
    MODEL_FAILED = 7
    NO_CAPACITY = 8
    UNAVAILABLE = 9
    DRAINING = 10
    EXPIRED = 11
    REVOKED = 12
    INSTANCE_LOST = 13
    SUPERSEDED = 14
    RECLAIMED = 15
    INVALID = 16


class Outcome(enum.IntEnum):
    """How an edge says that a ticket or lease ended; `tidegate.admission.v1.Outcome`."""

    OK = 1
    CLIENT_GONE = 2
    UPSTREAM_ERROR = 3
    CONNECT_FAILED = 4
    BACKPRESSURE = 5
    TIMEOUT = 6
    UNUSED = 7


class Band(enum.IntEnum):
    """Priority; `tidegate.admission.v1.Band`."""

    HIGH = 1
    NORMAL = 2
    LOW = 3


class TicketEnd(enum.StrEnum):
    """The ways in which waiting ends."""

    GRANTED = "granted"
    REFUSED = "refused"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    SESSION_LOST = "session_lost"


class LeaseEnd(enum.StrEnum):
    """The ways in which a lease ends."""

    RELEASED = "released"
    EXPIRED = "expired"
    REVOKED = "revoked"
    RECLAIMED = "reclaimed"
    INSTANCE_LOST = "instance_lost"


class Phase(enum.IntEnum):
    """Where an id is in its life."""

    NEW = 0
    WAITING = 1
    LEASED = 2
    ENDED = 3


NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.NEW: frozenset({Phase.WAITING, Phase.LEASED, Phase.ENDED}),  # offered; restated as held; refused
    Phase.WAITING: frozenset({Phase.LEASED, Phase.ENDED}),
    Phase.LEASED: frozenset({Phase.WAITING, Phase.ENDED}),  # back to waiting: moved
    Phase.ENDED: frozenset(),
}


class IllegalTransitionError(Exception):
    """A ticket was asked to become what it can't; nothing was changed. A bug, and fatal."""


class Ticket:
    """One id through its life. The gate that holds it is its only writer; times are monotonic seconds."""

    __slots__ = (
        "affinity",
        "arrived",
        "band",
        "catalog",
        "charged",
        "deadline",
        "excluded",
        "granted",
        "id",
        "instance_id",
        "loading",
        "meter",
        "model",
        "moves",
        "order",
        "patience",
        "phase",
        "position",
        "queued",
        "sent",
        "serial",
        "tenant",
        "tokens",
        "trace_parent",
        "wants_progress",
    )

    def __init__(
        self,
        id: Id,  # noqa: A002 - the field's own word
        model: str,
        arrived: float,
        tenant: str = "",
        band: int = Band.NORMAL,
        deadline: float = math.inf,
        catalog: Generation = NO_GENERATION,
        tokens: int = 0,
        affinity: str = "",
        trace_parent: str = "",
        wants_progress: bool = False,
        moves: int = 0,
        excluded: frozenset[str] = frozenset(),
    ) -> None:
        self.id = id
        self.model = model
        self.arrived = arrived
        """When it began to wait; its age decides its place."""
        self.tenant = tenant
        """Empty = `default`."""
        self.band = band
        self.deadline = deadline
        """The caller's own; infinite = none."""
        self.catalog = catalog
        """The catalogue by which the edge judged it."""
        self.tokens = tokens
        self.affinity = affinity
        self.trace_parent = trace_parent
        self.wants_progress = wants_progress
        self.moves = moves
        self.excluded = excluded
        """Instances that failed it."""
        self.phase = Phase.NEW
        self.order = 0
        """Its number when it was first taken in: decides between tickets that arrived at the same moment."""
        self.serial = 0
        """Its entry in a line; an entry with another serial is a dead one."""
        self.patience = math.inf
        """What the gate's queue clock shows when its queue timeout is over."""
        self.queued = 0.0
        """When it was taken into this queue: its arrival, unless it was moved or restated."""
        self.position = 0
        """Its place in the queue when it was taken in, from 1; only of traced ones."""
        self.instance_id = ""
        self.granted = 0.0
        self.charged = 0.0
        """Slot-seconds that its tenant was charged for the lease so far."""
        self.loading = 0.0
        """Seconds of its wait, as of its grant, in which the model was loading."""
        self.meter: Meter | None = None
        """Where it has reserved of its tenant's rates."""
        self.sent = 0
        """Number of the response that told the grant on the session's present stream."""

    def become(self, phase: Phase) -> None:
        """Takes a step of NEXT; raises IllegalTransitionError and changes nothing when there is none."""
        if phase not in NEXT[self.phase]:
            raise IllegalTransitionError(f"ticket {self.id} can't go from {self.phase.name} to {phase.name}")
        self.phase = phase

    def __repr__(self) -> str:
        return f"<Ticket {self.id[0]}/{self.id[1]} {self.phase.name} {self.model} {self.instance_id}>"


@dataclass(frozen=True, slots=True)
class QueueView:
    """A model's queue at one moment, as callers are told."""

    waiting: int
    active: int
    max_concurrent: int
    max_queue: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A ticket that ended without a lease."""

    ticket: Ticket
    reason: Reason
    message: str
    retry_after: float
    """Seconds; 0 = a retry can't help."""
    queue: QueueView
    end: TicketEnd


@dataclass(frozen=True, slots=True)
class Loss:
    """A lease that ended, not by its session."""

    ticket: Ticket
    reason: Reason


Grant = tuple[Ticket, str, int, int]
"""(ticket, address, waiting, active): a ticket that has become a lease, and the queue just after."""
