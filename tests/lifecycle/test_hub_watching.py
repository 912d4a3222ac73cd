"""Downloads as they are told: events, what remains, and the words for those who wait."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.lifecycle.v1 import lifecycle_pb2 as pb
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.hub.prepare import Progress
from tidegate_lifecycle.hub.watching import Fetches, status
from tidegate_lifecycle.instance import Instance
from tidegate_lifecycle.supply import ModelView

GIB = 2**30
INSTANCE = Instance("i", "m", (), 0, 0.0)
LOADING = ModelView(Model("m"), pb.MODEL_STATE_LOADING, None, ready_at=5.0)


def test_an_event_for_each_tenth() -> None:
    """Begun, each tenth that is reached, done; what was there already counts as there, not as fast."""
    fetches = Fetches()
    assert fetches.take("i", Progress(4 * GIB, 10 * GIB), 0.0) == ("download_started", "40 % of 10.0 GiB")
    assert fetches.take("i", Progress(4 * GIB + GIB // 2, 10 * GIB), 10.0) is None
    assert fetches.take("i", Progress(6 * GIB, 10 * GIB), 20.0) == (
        "downloading",
        "60 % of 10.0 GiB, 102.4 MiB/s",
    )
    assert fetches.take("i", Progress(6 * GIB + 1, 10 * GIB), 21.0) is None
    assert fetches.take("i", Progress(10 * GIB, 10 * GIB), 60.0) is not None
    assert fetches.take("i", None, 60.0) == ("downloaded", "10.0 GiB in 60 s")
    assert fetches.of([INSTANCE]) is None
    assert fetches.take("i", None, 61.0) is None


def test_one_that_ends_early_is_told_elsewhere() -> None:
    """A failure or an unload is the end of the start: no event of the download's own says it is done."""
    fetches = Fetches()
    fetches.take("i", Progress(0, 10), 0.0)
    assert fetches.take("i", None, 1.0) is None
    assert fetches.of([INSTANCE]) is None


@pytest.mark.parametrize(
    ("progress", "load_time", "ready_at"),
    [
        (Progress(3 * GIB, 10 * GIB), 20.0, 125.0),  # 2 GiB in 20 s, 7 more in 70: 20 + 70 + 20, rounded up
        (Progress(3 * GIB, 10 * GIB), None, None),
        (Progress(3 * GIB, None), 20.0, None),
        (Progress(1 * GIB, 10 * GIB), 20.0, None),
    ],
)
def test_what_remains(progress: Progress, load_time: float | None, ready_at: float | None) -> None:
    """Bytes left by the rate so far, and the learned load time after it; unknown when either is."""
    fetches = Fetches()
    fetches.take("i", Progress(1 * GIB, progress.total), 12.0)
    fetches.take("i", progress, 32.0)
    shown = fetches.shown(LOADING, [INSTANCE], load_time)
    assert shown.ready_at == ready_at
    assert shown.message.startswith("its files are being downloaded: ")


def test_only_a_model_that_loads_is_shown_so() -> None:
    """Another instance of it may serve; another model's download is none of its own."""
    fetches = Fetches()
    fetches.take("i", Progress(1, 10), 0.0)
    ready = ModelView(Model("m"), pb.MODEL_STATE_READY, None)
    assert fetches.shown(ready, [INSTANCE], None) is ready
    other = Instance("j", "n", (), 0, 0.0)
    assert fetches.shown(LOADING, [other], None) is LOADING


def test_a_partial_file_that_was_dropped() -> None:
    """The server begins anew: less is there than at first, and the rate isn't below nothing."""
    fetches = Fetches()
    fetches.take("i", Progress(100, 1000), 0.0)
    fetches.take("i", Progress(0, 1000), 10.0)
    fetch: Any = fetches.of([INSTANCE])
    assert fetch.rate == 0.0
    fetches.take("i", Progress(500, 1000), 20.0)
    fetch = fetches.of([INSTANCE])
    assert status(fetch) == pb.Download(done_bytes=500, total_bytes=1000, bytes_per_second=25)
