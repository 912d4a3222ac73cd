"""Counters and histograms that cost next to nothing: one thread alone counts, several times for each request,
so that prometheus_client's lock and checks buy nothing. What they show is the same."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.utils import floatToGoString


class Count:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, more: float = 1.0) -> None:
        """Adds to it."""
        self.value += more


class Spread:
    """How many values lie below each of some bounds, and their sum."""

    __slots__ = ("_bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of values up to each bound, and beyond all; not cumulated."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Takes a value in."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Counter(Collector):
    """A counter by labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str], registry: CollectorRegistry) -> None:
        self._about = (name, text)
        self._labels = labels
        self._counts: dict[tuple[str, ...], Count] = {}
        registry.register(self)

    def labels(self, *values: str) -> Count:
        """The count with these labels."""
        return self._counts.setdefault(values, Count())

    def collect(self) -> Iterable[Metric]:
        """As prometheus_client asks for it."""
        family = CounterMetricFamily(*self._about, labels=self._labels)
        for values, count in list(self._counts.items()):
            family.add_metric(values, count.value)
        yield family


class Histogram(Collector):
    """A histogram by labels."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        """`bounds`: ascending; a value equal to one is counted below it."""
        self._about = (name, text)
        self._labels = labels
        self._bounds = bounds
        self._names = [floatToGoString(bound) for bound in (*bounds, float("inf"))]  # type: ignore[no-untyped-call]
        self._spreads: dict[tuple[str, ...], Spread] = {}
        registry.register(self)

    def labels(self, *values: str) -> Spread:
        """The values with these labels."""
        return self._spreads.setdefault(values, Spread(self._bounds))

    def collect(self) -> Iterable[Metric]:
        """As prometheus_client asks for it."""
        family = HistogramMetricFamily(*self._about, labels=self._labels)
        for values, spread in list(self._spreads.items()):
            below, buckets = 0, []
            for name, count in zip(self._names, spread.counts, strict=True):
                below += count
                buckets.append((name, float(below)))
            family.add_metric(values, buckets, spread.total)
        yield family
