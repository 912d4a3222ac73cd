"""All metrics of the edge. Labels are bounded: models of the catalogue, statuses, reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tidegate_edge.counts import Counter, Histogram

ALIKE = frozenset(("tidegate_edge_keys", "tidegate_edge_keys_file_refused"))
"""Gauges that tell the same in each of several workers: together they are the largest, not the sum."""
_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)


class Metrics:
    """The edge's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        one = self.registry
        self._requests = Counter(
            "tidegate_edge_requests", "Requests that ended.", ["model", "status", "outcome"], one
        )
        self._refusals = Counter("tidegate_edge_refusals", "Errors of the edge's own.", ["code"], one)
        self._duration = Histogram(
            "tidegate_edge_request_duration_seconds",
            "From a request's arrival to the end of its answer.",
            ["model"], _SECONDS, one,
        )  # fmt: skip
        self._first = Histogram(
            "tidegate_edge_time_to_first_byte_seconds",
            "From a request's arrival to the first byte of the model server's answer.",
            ["model"], _SECONDS, one,
        )  # fmt: skip
        self._queue = Histogram(
            "tidegate_edge_queue_wait_seconds",
            "From a ticket to its grant.",
            ["model"], _SECONDS, one,
        )  # fmt: skip
        self._tokens = Counter("tidegate_edge_tokens", "Tokens relayed.", ["model", "direction"], one)
        self._retries = Counter(
            "tidegate_edge_retries", "Connection failures that were tried again.", ["model"], one
        )
        self._connections = Counter(
            "tidegate_edge_upstream_requests",
            "Requests sent to model servers, by whether their connection was a kept one.",
            ["connection"], one,
        )  # fmt: skip
        # Looking a labelled metric up costs more than counting it.
        self.requests = lru_cache(4096)(lambda *labels: self._requests.labels(*labels).inc)
        self.refused = lru_cache(256)(lambda code: self._refusals.labels(code).inc)
        self.duration = lru_cache(1024)(lambda model: self._duration.labels(model).observe)
        self.first_byte = lru_cache(1024)(lambda model: self._first.labels(model).observe)
        self.queue_wait = lru_cache(1024)(lambda model: self._queue.labels(model).observe)
        self.tokens = lru_cache(2048)(lambda *labels: self._tokens.labels(*labels).inc)
        self.retried = lru_cache(1024)(lambda model: self._retries.labels(model).inc)
        self.upstream = lru_cache(2)(
            lambda reused: self._connections.labels("reused" if reused else "new").inc
        )

    def watch(self, gauges: Callable[[], dict[str, float]]) -> None:
        """Gauges that are read when asked for: sizes of sets, never numbers kept beside them."""
        self.registry.register(_Gauges(gauges))

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self.registry)


class MasterMetrics:
    """What the master of several workers counts itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ends = Counter(
            "tidegate_edge_worker_ends",
            "Worker processes that have ended: retired (renewed) or died.",
            ["end"], registry=self.registry,
        )  # fmt: skip


class _Gauges(Collector):
    _HELP = {  # noqa: RUF012 - never changed
        "workers": "Processes that serve.",
        "connections": "Connections of clients.",
        "in_flight": "Requests being worked on.",
        "buffered_bytes": "Request bodies held in memory.",
        "spooled_bytes": "Request bodies held on disk.",
        "tickets": "Tickets that wait, by this edge's sessions.",
        "leases": "Leases held, by this edge's sessions.",
        "session_connected": "Sessions whose stream admission has welcomed; each worker has one.",
        "draining": "Processes that are stopping.",
        "keys": "API keys that are valid now.",
        "keys_file_refused": "1 while the key file can't be used and what was in effect before stays.",
    }

    def __init__(self, gauges: Callable[[], dict[str, float]]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for name, value in self._gauges().items():
            family = GaugeMetricFamily(f"tidegate_edge_{name}", self._HELP[name])
            family.add_metric([], value)
            yield family
