"""Two edges share one admission: limits hold over both; one that dies or freezes costs the other nothing."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.apart import Apart
from tests.support.crowd import Ask, Crowd
from tests.support.figures import say
from tests.support.gateway import simulated, wait_for

TTL = 2.0
SLOTS, QUEUE = 3, 5


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """Two edges and a model of few slots, and a short queue."""
    model = simulated("--token-rate", "20", max_concurrent=SLOTS, max_queue=QUEUE)
    one = Apart(tmp_path_factory.mktemp("edges"), {"a": model}, edges=2, admission={"lease_ttl": f"{TTL:g}s"})
    try:
        yield one.start()
    finally:
        one.close()


def short(rng: random.Random) -> Ask:
    """A request that takes a tenth of a second or so."""
    return Ask("a", rng.randrange(1, 5), stream=rng.random() < 0.5)


def holding(one: Apart, edge: int) -> Crowd:
    """Long streams through an edge, in all slots."""
    crowd = Crowd([one.ports[edge]], lambda _: Ask("a", 2000), workers=SLOTS, total=SLOTS)
    wait_for(lambda: one.queue("a").active == SLOTS, "all slots are taken")
    return crowd


def test_limits_hold_over_both(one: Apart) -> None:
    """Slots and queue are those of the model, whichever edge a request comes through; beyond them 429."""
    crowd = Crowd(one.ports, short, workers=20, seed=21)
    most_active = most_waiting = 0
    while min(crowd.completed(port) for port in one.ports) < 40:
        queue = one.queue("a")
        most_active, most_waiting = max(most_active, queue.active), max(most_waiting, queue.waiting)
        one.figures()
    seen = crowd.end()
    say(f"{crowd.ends()}, at most {most_active} active and {most_waiting} waiting")
    assert (most_active, most_waiting) == (SLOTS, QUEUE)
    assert {seen.end for seen in seen} == {"complete", "refused"}
    refused = [seen for seen in seen if seen.end == "refused"]
    assert {(seen.status, seen.code, seen.headers["x-queue-depth"]) for seen in refused} == {
        (429, "queue_full", str(QUEUE))
    }
    assert {seen.port for seen in refused} == set(one.ports)
    one.settled()
    assert one.ends() == {"released": one.granted()}


def test_an_edge_that_is_killed_frees_its_slots_for_the_other(one: Apart) -> None:
    """kill -9 of one edge that holds all slots: the other one's clients have them within the leases' time to
    live + 1 s; the killed one's clients see a cut; started again, it serves."""
    lost = holding(one, edge=0)
    others = Crowd([one.ports[1]], short, workers=QUEUE, seed=22)
    wait_for(lambda: one.queue("a").waiting == QUEUE, "others wait")
    one.kill("edge0")
    killed = time.monotonic()
    wait_for(others.completed, "the other edge's clients are served", TTL + 2)
    took = time.monotonic() - killed
    say(f"served {took:.2f} s after the death of the other edge")
    assert took < TTL + 1
    assert {seen.end for seen in lost.finish()} == {"cut"}
    assert one.ends()["expired"] == SLOTS
    one.start("edge0")
    wait_for(one.ready, "it is back")
    assert {seen.end for seen in Crowd([one.ports[0]], short, workers=3, total=6).finish()} == {"complete"}
    assert {seen.end for seen in others.end()} == {"complete"}
    one.settled()


def test_an_edge_that_is_frozen_frees_its_slots_for_the_other(one: Apart) -> None:
    """SIGSTOP of one edge that holds all slots: the other one's clients have them within the time to live
    + 1 s, never more than the slots at once; after SIGCONT its relays end with an error, and it serves on."""
    lost = holding(one, edge=0)
    others = Crowd([one.ports[1]], short, workers=QUEUE, seed=23)
    wait_for(lambda: one.queue("a").waiting == QUEUE, "others wait")
    one.send("edge0", signal.SIGSTOP)
    frozen = time.monotonic()
    wait_for(others.completed, "the other edge's clients are served", TTL + 2)
    assert time.monotonic() - frozen < TTL + 1
    wait_for(lambda: others.completed() > 20 and one.queue("a").active <= SLOTS, "they go on")
    one.send("edge0", signal.SIGCONT)
    ended = lost.finish()
    assert {(seen.end, seen.code) for seen in ended} == {("broken", "lease_lost")}
    assert one.ends()["expired"] == SLOTS
    assert {seen.end for seen in Crowd([one.ports[0]], short, workers=3, total=6).finish()} == {"complete"}
    assert {seen.end for seen in others.end()} == {"complete"}
    one.settled()
