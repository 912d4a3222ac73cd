"""Metrics of several processes as one: counters and histograms of all that there ever were, gauges of those
that live. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from tidegate_edge.metrics import ALIKE

Families = list[tuple[str, str, str, list[tuple[str, dict[str, str], float]]]]
"""Name, help and type, and the samples: name, labels, value. As it comes out of JSON too."""

_LASTING = frozenset(("counter", "histogram", "summary"))
_CREATED = "_created"


def taken(registry: CollectorRegistry) -> Families:
    """What a process's registry holds now."""
    return [
        (
            metric.name,
            metric.documentation,
            metric.type,
            [(sample.name, dict(sample.labels), sample.value) for sample in metric.samples],
        )
        for metric in registry.collect()
    ]


class Sums(Collector):
    """Metrics, added up."""

    def __init__(self) -> None:
        self._families: dict[str, tuple[str, str]] = {}
        self._samples: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}

    def add(self, families: Families, ended: bool = False) -> None:
        """Those of one process. `ended`: it is gone, and with it what its gauges told."""
        for name, documentation, kind, samples in families:
            if ended and kind not in _LASTING:
                continue
            self._families.setdefault(name, (documentation, kind))
            sums = self._samples.setdefault(name, {})
            for sample, labels, value in samples:
                key = (sample, tuple(labels.items()))
                known = sums.get(key)
                sums[key] = value if known is None else _together(name, sample, known, value)

    def families(self) -> Families:
        """The sums, as they can be added to others."""
        return [
            (name, *self._families[name], [(key[0], dict(key[1]), value) for key, value in samples.items()])
            for name, samples in self._samples.items()
        ]

    def collect(self) -> Iterable[Metric]:
        """For prometheus_client."""
        for name, documentation, kind, samples in self.families():
            metric = Metric(name, documentation, kind)
            for sample, labels, value in samples:
                metric.add_sample(sample, labels, value)
            yield metric


def _together(family: str, sample: str, one: float, other: float) -> float:
    """What two processes tell of one series: of times of creation the first counts, of what they tell alike
    the largest; all else is summed."""
    if sample.endswith(_CREATED):
        return min(one, other)
    return max(one, other) if family in ALIKE else one + other
