"""What may be expected of a model: when it will be ready, how fast its queue is served. Pure.

It looks at the gate's slots and tenants, and changes nothing of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tidegate_admission import estimate
from tidegate_admission.fairness import Accounts
from tidegate_admission.slots import Slot
from tidegate_admission.supply import MAY_SERVE, InstanceState, ModelSupply
from tidegate_admission.tally import Tally


class Outlook:
    """The prospects of one gate's callers."""

    def __init__(
        self, slots: Mapping[str, Slot], accounts: Accounts, tally: Tally, chance: Callable[[], float]
    ) -> None:
        self.interest_until = -math.inf
        """Until when those are expected back who were refused because the model will be ready too late."""
        self._slots, self._accounts, self._tally, self._chance = slots, accounts, tally, chance
        self._usual = 1
        self._ready_in: float | None = None
        """Seconds from whenever it is asked for; None = unknown, or under way."""
        self._ready_at: float | None = None
        """When it will be ready; None = unknown, or not under way."""

    def supply(self, item: ModelSupply | None, max_concurrent: int, now: float) -> None:
        """Takes in what lifecycle says; `max_concurrent`: slots of an instance, while none is known."""
        self._usual = max_concurrent
        self._ready_in = self._ready_at = None
        if item is not None and item.ready_in is not None:
            if item.under_way:
                self._ready_at = now + item.ready_in
            else:
                self._ready_in = item.ready_in

    # --- the model ---------------------------------------------------------------------------------------

    @property
    def loading(self) -> bool:
        """A slot can't be had because no server is up, rather than because all are busy."""
        return not any(slot.state == InstanceState.READY for slot in self._slots.values())

    def ready_in(self, now: float) -> float | None:
        """Seconds until a server is up; 0 = one is, None = unknown. A start that takes longer than it should
        is unknown: nobody knows what remains of it."""
        if not self.loading:
            return 0.0
        if self._ready_at is None:
            return self._ready_in or None
        return self._ready_at - now if self._ready_at > now else None

    def reaches(self, deadline: float, now: float) -> bool:
        """Whether the model may be up by then; it may while nothing is known."""
        ready = self.ready_in(now) if deadline < math.inf else None
        return ready is None or not ready or now + ready <= deadline

    def expect_back(self, now: float) -> bool:
        """Somebody was refused for its deadline; true when nobody was expected back before."""
        first = self.interest_until <= now
        self.interest_until = max(self.interest_until, now + estimate.interest(self.ready_in(now) or 0.0))
        return first

    def interest(self, now: float) -> float:
        """Seconds for which somebody is expected back; 0 = nobody is."""
        return max(0.0, self.interest_until - now)

    # --- the queue ---------------------------------------------------------------------------------------

    def sample(self, now: float, waiting: bool) -> None:
        """About once a second; `waiting`: somebody waits for a slot."""
        self._tally.drain.sample(now, self._serving(now), waiting and not self.loading)

    def drain_rate(self, now: float) -> float:
        """Slots that come free per second while somebody waits; 0 = unknown."""
        pace = self._tally.drain.turnaround or self._tally.service_mean
        return self._serving(now) / pace if pace else 0.0

    def retry_after(self, now: float, tenant: str) -> float:
        """Seconds until what a tenant has waiting may have been served, at its share of the slots."""
        tally, accounts = self._tally, self._accounts
        own = accounts.active.get(tenant)
        mean = tally.means.get(tenant) or tally.service_mean
        pace = estimate.turnaround(mean, tally.service_mean, tally.drain.turnaround)
        waiting = own.waiting() if own else 0
        wait = estimate.until_slot(waiting, pace, self._serving(now), accounts.part(tenant))
        return estimate.retry_after((self.ready_in(now) or 0.0) + wait, self._chance())

    def retry_ready(self, now: float) -> float:
        """Seconds until it is worth coming back to a model that is about to be ready."""
        return estimate.retry_after(self.ready_in(now) or 0.0, self._chance())

    def _serving(self, now: float) -> int:
        """Slots that are granted on now; with none, those that are to be expected."""
        slots = self._slots.values()
        serving = sum([slot.effective(now, False) for slot in slots])
        return serving or sum([slot.bound(now) for slot in slots if slot.state in MAY_SERVE]) or self._usual
