"""An instance as a gate sees it: how many leases it may have, and the set of those it has."""

from __future__ import annotations

from tidegate_admission.pressure import Pressure
from tidegate_admission.supply import Instance, InstanceState
from tidegate_admission.ticket import Id, Ticket


class Slot:
    """The slots of one instance. Its gate is its only writer."""

    __slots__ = (
        "address",
        "avoided_until",
        "grants",
        "held_until",
        "id",
        "known",
        "leases",
        "old",
        "pressure",
        "running",
        "slots",
        "state",
    )

    def __init__(self, id: str) -> None:  # noqa: A002 - the field's own word
        self.id = id
        self.address = ""
        self.state = 0
        self.slots = 0
        """Its ceiling."""
        self.pressure = Pressure()
        self.running: int | None = None
        """What its server reports as running; None = nothing."""
        self.old = False
        """It was there before this process: full while the restart window is open."""
        self.known = False
        """Supply has named it; else it is only known from a lease that a session stated."""
        self.held_until = 0.0
        """No grants before: somebody couldn't connect to it."""
        self.avoided_until = 0.0
        """No grants before to those who couldn't connect to it."""
        self.leases: dict[Id, Ticket] = {}
        self.grants = 0
        """Grants made on it by this process, for lifecycle's last-use stamps."""

    def update(self, instance: Instance, max_concurrent: int, now: float) -> None:
        """Takes in what supply says.

        READY in a newer report confirms an instance that was held back, unless the news is that its server
        no longer says anything.
        """
        self.address, self.state = instance.address, instance.state
        self.slots = min(instance.slots, max_concurrent) if instance.slots else max_concurrent
        self.pressure.hear(instance.queued, now, self.slots)
        self.old = instance.old if not self.known else self.old
        self.known = True
        fell_silent = self.running is not None and instance.running is None
        self.running = instance.running
        if instance.state == InstanceState.READY and not fell_silent:
            self.held_until = 0.0

    def bound(self, now: float) -> int:
        """Leases it may have while it serves: its ceiling, or less after its server's 429 or 503."""
        return self.pressure.bound(now, self.slots)

    def effective(self, now: float, guarded: bool) -> int:
        """Leases it may have now."""
        if self.state != InstanceState.READY or self.held_until > now or (guarded and self.old):
            return 0
        return self.bound(now)

    def held_back(self, now: float, guarded: bool) -> str:
        """Why it has fewer slots now, or none, for people; empty = it has all."""
        if self.state != InstanceState.READY:
            return "it is not ready"
        if self.held_until > now:
            return "a connection to it failed; waiting for lifecycle to confirm it"
        if guarded and self.old:
            return "admission has restarted; waiting for the edges to state their leases"
        return self.pressure.words(now, self.slots)

    def __repr__(self) -> str:
        return f"<Slot {self.id} state={self.state} {len(self.leases)}/{self.slots}>"
