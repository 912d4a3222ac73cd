"""Deadlines, estimates and affinity as callers see them, through all services."""

from __future__ import annotations

import concurrent.futures
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.gateway import Gateway, simulated, wait_for

Make = Callable[..., Gateway]
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def ask(one: Gateway, model: str, tokens: int = 4, timeout: float = 60.0, **headers: str) -> httpx.Response:
    """A chat with header fields: `x_y` is `x-y`."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"model": model, "messages": HELLO, "max_tokens": tokens}
    return one.http.post(CHAT, json=body, headers=fields, timeout=timeout)


def timed(one: Gateway, model: str, **words: Any) -> tuple[httpx.Response, float]:
    """The same, and how long it took."""
    begun = time.monotonic()
    return ask(one, model, **words), time.monotonic() - begun


def gone(one: Gateway, model: str) -> bool:
    """It has no server any more: one that drains would come back for a new request."""
    return all(instance["model"] != model for instance in one.instances())


def state(one: Gateway, model: str) -> str:
    """A model's state."""
    return str(one.status()["models"][model]["state"])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway for tests whose models don't disturb each other."""
    models = {
        "cold": simulated("--load-time", "2", vram="1GiB", idle_timeout="1s"),
        "slow": simulated("--load-time", "2", vram="1GiB"),
        "busy": simulated("--token-rate", "20", vram="1GiB", max_concurrent=1),
        "half": simulated("--ttft", "0.5", vram="1GiB", max_concurrent=1, max_queue=4),
        "twice": simulated("--token-rate", "20", vram="1GiB", max_concurrent=2, instances=2),
    }
    config = {
        "models": models,
        "edge": {"keepalive_after": "1s"},
        "admission": {"queue_timeout": "1500ms"},
    }
    one = Gateway(tmp_path_factory.mktemp("deadlines"), config)
    try:
        yield one.start()
    finally:
        one.close()


def test_a_deadline_shorter_than_the_load_is_refused_at_once_and_a_retry_finds_the_model(
    shared: Gateway,
) -> None:
    """A14: refused in no time with the estimate; the model is loaded for nobody but the one who was refused,
    and his retry is served."""
    first, took = timed(shared, "cold", x_tidegate_deadline_ms="60000")
    assert first.status_code == 200, "an unknown load time refuses nobody"
    wait_for(lambda: gone(shared, "cold"), "the idle model is stopped")
    refused, at_once = timed(shared, "cold", x_tidegate_deadline_ms="1500")
    assert refused.status_code == 504
    error = refused.json()["error"]
    assert (error["code"], error["type"]) == ("deadline_unreachable", "timeout_error")
    assert at_once < 1.4, "at once, not when the deadline has passed"
    said = re.search(r"ready in (\d+\.\d) s", error["message"])
    assert said
    learned = float(said.group(1))
    assert 2.0 <= learned <= took + 0.1
    assert learned <= int(refused.headers["retry-after"]) <= learned * 1.2 * 1.25 + 1
    assert "x-should-retry" not in refused.headers
    wait_for(lambda: state(shared, "cold") in ("loading", "ready"), "the interest starts it", 5)
    again = ask(shared, "cold", x_tidegate_deadline_ms="30000")
    assert again.status_code == 200
    assert shared.status()["models"]["cold"]["loads"] == 2
    wait_for(shared.is_idle, "counts return to 0")


def test_while_a_model_loads_its_start_deadline_bounds_the_wait(shared: Gateway) -> None:
    """A load that takes longer than the queue timeout refuses nobody."""
    answer, took = timed(shared, "slow")
    assert answer.status_code == 200
    assert took > 1.5, "longer than the queue timeout"


def test_waiting_ends_by_the_callers_deadline_and_by_the_queue_timeout(shared: Gateway) -> None:
    """A7: each is answered within a second of its time; a caller that leaves leaves the queue."""
    assert ask(shared, "busy").status_code == 200
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        holder = pool.submit(ask, shared, "busy", 90)
        wait_for(lambda: shared.queue("busy")["active"] == 1, "the slot is taken")
        own = pool.submit(timed, shared, "busy", x_tidegate_deadline_ms="600")
        queued = pool.submit(timed, shared, "busy")
        with pytest.raises(httpx.ReadTimeout):
            ask(shared, "busy", timeout=0.3)
        wait_for(lambda: shared.queue("busy")["waiting"] <= 2, "the one that left has left the queue", 1)
        answer, took = own.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert 0.55 <= took <= 2.1
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
        answer, took = queued.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "queue_timeout")
        assert 1.45 <= took <= 3.0
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert shared.queue("busy")["waiting"] == 0
        assert holder.result().status_code == 200
    wait_for(shared.is_idle, "counts return to 0")


def test_retry_after_is_made_of_measured_service_times(shared: Gateway) -> None:
    """A8: with four of half a second before it on one slot, about two seconds; and 429 always has it."""
    for _ in range(4):
        _, took = timed(shared, "half")
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        running = [pool.submit(ask, shared, "half") for _ in range(5)]
        wait_for(lambda: shared.queue("half")["waiting"] == 4, "the queue is full", 5)
        refused = ask(shared, "half")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        # Jitter of admission and edge, and whole seconds; the fastest and slowest of the service times.
        assert 4 * 0.5 * 0.75 <= int(refused.headers["retry-after"]) <= 4 * max(took, 0.6) * 1.2 * 1.25 + 1
        assert {one.result().status_code for one in running} <= {200, 504}
    wait_for(shared.is_idle, "counts return to 0")


def test_waiting_streams_hear_their_own_places(gateway: Make) -> None:
    """A8, E9: three wait behind one; the comments tell each its place, and it falls as others are served."""
    one = gateway(
        {"a": simulated("--token-rate", "20", max_concurrent=1)}, edge={"keepalive_after": "500ms"}
    ).start()
    assert ask(one, "a", tokens=25).status_code == 200

    def listen(number: int) -> list[str]:
        body = {"model": "a", "messages": HELLO, "max_tokens": 25, "stream": True}
        with one.http.stream("POST", CHAT, json=body) as stream:
            return [line for line in stream.iter_lines() if line.startswith(": ")]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        holder = pool.submit(ask, one, "a", 40)
        wait_for(lambda: one.queue("a")["active"] == 1, "the slot is taken")
        streams = []
        for number in range(1, 4):
            streams.append(pool.submit(listen, number))
            wait_for(lambda n=number: one.queue("a")["waiting"] == n, "it waits")  # type: ignore[misc]
        heard = [stream.result() for stream in streams]
        assert holder.result().status_code == 200
    for number, lines in enumerate(heard, 1):
        places = [int(found.group(1)) for line in lines if (found := re.match(r": queued (\d+)", line))]
        assert places[0] == number, lines
        assert places == sorted(places, reverse=True), lines
        assert places[-1] == 1, lines
    assert any("about" in line for line in heard[2]), heard[2]
    wait_for(one.is_idle, "counts return to 0")


def test_requests_of_one_affinity_stay_on_their_instance(shared: Gateway) -> None:
    """With two instances: the same one again for the same x-tidegate-affinity, wherever it was first."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        crowd = [pool.submit(ask, shared, "twice", 30) for _ in range(4)]
        wait_for(lambda: ready(shared, "twice") == 2, "a second instance is started for those who wait")
        for one in crowd:
            one.result()
        wait_for(shared.is_idle, "counts return to 0")
        holder = pool.submit(ask, shared, "twice", 60, x_tidegate_affinity="one")
        wait_for(lambda: shared.queue("twice")["active"] == 1, "it is served")
        second = served_by(shared, "two")
        again = {served_by(shared, "one") for _ in range(3)}
        assert second not in again, "the one with most free slots"
        assert again == {holder.result().headers["x-tidegate-instance"]}, "though the other is freer"
    assert {served_by(shared, "two") for _ in range(3)} == {second}
    seen = httpx.get(f"{address(shared, second)}/simulator/requests", trust_env=False).json()
    sent = [name.lower() for request in seen["requests"] for name, _ in request["headers"]]
    assert "x-tidegate-affinity" not in sent
    wait_for(shared.is_idle, "counts return to 0")


def served_by(one: Gateway, affinity: str) -> str:
    """The instance that serves a request."""
    return str(ask(one, "twice", x_tidegate_affinity=affinity).headers["x-tidegate-instance"])


def ready(one: Gateway, model: str) -> int:
    """How many instances of a model serve."""
    return sum(item["model"] == model and item["state"] == "ready" for item in one.instances())


def address(one: Gateway, instance: str) -> str:
    """Where an instance is."""
    return str(next(item["address"] for item in one.instances() if item["instance_id"] == instance))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("x-tidegate-deadline-ms", "0", "from 1 to 86400000, not `0`"),
        ("x-tidegate-deadline-ms", "-5", "from 1 to 86400000, not `-5`"),
        ("x-tidegate-deadline-ms", "soon", "from 1 to 86400000, not `soon`"),
        ("x-tidegate-deadline-ms", "1.5", "from 1 to 86400000, not `1.5`"),
        ("x-tidegate-deadline-ms", "86400001", "from 1 to 86400000, not `86400001`"),
        ("x-tidegate-deadline-ms", "9" * 300, "(300 characters)"),
        ("x-tidegate-affinity", "a b", "1 to 128 visible ASCII characters, not `a b`"),
        ("x-tidegate-affinity", "x" * 129, "(129 characters)"),
    ],
)
def test_a_bad_header_is_named_with_its_value_and_range(
    shared: Gateway, name: str, value: str, words: str
) -> None:
    """400 in OpenAI's envelope, before anything is queued."""
    body = {"model": "busy", "messages": HELLO}
    answer = shared.http.post(CHAT, json=body, headers={name: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_header")
    assert name in error["message"]
    assert words in error["message"]
    assert len(error["message"]) < 200
