"""Downloads as the reconciler sees them: what it tells of them, and when they should be over. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.hub.prepare import Progress
from tidegate_lifecycle.instance import Instance
from tidegate_lifecycle.supply import ModelView

STEPS = 10
"""An event for each so many-th part."""
_ESTIMATE = 5.0
"""Seconds by which the end that is told is rounded up: not each new estimate is news."""


@dataclass(frozen=True)
class Fetch:
    """The download of one instance that is being started. Times in monotonic seconds."""

    progress: Progress
    first: int
    """Bytes that were there when it began."""
    began: float
    at: float

    @property
    def rate(self) -> float:
        """Bytes per second since it began; 0 = unknown."""
        took = self.at - self.began
        return (self.progress.done - self.first) / took if took > 0 else 0.0

    @property
    def step(self) -> int:
        """How many of its `STEPS` parts are there."""
        return self.progress.done * STEPS // self.progress.total if self.progress.total else 0

    @property
    def over_at(self) -> float | None:
        """When it should be over; None = unknown."""
        if self.progress.total is None or self.rate <= 0:
            return None
        return self.at + max(0, self.progress.total - self.progress.done) / self.rate

    def __str__(self) -> str:
        total, done = self.progress.total, self.progress.done
        part = f"{done * 100 // total} % of {_size(total)}" if total else _size(done)
        return f"{part}, {_size(int(self.rate))}/s" if self.rate else part


class Fetches:
    """The downloads that run, by instance. Only the reconciler changes them."""

    def __init__(self) -> None:
        self._of: dict[str, Fetch] = {}

    def take(self, instance_id: str, progress: Progress | None, now: float) -> tuple[str, str] | None:
        """Takes in a report; None ends it. Returns the event that it is worth, if any: kind and words."""
        before = self._of.get(instance_id)
        if progress is None:
            self._of.pop(instance_id, None)
            if before is None or before.progress.done != before.progress.total:
                return None  # it failed or was given up, which is told as the start's end
            return "downloaded", f"{_size(before.progress.done)} in {before.at - before.began:.0f} s"
        if before is None:
            self._of[instance_id] = fetch = Fetch(progress, progress.done, now, now)
            return "download_started", str(fetch)
        fetch = replace(before, progress=progress, first=min(before.first, progress.done), at=now)
        self._of[instance_id] = fetch
        return ("downloading", str(fetch)) if fetch.step > before.step else None

    def of(self, instances: Iterable[Instance]) -> Fetch | None:
        """The download of any of these instances."""
        return next((self._of[one.id] for one in instances if one.id in self._of), None)

    def shown(self, view: ModelView, instances: Iterable[Instance], load_time: float | None) -> ModelView:
        """The view of a model that loads, with what remains of its download."""
        fetch = self.of(instances) if view.state == pb.MODEL_STATE_LOADING else None
        if fetch is None:
            return view
        over_at = fetch.over_at
        known = over_at is not None and load_time is not None
        ready_at = math.ceil((over_at + load_time) / _ESTIMATE) * _ESTIMATE if known else None  # type: ignore[operator]
        return replace(view, ready_at=ready_at, message=f"its files are being downloaded: {fetch}")


def status(fetch: Fetch) -> pb.Download:
    """The wire's form."""
    return pb.Download(
        done_bytes=fetch.progress.done,
        total_bytes=fetch.progress.total or 0,
        bytes_per_second=int(max(0.0, fetch.rate)),
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
