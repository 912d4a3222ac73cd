"""Containers on bad days, through the whole gateway: what fails is said, seen soon, and harms nobody else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_crashes import Load, Stream
from tests.support import containers
from tests.support.contained import Fleet, contained
from tests.support.docker_proxy import Proxy
from tests.support.gateway import Gateway, wait_for

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]  # the image may have to be built first

Make = Callable[..., Gateway]

EATS_ALL = "x = []\nwhile True: x.append(bytearray(b'1' * 2**20))"
SILENT = "import time; time.sleep(600)"


def program(text: str, **keys: Any) -> dict[str, Any]:
    """A model whose container runs a Python program of our own."""
    return {"engine": "command", "command": ["python", "-c", text, "{port}"], "vram": "2GiB", **keys}


def is_back(one: Gateway, old: int) -> bool:
    """Lifecycle runs, and isn't the one that was killed."""
    return one.pids("tidegate_lifecycle") not in ([], [old])


def serves_alone(one: Gateway, name: str) -> bool:
    """There is one instance, ready, of that model."""
    return [(item["model"], item["state"]) for item in one.instances()] == [(name, "ready")]


@contextmanager
def stopped(one: Gateway) -> Iterator[None]:
    """The gateway is stopped before what it works with is taken away."""
    try:
        yield
    finally:
        one.stop()


def test_starts_that_fail_are_said_at_once_and_harm_nobody(gateway: Make, fleet: Fleet) -> None:
    """Exits at once, is killed for its memory, is never healthy: the caller is told why, nothing remains."""
    models = {
        "good": contained(vram="2GiB"),
        "exits": program("print('CUDA out of memory'); raise SystemExit(3)"),
        "eats": program(EATS_ALL),
        "silent": program(SILENT, start_timeout="1s"),
    }
    one = gateway(models, lifecycle=fleet.lifecycle).start()
    assert one.chat("good").status_code == 200
    load = Load(one, "good")
    told = {name: one.chat(name) for name in ("exits", "eats", "silent")}
    load.end()
    statuses = {name: answer.status_code for name, answer in told.items()}
    assert (statuses["exits"], statuses["eats"]) == (503, 503)
    assert statuses["silent"] in (503, 504)  # by lifecycle's verdict or admission's own clock
    assert "exit status 3" in told["exits"].text
    assert "CUDA out of memory" in told["exits"].text
    assert "memory" in told["eats"].text
    again = one.chat("silent")
    assert (again.status_code, "deadline" in again.text) == (503, True), again.text
    assert all(int(told[name].headers["retry-after"]) >= 1 for name in ("exits", "eats"))
    assert set(load.statuses) == {200}
    wait_for(lambda: fleet.listed() == fleet.listed("good"), "nothing is left of the others")


@pytest.mark.parametrize("how", ["killed", "removed", "stopped", "paused"])
def test_what_is_done_to_a_container_by_hand_is_seen_and_mended(
    gateway: Make, fleet: Fleet, how: str
) -> None:
    """Its end is seen within two seconds; a paused one fails its health checks. A new one serves."""
    one = gateway({"a": contained(vram="2GiB")}, lifecycle=fleet.lifecycle).start()
    assert one.chat("a").status_code == 200
    (before,) = fleet.listed("a")
    with containers.engine() as client:
        if how == "killed":
            client.kill(before)
        elif how == "removed":
            client.remove_container(before, force=True)
        elif how == "stopped":
            client.stop(before, timeout=1)
        else:
            client.pause(before)
    began = time.monotonic()
    wait_for(lambda: one.status()["models"]["a"]["restarts"] == 1, "its end is seen", 40)
    if how != "paused":
        assert time.monotonic() - began < 2
    wait_for(lambda: before not in fleet.listed("a"), "the old container has gone", 30)
    assert one.chat("a").status_code == 200
    assert before not in fleet.listed("a")


def test_a_killed_lifecycle_leaves_no_container_twice_and_none_behind(gateway: Make, fleet: Fleet) -> None:
    """kill -9 in the middle of starts, evictions, drains and stops: each time it finds its way back."""
    models = {name: contained("--load-time", "1", vram="18GiB") for name in ("a", "b")}
    lifecycle = {"min_residency": "0s", "max_swap_wait": "0s", **fleet.lifecycle}
    one = gateway(models, lifecycle=lifecycle).start()
    for name, pause in (("a", 0.1), ("b", 0.5), ("a", 1.0), ("b", 1.5)):
        asked = Stream(one, name, 3)
        asked.first.wait(pause)  # somewhere in its start, or in the other one's end
        old = one.kill("lifecycle")
        wait_for(partial(is_back, one, old), "lifecycle is back")
        asked.join(60)
        assert asked.complete, (asked.error, asked.text)
        wait_for(lambda: len(fleet.listed()) == 1, "one container is left, the one that serves", 20)
        wait_for(partial(serves_alone, one, name), f"{name} is the one")


def test_a_daemon_that_is_stopped_or_answers_500_is_survived(
    gateway: Make, fleet: Fleet, tmp_path: Path
) -> None:
    """Models that run are served meanwhile; a start fails with the reason, and works when it is mended."""
    proxy = Proxy(tmp_path)
    models = {name: contained(vram="2GiB") for name in ("a", "b", "c")}
    one = gateway(models, environ=proxy.environ, lifecycle=fleet.lifecycle).start()
    with stopped(one):
        assert one.chat("a").status_code == 200
        load = Load(one, "a")
        proxy.answer(".*/containers/create.*", 500, {"message": "the disk is full"})
        answer = one.chat("b")
        assert answer.status_code == 503
        assert "the disk is full" in answer.text
        proxy.lift()
        proxy.cut()
        refused = one.chat("c")
        assert refused.status_code == 503
        assert "Docker" in refused.text
        (running,) = fleet.listed("a")
        proxy.mend()
        wait_for(lambda: one.chat("b").status_code == 200, "b starts", 30)
        wait_for(lambda: one.chat("c").status_code == 200, "c starts", 30)
        load.end()
        assert set(load.statuses) == {200}
        assert fleet.listed("a") == [running]
    proxy.close()
