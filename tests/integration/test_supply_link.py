"""A bad link between admission and lifecycle: late, cut or half-open, while models swap and serve."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from tests.support.apart import Apart
from tests.support.crowd import Ask, Crowd
from tests.support.figures import say
from tests.support.gateway import simulated, wait_for


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """Models that are stopped as soon as they are idle; two of them don't fit beside each other."""

    def model(vram: str) -> dict[str, object]:
        flags = ("--token-rate", "20", "--load-time", "0.2")
        return simulated(*flags, vram=vram, max_concurrent=4, idle_timeout="1s")

    names = {"left": "18GiB", "right": "18GiB", "a": "3GiB", "b": "3GiB"}
    one = Apart(
        tmp_path_factory.mktemp("supply"),
        {name: model(vram) for name, vram in names.items()},
        admission={"lease_ttl": "2s"},
        lifecycle={"min_residency": "300ms", "max_swap_wait": "600ms"},
    )
    try:
        yield one.start()
    finally:
        one.close()


@pytest.fixture
def one(running: Apart) -> Iterator[Apart]:
    """The same, with counts that begin at nothing; its link is a good one again afterwards."""
    running.mark()
    yield running
    running.supply.restore()


def swapping(rng: random.Random) -> Ask:
    """One of two models that don't fit beside each other."""
    return Ask(rng.choice(["left", "right"]), rng.randrange(1, 6), stream=rng.random() < 0.5)


def test_swaps_over_a_link_that_is_cut_and_late(one: Apart) -> None:
    """The link is late, and cut again and again, while two models take turns: nobody's answer is cut off, no
    count is lost, and both models are served to the end."""
    crowd = Crowd(one.ports, swapping, workers=12, seed=11)
    for number in range(6):
        goal = len(crowd.seen) + 12
        wait_for(lambda least=goal: one.figures() and len(crowd.seen) >= least, "requests are served", 30)  # type: ignore[misc]
        one.supply.delay(up=0.15 * (number % 3), down=0.15 * (number % 2))
        one.supply.cut()
    one.supply.restore()
    seen = crowd.end()
    one.settled()
    say(f"{crowd.ends()} granted {one.granted()} {one.ends()}")
    assert {one.end for one in seen} == {"complete"}, crowd.ends()
    assert one.ends() == {"released": one.granted()}


def test_without_lifecycle_what_runs_serves_on(one: Apart) -> None:
    """The link is down for longer than an idle model is kept: a running stream is not touched, ready models
    serve, a stopped model's caller waits; when the link is back it is served, and what is idle stops."""
    wait_for(lambda: not one.servers(), "what ran before is stopped", 30)
    stream = Crowd(one.ports, lambda _: Ask("a", 90), workers=1, total=1)
    wait_for(lambda: one.queue("a").active == 1, "a stream runs")
    servers = one.servers()
    one.supply.cut(refuse=True)
    cold = Crowd(one.ports, lambda _: Ask("b"), workers=1, total=1)
    ready = Crowd(one.ports, lambda _: Ask("a", 2), workers=2, total=6).finish()
    assert {one.end for one in ready} == {"complete"}
    (streamed,) = stream.finish()
    assert streamed.end == "complete", streamed
    assert one.servers() == servers
    assert not cold.seen
    assert one.queue("b").waiting == 1
    one.supply.restore()
    (served,) = cold.finish()
    assert served.end == "complete", served
    one.settled()
    wait_for(lambda: not one.servers(), "what is idle is stopped", 10)


def test_a_half_open_link_to_lifecycle_is_noticed(one: Apart) -> None:
    """Its connections go silent and stay up: ready models serve all the time, and the caller of a stopped one
    is served as soon as gRPC's keepalive has noticed, which takes 12 s at most."""
    assert Crowd(one.ports, lambda _: Ask("a"), workers=1, total=1).finish()[0].end == "complete"
    one.supply.swallow(fresh=False)
    began = time.monotonic()
    ready = Crowd(one.ports, lambda _: Ask("a"), workers=2, seed=12)
    (served,) = Crowd(one.ports, lambda _: Ask("b"), workers=1, total=1).finish()
    say(f"served after {time.monotonic() - began:.1f} s")
    assert served.end == "complete", served
    assert served.ended - served.began < 15
    seen = ready.end()
    assert {one.end for one in seen} == {"complete"}
    assert max(one.ended - one.began for one in seen) < 3
    one.settled()
    assert one.ends() == {"released": one.granted()}
