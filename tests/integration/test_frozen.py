"""SIGSTOP and kill -9 of services that run apart, under load, one after the other."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.apart import Apart
from tests.support.crowd import Ask, Crowd, Leave
from tests.support.figures import say
from tests.support.gateway import simulated, wait_for

TTL = 2.0
SLOTS = 4


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """Two edges and three models."""
    model = simulated("--token-rate", "30", max_concurrent=SLOTS, vram="5GiB")
    models = {name: dict(model) for name in ("a", "b", "cold")}
    one = Apart(tmp_path_factory.mktemp("frozen"), models, edges=2, admission={"lease_ttl": f"{TTL:g}s"})
    try:
        yield one.start()
    finally:
        one.close()


def restless(rng: random.Random) -> Ask:
    """A short request for one of two models; every third client goes away at whatever moment."""
    leave = Leave(seconds=rng.uniform(0, 1), how=rng.choice(["close", "reset"]))
    model, stream = rng.choice("ab"), rng.random() < 0.5
    return Ask(model, rng.randrange(1, 5), stream, leave if rng.random() < 0.33 else Leave())


def test_a_frozen_lifecycle_stops_nothing_that_runs(one: Apart) -> None:
    """SIGSTOP of lifecycle: ready models serve as ever, a stopped one's caller waits; after SIGCONT it
    is served, the servers are the same, and nothing has expired."""
    stream = Crowd(one.ports[:1], lambda _: Ask("a", 160), workers=1, total=1)
    wait_for(lambda: one.queue("a").active == 1, "a stream runs")
    servers = one.servers()
    one.send("lifecycle", signal.SIGSTOP)
    frozen = time.monotonic()
    cold = Crowd(one.ports[:1], lambda _: Ask("cold"), workers=1, total=1)
    ready = Crowd(one.ports[:1], lambda _: Ask("a", 2), workers=4, seed=31)
    wait_for(lambda: ready.completed(since=frozen + TTL + 1), "requests are served all the time")
    assert not cold.seen
    one.send("lifecycle", signal.SIGCONT)
    (served,) = cold.finish()
    seen = ready.end()
    assert served.end == "complete", served
    assert {seen.end for seen in [*seen, *stream.finish()]} == {"complete"}
    assert max(seen.ended - seen.began for seen in seen) < 2
    assert set(servers) < set(one.servers())
    one.settled()
    assert one.ends() == {"released": one.granted()}


def test_each_service_frozen_and_killed_under_load(one: Apart) -> None:
    """Each is frozen for longer than leases live, then killed, in turn: clients see complete answers, errors
    to be retried, or the death of the edge they were connected to; nothing is left over."""
    crowd = Crowd(one.ports, restless, workers=16, seed=32)

    def all_serve(after: str) -> None:
        now = time.monotonic()
        wait_for(
            lambda: one.linked() and all(crowd.completed(port, now) > 5 for port in one.ports),
            f"both edges serve, and models can be started, after {after}",
        )

    all_serve("the start")
    for service in ("edge0", "admission", "lifecycle"):
        one.send(service, signal.SIGSTOP)
        thaw = time.monotonic() + TTL + 0.5
        wait_for(lambda then=thaw: time.monotonic() > then, "longer than leases live")  # type: ignore[misc]
        one.send(service, signal.SIGCONT)
        all_serve(f"{service} was frozen")
        one.kill(service)
        one.start(service)
        all_serve(f"{service} was killed")
    seen = crowd.end()
    say(f"{crowd.ends()}")
    one.settled()
    assert {seen.end for seen in seen} <= {"complete", "left", "refused", "broken", "cut", "unreachable"}
    assert {seen.port for seen in seen if seen.end in ("cut", "unreachable")} <= {one.ports[0]}
    errors = {(seen.status, seen.code) for seen in seen if seen.end in ("refused", "broken")}
    assert errors <= {(200, "lease_lost"), (503, "lease_lost"), (503, "server_is_overloaded")}, errors
