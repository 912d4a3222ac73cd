"""All metrics of admission. They are read from the dispatcher's sets and records when somebody asks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tidegate_admission import views
from tidegate_admission.books import UNKNOWN_MODELS
from tidegate_admission.dispatcher import Dispatcher
from tidegate_admission.tally import WAIT_BUCKETS, Tally

READ_TIMEOUT = 2.0
"""Seconds in which the loop must answer a scrape; else the last figures are given again."""


class Gaps:
    """How long the loop was away, beyond what was planned."""

    def __init__(self) -> None:
        self.count = 0
        """Gaps so long that expiries were shifted."""
        self.longest = 0.0
        """Seconds."""

    def note(self, seconds: float, shifted: bool) -> None:
        """One tick of the timer that came so much too late."""
        self.longest = max(self.longest, seconds)
        self.count += shifted


class AdmissionCollector(Collector):
    """Asks the loop for the figures, from the thread that serves them: only the loop reads its own state."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        gaps: Gaps,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
    ) -> None:
        self._dispatcher, self._gaps, self._loop, self._clock = dispatcher, gaps, loop, clock
        self._last: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask a loop that isn't running yet."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The figures now; the last ones when the loop doesn't answer."""
        reading = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        try:
            self._last = reading.result(READ_TIMEOUT)
        except (TimeoutError, concurrent.futures.CancelledError):
            reading.cancel()
        return self._last

    async def _read(self) -> list[Metric]:
        return read(self._dispatcher, self._gaps, self._clock())


def registry(collector: AdmissionCollector) -> CollectorRegistry:
    """The registry that `/metrics` serves."""
    made = CollectorRegistry()
    made.register(collector)
    return made


def read(dispatcher: Dispatcher, gaps: Gaps, now: float) -> list[Metric]:
    """All figures at this moment."""
    error = GaugeMetricFamily(
        "tidegate_admission_conservation_error",
        "Distance between what was granted, what has ended and what is held; not 0 = a bug.",
        views.conservation_error(dispatcher),
    )
    unknown = CounterMetricFamily(
        "tidegate_admission_unknown_ids",
        "Ends and moves of ids that the book lacks.",
        dispatcher.books.unknown_ids,
    )
    expired = CounterMetricFamily(
        "tidegate_admission_expired_sessions",
        "Sessions that were silent for the lease's time to live.",
        dispatcher.books.expired_sessions,
    )
    shifts = CounterMetricFamily(
        "tidegate_admission_loop_gaps", "Gaps of the loop that shifted all expiries.", gaps.count
    )
    longest = GaugeMetricFamily(
        "tidegate_admission_loop_gap_longest_seconds",
        "How much too late the timer has come at most.",
        gaps.longest,
    )
    linked = GaugeMetricFamily(
        "tidegate_admission_supply_settled",
        "1 while lifecycle is connected and settled.",
        float(dispatcher.linked and dispatcher.books.supply.settled),
    )
    window = GaugeMetricFamily(
        "tidegate_admission_settled",
        "1 once the restart window has closed.",
        float(dispatcher.books.window.over),
    )
    return [
        error,
        unknown,
        expired,
        shifts,
        longest,
        linked,
        window,
        *_queues(dispatcher, now),
        *_sessions(dispatcher, now),
        *_records(dispatcher),
        *_rates(dispatcher, now),
    ]


def _queues(dispatcher: Dispatcher, now: float) -> list[Metric]:
    depth = GaugeMetricFamily("tidegate_admission_queue_depth", "Tickets waiting.", labels=["model"])
    active = GaugeMetricFamily("tidegate_admission_active_leases", "Leases held.", labels=["model"])
    slots = GaugeMetricFamily(
        "tidegate_admission_effective_slots", "Leases that there may be now.", labels=["model"]
    )
    for model, gate in dispatcher.gates.items():
        if model in dispatcher.books.supply.view:  # a made-up name of a caller is no label
            depth.add_metric([model], len(gate.waiting))
            active.add_metric([model], gate.active)
            slots.add_metric([model], gate.effective_slots(now))
    return [depth, active, slots]


def _sessions(dispatcher: Dispatcher, now: float) -> list[Metric]:
    family = GaugeMetricFamily(
        "tidegate_admission_sessions", "Sessions of edges and unary holders.", labels=["state"]
    )
    connected = [view.connected for view in views.sessions(dispatcher, now)]
    family.add_metric(["connected"], sum(connected))
    family.add_metric(["away"], len(connected) - sum(connected))
    return [family]


def _records(dispatcher: Dispatcher) -> list[Metric]:
    grants = CounterMetricFamily("tidegate_admission_grants", "Tickets granted.", labels=["model"])
    restated = CounterMetricFamily(
        "tidegate_admission_restated_leases", "Leases that sessions brought with them.", labels=["model"]
    )
    tickets = CounterMetricFamily(
        "tidegate_admission_ticket_ends", "How tickets ended.", labels=["model", "end"]
    )
    leases = CounterMetricFamily(
        "tidegate_admission_lease_ends", "How leases ended.", labels=["model", "end"]
    )
    refusals = CounterMetricFamily(
        "tidegate_admission_refusals", "Why tickets were refused.", labels=["model", "reason"]
    )
    halvings = CounterMetricFamily(
        "tidegate_admission_slot_halvings",
        "How often a model server's 429 or 503 has halved its slots.",
        labels=["model"],
    )
    waits = HistogramMetricFamily(
        "tidegate_admission_wait_seconds", "How long granted tickets had waited.", labels=["model"]
    )
    for model, tally in dispatcher.tallies.items():
        name = model if model != UNKNOWN_MODELS else "(unknown)"
        grants.add_metric([name], tally.granted)
        restated.add_metric([name], tally.restated)
        halvings.add_metric([name], tally.halvings)
        for end, count in [*tally.ticket_ends.items()]:
            tickets.add_metric([name, str(end)], count)
        for ending, count in tally.lease_ends.items():
            leases.add_metric([name, str(ending)], count)
        for reason, count in tally.refusals.items():
            refusals.add_metric([name, reason.name.lower()], count)
        waits.add_metric([name], _buckets(tally), tally.wait_sum)
    return [grants, restated, halvings, tickets, leases, refusals, waits]


def _rates(dispatcher: Dispatcher, now: float) -> list[Metric]:
    limits = GaugeMetricFamily(
        "tidegate_admission_rate_limit", "What a tenant may have per minute.", labels=["tenant", "kind"]
    )
    left = GaugeMetricFamily(
        "tidegate_admission_rate_remaining", "What is left of it now.", labels=["tenant", "kind"]
    )
    for tenant, state in views.tenants(dispatcher, now):
        for kind, one in (("requests", state.requests), ("tokens", state.tokens)):
            if one is not None:
                limits.add_metric([tenant, kind], one.limit)
                left.add_metric([tenant, kind], one.remaining)
    return [limits, left]


def _buckets(tally: Tally) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in WAIT_BUCKETS), "+Inf"]
    sums = itertools.accumulate(float(count) for count in tally.wait_counts)
    return list(zip(bounds, sums, strict=True))
