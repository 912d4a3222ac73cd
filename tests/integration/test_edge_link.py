"""A bad link between edge and admission: late, cut, stalled or half-open, under load."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from tests.support.apart import Apart
from tests.support.crowd import Ask, Crowd, Leave, Seen
from tests.support.figures import say
from tests.support.gateway import simulated, wait_for

TTL = 2.0
FINE = {"complete 200"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """Two edges and two models, one of many slots and one of two; every test leaves them as they were."""
    models = {
        name: simulated("--token-rate", "20", max_concurrent=slots, max_queue=200, vram="8GiB")
        for name, slots in (("many", 16), ("few", 2))
    }
    one = Apart(tmp_path_factory.mktemp("link"), models, edges=2, admission={"lease_ttl": f"{TTL:g}s"})
    try:
        one.start()
        asks = iter([Ask("many"), Ask("few")])
        assert ends(Crowd(one.ports[:1], lambda _: next(asks), workers=1, total=2).finish()) == FINE
        yield one
    finally:
        one.close()


@pytest.fixture
def one(running: Apart) -> Iterator[Apart]:
    """The same, with counts that begin at nothing; its link is a good one again afterwards."""
    running.mark()
    yield running
    running.links[0].restore()


def short(rng: random.Random, model: str = "few") -> Ask:
    """A request that takes a tenth of a second or so."""
    return Ask(model, rng.randrange(1, 5), stream=rng.random() < 0.5)


def shorter(rng: random.Random) -> Ask:
    """The same, for the model of many slots."""
    return short(rng, "many")


def restless(rng: random.Random) -> Ask:
    """The same, and every other client goes away at whatever moment."""
    leave = Leave(seconds=rng.uniform(0, 1.5), how=rng.choice(["close", "reset"]))
    return Ask("many", rng.randrange(1, 5), rng.random() < 0.5, leave if rng.random() < 0.5 else Leave())


def streams(one: Apart, tokens: int, model: str = "few") -> Crowd:
    """Two streams through the first edge, once they hold their leases."""
    crowd = Crowd(one.ports[:1], lambda _: Ask(model, tokens), workers=2, total=2)
    wait_for(lambda: one.queue(model).active == 2, "the streams have their leases")
    return crowd


def ends(seen: list[Seen]) -> set[str]:
    """All the ways in which requests ended."""
    return {f"{one.end} {one.status} {one.code}".strip() for one in seen}


def test_a_link_that_is_late_loses_and_doubles_no_grant(one: Apart) -> None:
    """300 ms each way, and clients that leave while their grants are on the way: every grant is released."""
    one.links[0].delay(up=0.3, down=0.3)
    crowd = Crowd(one.ports[:1], restless, workers=24, seed=1)
    wait_for(lambda: one.figures() and len(crowd.seen) > 120, "requests are served", 30)
    seen = crowd.end()
    one.settled()
    say(f"{crowd.ends()} granted {one.granted()} {one.ends()}")
    assert {"complete 200", "left 0"} <= ends(seen) <= {"complete 200", "left 0", "left 200"}
    assert one.ends() == {"released": one.granted()}
    assert one.granted() >= sum(seen.status == 200 for seen in seen)


def test_a_link_that_is_cut_again_and_again(one: Apart) -> None:
    """Reset at any moment, late or not: long streams and short requests all end with complete answers."""
    long = streams(one, tokens=160, model="many")
    crowd = Crowd(one.ports[:1], shorter, workers=12, seed=2)
    for number in range(8):
        goal = len(crowd.seen) + 10
        wait_for(lambda least=goal: one.figures() and len(crowd.seen) >= least, "requests are served")  # type: ignore[misc]
        one.links[0].delay(up=0.05 * (number % 2), down=0.05 * (number % 3))
        one.links[0].cut()
    seen = crowd.end()
    assert ends([*seen, *long.finish()]) == FINE
    one.settled()
    say(f"{crowd.ends()} granted {one.granted()} {one.ends()}")
    assert "expired" not in one.ends()


def test_a_short_stall_costs_nothing(one: Apart) -> None:
    """Nothing moves for half of the leases' time to live: all goes on afterwards, nothing has expired."""
    crowd = Crowd(one.ports[:1], shorter, workers=8, seed=3)
    wait_for(lambda: crowd.completed() > 10, "requests are served")
    one.links[0].stall()
    session = one.session(0)
    assert session is not None
    wait_for(lambda: (one.session(0) or session).silent_ms > TTL * 500, "it was silent for half its time")
    one.links[0].restore()
    since = time.monotonic()
    wait_for(lambda: crowd.completed(since=since) > 10, "requests are served again", 5)
    assert ends(crowd.end()) == FINE
    one.settled()
    assert one.ends() == {"released": one.granted()}


def test_what_was_given_away_during_a_stall_is_told(one: Apart) -> None:
    """Stalled for longer than the leases live, on a stream that stays open: slots go to others in time; when
    the link moves again, the edge is told which leases it lost, and ends these relays with an error."""
    long = streams(one, tokens=1000)
    one.links[0].stall("up")
    stalled = time.monotonic()
    others = Crowd([one.ports[1]], short, workers=4, seed=4)
    wait_for(others.completed, "others get the slots", TTL + 2)
    assert time.monotonic() - stalled < TTL + 1 + 1.0
    one.links[0].restore()
    assert ends(long.finish()) == {"broken 200 lease_lost"}
    assert ends(others.end()) == FINE
    one.settled()
    assert one.ends()["expired"] == 2
    assert ends(Crowd([one.ports[0]], short, workers=2, total=4).finish()) == FINE


def test_an_edge_that_is_cut_off_keeps_its_relays_and_states_them_later(one: Apart) -> None:
    """Its slots are free for others within the leases' time to live + 1 s, while its streams go on; when the
    link comes back they are stated, and those whose slots were given to others are told and end."""
    long = streams(one, tokens=400)
    others = Crowd([one.ports[1]], lambda rng: Ask("few", rng.randrange(15, 25)), workers=4, seed=5)
    wait_for(lambda: one.queue("few").waiting == 4, "others wait")
    one.links[0].cut(refuse=True)
    cut = time.monotonic()
    wait_for(lambda: others.completed() or one.ends().get("expired"), "the leases end", TTL + 1)
    assert time.monotonic() - cut > TTL / 2, "not before their time"
    wait_for(lambda: others.completed() >= 2, "others are served")
    assert not long.seen
    one.links[0].restore()
    wait_for(one.connected, "the session is open again", 3)
    assert one.queue("few").active <= 2
    assert ends(long.finish()) == {"broken 200 lease_lost"}
    assert ends(others.end()) == FINE
    one.settled()
    assert (one.ends()["expired"], one.restated()) == (2, 0)


def test_heartbeats_that_vanish_end_the_leases_and_their_relays(one: Apart) -> None:
    """Half-open, from the edge to admission alone: the slots are free within the time to live + 1 s, the edge
    hears of it, and opens a new stream by itself."""
    openings = one.openings()
    long = streams(one, tokens=1000)
    one.links[0].swallow("up", fresh=False)
    began = time.monotonic()
    others = Crowd([one.ports[1]], short, workers=4, seed=6)
    assert ends(long.finish()) == {"broken 200 lease_lost"}
    assert time.monotonic() - began < TTL + 1
    wait_for(others.completed, "others get the slots", 2)
    wait_for(lambda: one.openings() == openings + 1, "the edge has a new stream", TTL * 4 / 3 + 2)
    assert ends(others.end()) == FINE
    assert ends(Crowd([one.ports[0]], short, workers=2, total=4).finish()) == FINE
    one.settled()


def test_a_half_open_link_is_noticed_by_the_edge(one: Apart) -> None:
    """Connections go silent and stay up, new ones work: after 4/3 of the time to live the edge opens a new
    stream on a new connection, its relays go on, and what waits is served."""
    openings = one.openings()
    long = streams(one, tokens=120)
    waiting = Crowd(one.ports[:1], short, workers=4, seed=7, total=8)
    wait_for(lambda: one.queue("few").waiting == 4, "others wait")
    one.links[0].swallow(fresh=False)
    wait_for(lambda: one.openings() == openings + 1, "the edge has a new stream", TTL * 4 / 3 + 2)
    assert ends([*long.finish(), *waiting.finish()]) == FINE
    one.settled()
    assert (one.ends()["expired"], one.restated()) == (2, 2), (
        "given up by admission just before, then stated again"
    )


def test_a_link_that_comes_up_half_open(one: Apart) -> None:
    """What stands before admission accepts connections and swallows what comes: an edge that is started then
    answers 503 and lives, and serves as soon as admission can be reached."""
    one.kill("edge0")
    one.links[0].swallow()
    one.start("edge0")
    wait_for(lambda: one.lives() and one.links[0].connections(), "the edge has connected")
    wait_for(lambda: "catalogue" not in one.get(0, "/ready").text, "it knows the catalogue")
    seen = Crowd(one.ports[:1], short, workers=1, total=1).finish()
    assert ends(seen) == {"refused 503 server_is_overloaded"}
    one.links[0].restore()
    wait_for(one.ready, "the edge is ready", 5)
    assert ends(Crowd(one.ports[:1], short, workers=1, total=2).finish()) == FINE
    one.settled()
