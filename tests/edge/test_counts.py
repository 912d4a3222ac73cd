"""The edge's own counters and histograms are shown as prometheus_client shows its own."""

from __future__ import annotations

import prometheus_client
from prometheus_client import CollectorRegistry, generate_latest

from tidegate_edge.counts import Counter, Histogram

BOUNDS = (0.005, 0.5, 1, 600)
VALUES = (0.0, 0.005, 0.006, 0.5, 1, 1.0001, 599.9, 10_000)


def test_a_page_is_the_same_as_prometheus_clients() -> None:
    """But for `_created`, which tells when a counter was made."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    counters = (
        Counter("requests", "Requests that ended.", ["model", "status"], ours),
        prometheus_client.Counter("requests", "Requests that ended.", ["model", "status"], registry=theirs),
    )
    histograms = (
        Histogram("seconds", "How long.", ["model"], BOUNDS, ours),
        prometheus_client.Histogram("seconds", "How long.", ["model"], buckets=BOUNDS, registry=theirs),
    )
    for counter in counters:
        counter.labels("a", "200").inc()
        counter.labels("a", "200").inc(41)
        counter.labels('b"\n', "500").inc(0.5)
    for histogram in histograms:
        for value in VALUES:
            histogram.labels("a").observe(value)
        histogram.labels("b").observe(2)
    assert generate_latest(ours).decode() == "".join(
        line for line in generate_latest(theirs).decode().splitlines(keepends=True) if "_created" not in line
    )
