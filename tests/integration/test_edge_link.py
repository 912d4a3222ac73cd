"""A bad link between edge and admission: late, cut, stalled or half-open, under load."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from tests.support.apart import Apart
from tests.support.crowd import Ask, Crowd, Leave, Seen
from tests.support.figures import say
from tests.support.gateway import simulated, wait_for

Make = Callable[..., Apart]
TTL = 2.0
ADMISSION = {"lease_ttl": f"{TTL:g}s"}


def model(slots: int, rate: int = 20) -> dict[str, object]:
    """One model whose requests take their time."""
    return {"a": simulated("--token-rate", str(rate), max_concurrent=slots, max_queue=200)}


def short(rng: random.Random) -> Ask:
    """A request that takes a tenth of a second or so."""
    return Ask("a", rng.randrange(1, 5), stream=rng.random() < 0.5)


def restless(rng: random.Random) -> Ask:
    """The same, and every other client goes away at whatever moment."""
    leave = Leave(seconds=rng.uniform(0, 1.5), how=rng.choice(["close", "reset"]))
    return Ask("a", rng.randrange(1, 5), rng.random() < 0.5, leave if rng.random() < 0.5 else Leave())


def streams(one: Apart, count: int, tokens: int, edge: int = 0) -> Crowd:
    """So many streams through an edge, once they hold their leases."""
    before = one.queue("a").active
    crowd = Crowd([one.ports[edge]], lambda _: Ask("a", tokens), workers=count, total=count)
    wait_for(lambda: one.queue("a").active == before + count, "the streams have their leases")
    return crowd


def ends(seen: list[Seen]) -> set[str]:
    """All the ways in which requests ended."""
    return {f"{one.end} {one.status} {one.code}".strip() for one in seen}


def test_a_link_that_is_late_loses_and_doubles_no_grant(services: Make) -> None:
    """300 ms each way, and clients that leave while their grants are on the way: every grant is released."""
    one = services(model(16), admission=ADMISSION).start()
    one.links[0].delay(up=0.3, down=0.3)
    crowd = Crowd(one.ports, restless, workers=24, seed=1)
    wait_for(lambda: one.figures() and len(crowd.seen) > 120, "requests are served", 30)
    seen = crowd.end()
    one.settled()
    say(f"{crowd.ends()} granted {one.granted()} {one.ends()}")
    assert {"complete 200", "left 0"} <= ends(seen) <= {"complete 200", "left 0", "left 200"}
    assert one.ends() == {"released": one.granted()}
    assert one.granted() >= sum(seen.status == 200 for seen in seen)
    assert one.figures().total("tidegate_admission_expired_sessions_total") == 0


def test_a_link_that_is_cut_again_and_again(services: Make) -> None:
    """Reset at any moment, late or not: long streams and short requests all end with complete answers."""
    one = services(model(8), admission=ADMISSION).start()
    long = streams(one, 2, tokens=160)
    crowd = Crowd(one.ports, short, workers=12, seed=2)
    for number in range(8):
        goal = len(crowd.seen) + 10
        wait_for(lambda least=goal: one.figures() and len(crowd.seen) >= least, "requests are served")  # type: ignore[misc]
        one.links[0].delay(up=0.05 * (number % 2), down=0.05 * (number % 3))
        one.links[0].cut()
    seen = crowd.end()
    assert ends([*seen, *long.finish()]) == {"complete 200"}
    one.settled()
    say(f"{crowd.ends()} granted {one.granted()} {one.ends()}")
    assert "expired" not in one.ends()


def test_a_short_stall_costs_nothing(services: Make) -> None:
    """Nothing moves for half of the leases' time to live: all goes on afterwards, nothing has expired."""
    one = services(model(4), admission=ADMISSION).start()
    crowd = Crowd(one.ports, short, workers=8, seed=3)
    wait_for(lambda: crowd.completed() > 10, "requests are served")
    one.links[0].stall()
    session = one.session(0)
    assert session is not None
    wait_for(lambda: (one.session(0) or session).silent_ms > TTL * 500, "it was silent for half its time")
    one.links[0].restore()
    since = time.monotonic()
    wait_for(lambda: crowd.completed(since=since) > 10, "requests are served again", 5)
    assert ends(crowd.end()) == {"complete 200"}
    one.settled()
    assert one.ends() == {"released": one.granted()}


def test_what_was_given_away_during_a_stall_is_told(services: Make) -> None:
    """Stalled for longer than the leases live, on a stream that stays open: slots go to others in time; when
    the link moves again, the edge is told which leases it lost, and ends these relays with an error."""
    one = services(model(2), edges=2, admission=ADMISSION).start()
    long = streams(one, 2, tokens=1000)
    one.links[0].stall("up")
    stalled = time.monotonic()
    others = Crowd([one.ports[1]], short, workers=4, seed=4)
    wait_for(others.completed, "others get the slots", TTL + 2)
    assert time.monotonic() - stalled < TTL + 1 + 1.0
    one.links[0].restore()
    assert ends(long.finish()) == {"broken 200 lease_lost"}
    assert ends(others.end()) == {"complete 200"}
    one.settled()
    assert one.ends()["expired"] == 2
    assert ends(Crowd([one.ports[0]], short, workers=2, total=4).finish()) == {"complete 200"}


def test_an_edge_that_is_cut_off_keeps_its_relays_and_states_them_later(services: Make) -> None:
    """Its slots are free for others within the leases' time to live + 1 s; its streams go on; when the link
    comes back they are stated, counted above the slots, and nobody gets a grant until there is room."""
    one = services(model(2), edges=2, admission=ADMISSION).start()
    long = streams(one, 2, tokens=170)
    others = Crowd([one.ports[1]], lambda rng: Ask("a", rng.randrange(15, 25)), workers=4, seed=5)
    wait_for(lambda: one.queue("a").waiting == 4, "others wait")
    one.links[0].cut(refuse=True)
    cut = time.monotonic()
    wait_for(lambda: others.completed() or one.ends().get("expired"), "the leases end", TTL + 1)
    assert time.monotonic() - cut > TTL / 2, "not before their time"
    wait_for(lambda: others.completed() >= 2, "others are served")
    one.links[0].restore()
    wait_for(one.connected, "the session is open again", 3)
    assert one.figures().total("tidegate_admission_restated_leases_total") == 2
    over, granted = one.queue("a").active, one.granted()
    assert 2 <= over <= 4, "over by no more than the leases of the edge that was cut off"
    while one.queue("a").active > 2:
        assert one.granted() == granted
    assert ends(long.finish()) == {"complete 200"}
    assert ends(others.end()) == {"complete 200"}
    one.settled()


def test_heartbeats_that_vanish_end_the_leases_and_their_relays(services: Make) -> None:
    """Half-open, from the edge to admission alone: the slots are free within the time to live + 1 s, the edge
    hears of it, and opens a new stream by itself."""
    one = services(model(2), edges=2, admission=ADMISSION).start()
    long = streams(one, 2, tokens=1000)
    one.links[0].swallow("up", fresh=False)
    began = time.monotonic()
    others = Crowd([one.ports[1]], short, workers=4, seed=6)
    assert ends(long.finish()) == {"broken 200 lease_lost"}
    assert time.monotonic() - began < TTL + 1
    wait_for(others.completed, "others get the slots", 2)
    wait_for(lambda: one.openings() == 3, "the edge has a new stream", TTL * 4 / 3 + 2)
    assert ends(others.end()) == {"complete 200"}
    assert ends(Crowd([one.ports[0]], short, workers=2, total=4).finish()) == {"complete 200"}
    one.settled()


def test_a_half_open_link_is_noticed_by_the_edge(services: Make) -> None:
    """Connections go silent and stay up, new ones work: after 4/3 of the time to live the edge opens a new
    stream on a new connection, its relays go on, and what waits is served."""
    one = services(model(2), admission=ADMISSION).start()
    long = streams(one, 2, tokens=120)
    waiting = Crowd(one.ports, short, workers=4, seed=7, total=8)
    wait_for(lambda: one.queue("a").waiting == 4, "others wait")
    one.links[0].swallow(fresh=False)
    wait_for(lambda: one.openings() == 2, "the edge has a new stream", TTL * 4 / 3 + 2)
    assert ends([*long.finish(), *waiting.finish()]) == {"complete 200"}
    one.settled()
    restated = one.figures().total("tidegate_admission_restated_leases_total")
    assert (one.ends()["expired"], restated) == (2, 2), "given up by admission just before, then stated again"


def test_a_link_that_comes_up_half_open(services: Make) -> None:
    """Admission is behind something that accepts connections and swallows what comes: as soon as it is there,
    the edge reaches it; until then it answers 503 and lives."""
    one = services(model(2), admission=ADMISSION)
    one.links[0].swallow()
    one.start("lifecycle", "admission", "edge0")
    wait_for(lambda: one.links[0].connections() and one.lives(), "the edge has connected")
    seen = Crowd(one.ports, short, workers=1, total=1).finish()
    assert ends(seen) == {"refused 503 server_is_overloaded"}
    one.links[0].restore()
    wait_for(one.ready, "the edge is ready", 5)
    assert ends(Crowd(one.ports, short, workers=1, total=2).finish()) == {"complete 200"}
    one.settled()
