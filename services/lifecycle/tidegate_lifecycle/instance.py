"""An instance: one model server from its order to its end. The state machine is the table below; pure."""

from __future__ import annotations

import enum
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


class IllegalTransition(Exception):
    """A change of state that the table doesn't have; nothing was changed."""


class DrainCause(enum.Enum):
    """Why an instance drains: decides when the reason has gone."""

    IDLE = "idle"
    EVICTION = "eviction"
    UNLOAD = "unload"
    SURPLUS = "surplus"
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
    generation: int = 0
    """The first generation of supply that tells its present state."""
    running: int | None = None
    """What the server itself reports as running; None = nothing."""
    queued: int | None = None

    def to(self, state: InstanceState, now: float, reason: str = "") -> None:
        """Changes the state; IllegalTransition when the table has no such step."""
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransition(f"{self.id}: {self.state.name} → {state.name}")
        if state is InstanceState.READY and self.state is not InstanceState.DRAINING:
            self.ready_at = self.last_used = now
        if state is not InstanceState.DRAINING:
            self.drain = None
        self.state, self.since, self.reason = state, now, reason

    def start_drain(self, drain: Drain, reason: str) -> None:
        """READY → DRAINING with its cause and deadline."""
        self.to(InstanceState.DRAINING, drain.since, reason)
        self.drain = drain

    @property
    def exists(self) -> bool:
        """It holds its room: everything until GONE."""
        return self.state is not InstanceState.GONE

    @property
    def serving(self) -> bool:
        """It serves or will without a further order."""
        return self.state in (InstanceState.STARTING, InstanceState.READY, InstanceState.WAKING)

    def drained(self, seen: int) -> bool:
        """A settled demand that has seen the drain (`seen` is its generation of supply) shows no lease, and
        the server itself, if it says anything, runs nothing."""
        return seen >= self.generation > 0 and self.leases == 0 and not self.running
