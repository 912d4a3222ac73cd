"""What a plan is made from, and what it is made of. Pure."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate_lifecycle.budget import Card, Intent
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.instance import DrainCause, Instance
from tidegate_lifecycle.needs import Need, need_of

STOP_TIME = 10.0
"""Seconds that a stop takes at most, for the bounds of turns."""
SCALE_OUT_WAIT = 1.0
"""Seconds that tickets wait for the instances there are before one more is started."""


@dataclass(frozen=True)
class Policy:
    """The times of section `lifecycle`, in seconds."""

    min_residency: float = 30.0
    max_swap_wait: float = 60.0
    drain_timeout: float = 300.0
    """0 = never cut."""


@dataclass(frozen=True)
class Demand:
    """What is wanted of a model, by the last demand."""

    waiting: int = 0
    oldest_since: float = math.inf
    """Since when the oldest ticket waits (monotonic seconds); inf = nobody waits."""
    interest_until: float = 0.0
    """Until when it is to be started for those who were refused because it loads too slowly."""
    trace_parent: str = ""
    arrival_rate: float = 0.0
    """Requests a second, over about a minute."""


@dataclass(frozen=True)
class Circuit:
    """The failed starts of a model since its last success: open until `retry_at`, then half-open."""

    failures: int
    retry_at: float
    message: str = ""
    missed: int = 0
    """How many of them weren't ready by their deadline."""

    def is_open(self, now: float) -> bool:
        """In its back-off: nothing is tried, callers are refused."""
        return self.retry_at > now


@dataclass(frozen=True)
class World:
    """Everything a plan depends on, but for the time."""

    catalog: Mapping[str, Model]
    cards: tuple[Card, ...]
    instances: tuple[Instance, ...] = ()
    demand: Mapping[str, Demand] = field(default_factory=dict)
    circuits: Mapping[str, Circuit] = field(default_factory=dict)
    needs: Mapping[str, Need] = field(default_factory=dict)
    """By model; for one that isn't named, what its settings declare."""
    load_times: Mapping[str, float] = field(default_factory=dict)
    """Learned seconds from the launch to READY."""
    intents: tuple[Intent, ...] = ()
    settled: bool = False
    """Admission is there and its counts can be relied on. If not, the plan only adds."""
    seen: int = 0
    """The generation of supply that the last settled demand had seen."""
    ordered: frozenset[str] = frozenset()
    """Models that an operator, or a crash, wants started without a ticket."""
    pinned: frozenset[str] = frozenset()
    unload: frozenset[str] = frozenset()
    policy: Policy = Policy()

    def need(self, model: Model) -> Need:
        """What one server of it needs of each card."""
        return self.needs.get(model.name) or need_of(model)


@dataclass(frozen=True)
class Start:
    """Start one instance of a model."""

    model: str
    devices: tuple[str, ...]
    reserved_mib: int
    """On each device."""
    reason: str = field(default="", compare=False)
    """Why there, for people."""


@dataclass(frozen=True)
class StartDrain:
    """READY → DRAINING."""

    instance_id: str
    cause: DrainCause
    reason: str
    beneficiary: str = ""


@dataclass(frozen=True)
class Undrain:
    """DRAINING → READY: the reason has gone."""

    instance_id: str


@dataclass(frozen=True)
class Stop:
    """DRAINING → STOPPING: it is empty, or its deadline has passed."""

    instance_id: str
    cut: bool
    """Leases or requests were left: what still runs is ended with an error."""


Action = Start | StartDrain | Undrain | Stop


class WaitReason(enum.Enum):
    """Why a wanted model isn't started by this plan."""

    ESTIMATING = "estimating"
    """What it needs isn't known yet; its files are being read."""
    BACK_OFF = "back_off"
    GATE = "gate"
    """It fits, but another server starts or stops on those cards."""
    ROOM = "room"
    """Others must go first, and will."""
    NO_CAPACITY = "no_capacity"
    """What holds the room can't be made to go."""
    NEVER_FITS = "never_fits"


@dataclass(frozen=True)
class Wait:
    """A wanted model that isn't started now: why, in numbers."""

    reason: WaitReason
    text: str
    ready_in: float | None = None
    """The bound of its turn in seconds; None = unknown."""

    @property
    def refuses(self) -> bool:
        """Nobody needs to wait for it: it can't be had as things are."""
        return self.reason in (WaitReason.NEVER_FITS, WaitReason.NO_CAPACITY)


@dataclass(frozen=True)
class Plan:
    """What to do now, in this order."""

    actions: tuple[Action, ...]
    intents: tuple[Intent, ...]
    waits: Mapping[str, Wait]
    wake_at: float
    """When to plan again though nothing has happened; inf = never."""
