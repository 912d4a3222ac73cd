"""An instance: one model server from its order to its end. The state machine is the table below; pure."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass


class InstanceState(enum.Enum):
    """Where an instance is in its life; the numbers are the contract's."""

    STARTING = 1
    READY = 2
    DRAINING = 3
    FALLING_ASLEEP = 4
    SLEEPING = 5
    WAKING = 6
    STOPPING = 7
    GONE = 8


_S = InstanceState

TRANSITIONS: Mapping[InstanceState, frozenset[InstanceState]] = {
    _S.STARTING: frozenset({_S.READY, _S.STOPPING}),
    _S.READY: frozenset({_S.DRAINING, _S.STOPPING}),
    _S.DRAINING: frozenset({_S.READY, _S.FALLING_ASLEEP, _S.STOPPING}),
    _S.FALLING_ASLEEP: frozenset({_S.SLEEPING, _S.STOPPING}),
    _S.SLEEPING: frozenset({_S.WAKING, _S.STOPPING}),
    _S.WAKING: frozenset({_S.READY, _S.STOPPING}),
    _S.STOPPING: frozenset({_S.GONE}),
    _S.GONE: frozenset(),
}
"""From each state to those that may follow. READY → STOPPING is a crash: every planned stop drains first."""


SAMPLE_LASTS = 5.0
"""Seconds after which what a server said of its load is no longer believed."""
STANDSTILL = 10.0
"""Seconds after which a server isn't believed that says it works, and in whose figures nothing moves."""
CUT_OFF = 600.0
"""Seconds after which no edge that lost admission relays any more (`edge.control_grace`, its default): the
longest wait for a server's own count where a drain has no deadline."""


class IllegalTransition(Exception):
    """A change of state that the table doesn't have; nothing was changed."""


class DrainCause(enum.Enum):
    """Why an instance drains: decides when the reason has gone."""

    IDLE = "idle"
    EVICTION = "eviction"
    UNLOAD = "unload"
    DEVICE = "device"
    """An operator takes a device back."""
    SURPLUS = "surplus"
    RELOAD = "reload"
    SHUTDOWN = "shutdown"


@dataclass
class Drain:
    """A drain in progress. Times are monotonic seconds."""

    cause: DrainCause
    since: float
    deadline: float | None
    """When what still runs is ended; None = never."""
    beneficiary: str = ""
    """The model that gets the room, for an eviction."""


@dataclass
class Instance:
    """One model server. Times are monotonic seconds of this process, memory is MiB per card."""

    id: str
    model: str
    devices: tuple[str, ...]
    reserved_mib: int
    ordered_at: float
    """When it was ordered to start (for an adopted one: reckoned back)."""
    state: InstanceState = InstanceState.STARTING
    since: float = 0.0
    """When it came into its state."""
    patience: float = math.inf
    """Seconds that it may take from its launch until it is ready."""
    launched_at: float | None = None
    """When its server was launched, and began to load; None = what goes before that is under way."""
    deadline_at: float = math.inf
    """When it must be ready; it moves on until it is launched."""
    ready_at: float | None = None
    """When it last became ready after a start or a waking; a drain that was taken back doesn't count."""
    last_used: float = 0.0
    """When admission last showed a lease or a grant on it."""
    leases: int = 0
    """Leases on it by the last demand."""
    grants: int = 0
    """Grants on it so far by the last demand."""
    address: str = ""
    pid: int = 0
    adopted: bool = False
    reason: str = ""
    """Why it drains or stops, for people."""
    drain: Drain | None = None
    shape: str = ""
    """What its server was started as; see `engines.shape`."""
    replaced: str = ""
    """Why it must go whoever wants it: the configuration it was started with is no longer in effect. Empty =
    it is."""
    generation: int = 0
    """The first generation of supply that tells its present state."""
    running: int | None = None
    """What the server itself reports as running; None = nothing."""
    queued: int | None = None
    """What it reports as waiting in it."""
    sampled_at: float = -math.inf
    """When it was asked for these two."""
    empty_since: float | None = None
    """When demand first showed no lease on it, and while it drains, had seen that; None = it doesn't."""
    _figures: int | None = None
    _moved_at: float = -math.inf

    def to(self, state: InstanceState, now: float, reason: str = "") -> None:
        """Changes the state; IllegalTransition when the table has no such step."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"{self.id}: {self.state.name} → {state.name}")
        if state is InstanceState.READY and self.state is not InstanceState.DRAINING:
            self.ready_at = self.last_used = now
        if state is not InstanceState.DRAINING:
            self.drain = None
        self.state, self.since, self.reason = state, now, reason

    def prepare(self, now: float) -> None:
        """What goes before its launch (an image is pulled) doesn't count: its deadline moves on meanwhile, in
        steps, since each of them is news."""
        waits = self.state is InstanceState.STARTING and self.launched_at is None
        if waits and self.deadline_at - now < self.patience / 2:
            self.deadline_at = now + self.patience

    def start_drain(self, drain: Drain, reason: str) -> None:
        """READY → DRAINING with its cause and deadline."""
        self.to(InstanceState.DRAINING, drain.since, reason)
        self.drain, self.empty_since = drain, None

    @property
    def exists(self) -> bool:
        """It holds its room: everything until GONE."""
        return self.state is not InstanceState.GONE

    @property
    def loads_since(self) -> float:
        """When it began to load; before its launch, when it was ordered."""
        return self.ordered_at if self.launched_at is None else self.launched_at

    @property
    def serving(self) -> bool:
        """It serves or will without a further order."""
        return self.state in (InstanceState.STARTING, InstanceState.READY, InstanceState.WAKING)

    def show(self, seen: int, now: float) -> None:
        """A demand has come, which had seen supply up to `seen` (0 = it isn't settled)."""
        draining = self.state is InstanceState.DRAINING
        if self.leases or (draining and not self._released(seen)):
            self.empty_since = None
        elif self.empty_since is None:
            self.empty_since = now

    def sample(self, running: int | None, queued: int | None, at: float, figures: int = 0) -> None:
        """What the server, asked at that time, said of itself; `figures` differ when any of its own moved."""
        if figures != self._figures:
            self._figures, self._moved_at = figures, at
        self.running, self.queued, self.sampled_at = running, queued, at

    def forget(self, now: float) -> None:
        """An old sample says nothing; nor does one of a server that nobody has a lease on, and that says it
        works while none of its figures moves.

        vLLM writes its gauges when its engine makes a step: once all its requests were aborted it goes on
        telling those of the last one (its issues 22545 and 29928).
        """
        stands = (self.running or self.queued) and not self.leases
        if now - self.sampled_at > SAMPLE_LASTS or (stands and now - self._moved_at > STANDSTILL):
            self.running = self.queued = None

    @property
    def outdated(self) -> bool:
        """The server's own count is from before demand showed that it is empty: a newer one is wanted."""
        return (
            self.running is not None and self.empty_since is not None and self.sampled_at < self.empty_since
        )

    def drained(self, seen: int) -> bool:
        """A settled demand that has seen the drain (`seen` is its generation of supply) shows no lease, and
        the server itself, if it says anything, has said since then that it runs nothing."""
        return self._released(seen) and (self.running is None or (not self.running and not self.outdated))

    @property
    def cut_at(self) -> float | None:
        """When its drain ends though it isn't drained; None = never, as long as it has leases."""
        if self.drain is None or self.drain.deadline is not None or self.empty_since is None:
            return self.drain.deadline if self.drain is not None else None
        return self.empty_since + CUT_OFF

    def _released(self, seen: int) -> bool:
        return seen >= self.generation > 0 and self.leases == 0
