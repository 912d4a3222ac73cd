"""Starts that fail, as callers see them: through all services, with real model servers."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.lifecycle.harness import SERVER
from tests.support.gateway import Gateway, simulated, wait_for

Make = Callable[..., Gateway]


def killed(folder: Path, after: float) -> dict[str, Any]:
    """A model whose server is killed while it loads; it counts its starts."""
    flags = ["--starts", str(folder / "starts"), "--load", "3600", "--killed-after", str(after)]
    return {
        "engine": "command",
        "command": [sys.executable, str(SERVER), "--port", "{port}", *flags],
        "vram": "1GiB",
    }


def reason(answer: httpx.Response) -> tuple[int, str, str]:
    """What a caller is told."""
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["message"]


def test_a_hundred_callers_share_one_failed_start(gateway: Make, tmp_path: Path) -> None:
    """All who wait for a cold model hear of its one failure, with its reason and when to come back; whoever
    comes then is refused at once, until the back-off is over; and then one start is tried for all again."""
    one = gateway({"a": killed(tmp_path, 3.0)}).start()
    starts = tmp_path / "starts"
    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: one.chat("a"), range(100)))
        assert len({reason(answer) for answer in answers}) == 1
        status, code, message = reason(answers[0])
        assert (status, code) == (503, "model_failed")
        assert "signal 9" in message
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
        assert starts.read_text() == "start\n"
        begun = time.monotonic()
        if one.status()["models"]["a"]["message"] == message:  # the back-off isn't over
            assert reason(one.chat("a")) == (status, code, message)
            assert time.monotonic() - begun < 2.0
        assert wait_for(one.is_idle, "counts return to 0")
        wait_for(lambda: "a request tries again" in one.status()["models"]["a"]["message"], "it is half-open")
        again = [pool.submit(one.chat, "a") for _ in range(20)]
        wait_for(lambda: "one try is under way" in one.status()["models"]["a"]["message"], "it is tried")
        assert {reason(answer.result()) for answer in again} == {(status, code, message)}
        assert starts.read_text() == "start\n" * 2
    assert wait_for(one.is_idle, "counts return to 0")


def test_a_model_that_can_never_fit_is_refused_at_once(gateway: Make) -> None:
    """In numbers, and nothing goes for it."""
    one = gateway({"a": simulated(vram="20GiB"), "huge": simulated(vram="30GiB")}).start()
    assert one.chat("a").status_code == 200
    servers = one.servers()
    begun = time.monotonic()
    answer = one.chat("huge")
    assert time.monotonic() - begun < 2.0
    assert answer.status_code == 503
    message = answer.json()["error"]["message"]
    assert "30 GiB" in message
    assert "gpu0 24" in message
    assert one.chat("a").status_code == 200
    assert one.servers() == servers


def test_a_drained_victim_returns_when_its_beneficiary_fails(gateway: Make) -> None:
    """A model in use gives way to another one, which fails to start: those who wait for the first one are
    served by it at once, and none of them is refused."""
    models = {
        "a": simulated("--load-time", "0.3", "--token-rate", "20", vram="20GiB", max_concurrent=2),
        "b": simulated("--fault", "oom-at-start", "--load-time", "0.5", vram="20GiB"),
    }
    one = gateway(models, lifecycle={"min_residency": "0s", "max_swap_wait": "300ms"}).start()
    assert one.chat("a").status_code == 200
    over = threading.Event()
    served: list[tuple[float, int]] = []

    def use() -> None:
        while not over.is_set():
            served.append((time.monotonic(), one.chat("a", max_tokens=8).status_code))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        users = [pool.submit(use) for _ in range(3)]
        wait_for(lambda: len(served) > 3, "a serves")
        answer = one.chat("b")
        failed = time.monotonic()
        assert answer.status_code == 503
        assert "memory" in answer.json()["error"]["message"]
        wait_for(lambda: sum(at > failed for at, _ in served) > 3, "a serves again")
        over.set()
        for user in users:
            user.result()
    assert {status for _, status in served} == {200}
    model = one.status()["models"]
    assert model["a"]["loads"] == 2, "it went, and it came back once"
    assert (model["b"]["loads"], model["b"]["failed_loads"]) == (0, 1)
    assert wait_for(one.is_idle, "counts return to 0")
