"""Admission is away for longer than relays may go on without it."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.support.apart import Apart
from tests.support.crowd import Ask, Crowd
from tests.support.gateway import simulated, wait_for

Make = Callable[..., Apart]
GRACE = 3.0
PATIENCE = 5.0
"""How long a new request waits for admission."""


def test_relays_end_after_the_control_grace_and_not_before(services: Make) -> None:
    """Admission is cut off: a running stream goes on for `control_grace` and then ends with an error in the
    stream; a waiting request goes on waiting and is served in the end; a new one gets 503 after five seconds,
    with Retry-After."""
    one = services(
        {"a": simulated("--token-rate", "20", max_concurrent=1)},
        edge={"control_grace": f"{GRACE:g}s"},
        admission={"lease_ttl": "2s"},
    ).start()
    stream = Crowd(one.ports, lambda _: Ask("a", 1000), workers=1, total=1)
    wait_for(lambda: one.queue("a").active == 1, "a stream runs")
    waiter = Crowd(one.ports, lambda _: Ask("a", 2), workers=1, total=1)
    wait_for(lambda: one.queue("a").waiting == 1, "a request waits")
    one.links[0].cut(refuse=True)
    cut = time.monotonic()
    wait_for(lambda: not one.connected(), "the edge has noticed")
    late = Crowd(one.ports, lambda _: Ask("a", 2), workers=1, total=1)
    (ended,) = stream.finish()
    assert (ended.end, ended.code) == ("broken", "lease_lost"), ended
    assert b"control plane" in ended.body
    assert GRACE - 1.0 < ended.ended - cut < GRACE + 1.0, (
        "a heartbeat's time before the cut it was heard last"
    )
    (refused,) = late.finish()
    assert (refused.status, refused.code) == (503, "server_is_overloaded")
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert PATIENCE - 0.5 < refused.ended - refused.began < PATIENCE + 1.5
    assert not waiter.seen
    one.links[0].restore()
    (served,) = waiter.finish()
    assert served.end == "complete", served
    one.settled()
