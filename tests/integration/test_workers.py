"""An edge of two workers: one port, one set of limits and figures; each can die or be renewed alone."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.support.apart import Apart
from tests.support.crowd import Ask, Crowd
from tests.support.figures import Figures, scrape
from tests.support.gateway import Gateway, free_port, simulated, wait_for

SLOTS, QUEUE = 4, 5
METRICS = free_port()
REQUESTS = "tidegate_edge_requests_total"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """Two workers, and a model of few slots and a short queue."""
    one = Apart(
        tmp_path_factory.mktemp("workers"),
        {
            "a": simulated("--token-rate", "40", max_concurrent=SLOTS, max_queue=QUEUE),
            "wide": simulated("--token-rate", "40", max_concurrent=200, always_on=True, vram="2GiB"),
        },
        edge={"workers": 2, "metrics_listen": f"127.0.0.1:{METRICS}", "drain_timeout": "30s"},
        admission={"lease_ttl": "2s"},
    )
    try:
        yield one.start()
    finally:
        one.close()


def short(rng: random.Random) -> Ask:
    """A request that takes a tenth of a second or so, on a connection that is used again."""
    return Ask("wide", rng.randrange(1, 5), stream=rng.random() < 0.5, keep=True)


def told(one: Apart) -> list[dict[str, Any]]:
    """The workers, as the status tells them."""
    found: list[dict[str, Any]] = one.get(0, "/gateway/status").json()["edge"]["workers"]
    return found


def pids(one: Apart) -> dict[int, int]:
    """The workers that serve; waits until that is both, and no other process is there."""

    def both() -> dict[int, int] | None:
        try:
            workers = told(one)
        except httpx.TransportError:
            return None
        states = [(worker["state"], worker.get("session_connected")) for worker in workers]
        fine = states == [("serving", 1)] * 2
        return {worker["worker"]: worker["pid"] for worker in workers} if fine else None

    found: dict[int, int] = wait_for(both, "two workers serve, and no other", 60)
    return found


def counted(figures: Figures) -> float:
    """Requests that had their answer."""
    return figures.total(REQUESTS, outcome="ok")


def test_two_processes_are_one_edge(one: Apart) -> None:
    """Both serve; whichever is asked, and the port for metrics alone, tell the sum of both, and the status
    names both; so do the log's lines."""
    before = counted(one.edge_figures())
    crowd = Crowd(one.ports, short, workers=8, total=60, seed=1)
    assert {seen.end for seen in crowd.finish()} == {"complete"}
    one.settled()
    everywhere = [one.edge_figures() for _ in range(6)] + [scrape(f"127.0.0.1:{METRICS}")]
    assert {counted(figures) - before for figures in everywhere} == {60}
    assert {figures.total("tidegate_edge_workers") for figures in everywhere} == {2}
    assert {figures.total("tidegate_edge_session_connected") for figures in everywhere} == {2}
    workers = told(one)
    assert [worker["worker"] for worker in workers] == [1, 2]
    assert len({worker["session"] for worker in workers}) == 2
    assert {worker["pid"] for worker in workers} < set(one.base.pids("tidegate_edge"))

    def both_have_logged() -> bool:
        """A worker that had no turn may have got none of eight connections; others follow."""
        return logged(one) == {"1", "2"} or not Crowd(one.ports, short, workers=8, total=16, seed=2).finish()

    wait_for(both_have_logged, "each has logged requests", 60)


def logged(one: Apart) -> set[str]:
    """Workers in the log's lines about requests."""
    lines = [line for line in one.log().splitlines() if "] request " in line]
    return {line.rpartition("worker=")[2] for line in lines}


def test_connections_are_shared_out(one: Apart) -> None:
    """Of twenty connections neither worker has nearly all: whoever has more leaves them to the other."""
    clients = [httpx.Client(trust_env=False) for _ in range(20)]
    for client in clients:
        assert client.get(f"http://127.0.0.1:{one.ports[0]}/health").status_code == 200
    shares = sorted(worker["connections"] for worker in told(one))
    assert sum(shares) >= 20
    assert shares[0] >= 5
    for client in clients:
        client.close()


def test_limits_hold_over_both(one: Apart) -> None:
    """Slots and queue are those of the model, whichever worker a request comes through; beyond them 429."""
    plan = lambda rng: Ask("a", rng.randrange(1, 9))  # noqa: E731
    crowd = Crowd(one.ports, plan, workers=20, seed=2)
    most_active = most_waiting = 0
    while crowd.completed() < 60:
        queue = one.queue("a")
        most_active, most_waiting = max(most_active, queue.active), max(most_waiting, queue.waiting)
        one.figures()
    seen = crowd.end()
    assert (most_active, most_waiting) == (SLOTS, QUEUE)
    assert {(seen.end, seen.code) for seen in seen} == {("complete", ""), ("refused", "queue_full")}
    one.settled()


def test_a_worker_that_is_killed_costs_its_own_requests_only(one: Apart) -> None:
    """kill -9 of one under load: streams through the other one go on; it is replaced, its leases are
    reclaimed, and nothing that was counted vanishes."""
    before = pids(one)
    streams = Crowd(one.ports, lambda _: Ask("wide", 80), workers=12, total=12)
    wait_for(lambda: one.queue("wide").active == 12, "all streams run")
    held = {worker["worker"]: worker["leases"] for worker in told(one)}
    assert min(held.values()) > 0
    was = counted(one.edge_figures())
    os.kill(before[1], signal.SIGKILL)
    after = pids(one)
    assert (after[1] != before[1], after[2]) == (True, before[2])
    ends = [seen.end for seen in streams.finish()]
    assert (ends.count("cut"), ends.count("complete")) == (held[1], held[2])
    one.settled()
    assert one.ends() == {"expired": held[1], "released": held[2]}
    figures = one.edge_figures()
    assert counted(figures) == was + held[2]
    assert figures.total("tidegate_edge_worker_ends_total", end="died") == 1


def test_workers_are_renewed_without_a_lost_request(one: Apart) -> None:
    """SIGHUP under load, with streams running and connections that are kept: every request has its answer,
    and streams that began before go on to their end. A file that is refused renews nobody.

    The new workers have read the file anew: with its shorter `drain_timeout` a stream that takes longer ends
    with an error in it when its worker alone is renewed, by a SIGHUP of its own; the other one stays.
    """
    path = one.base.folder / "edge0.yaml"
    good = path.read_text()
    before = pids(one)
    path.write_text(good + "surprise: 1\n")
    one.send("edge0", signal.SIGHUP)
    wait_for(lambda: "no worker is renewed" in one.log(), "the file is refused")
    os.kill(before[1], signal.SIGHUP)
    wait_for(lambda: "the old one stays" in one.log(), "its successor refuses the file too", 60)
    assert pids(one) == before
    settings = yaml.safe_load(good)
    settings["edge"]["drain_timeout"] = "1s"
    path.write_text(yaml.safe_dump(settings))
    total = counted(one.edge_figures())
    streams = Crowd(one.ports, lambda _: Ask("wide", 200), workers=6, total=6)
    crowd = Crowd(one.ports, short, workers=8, seed=3)
    wait_for(lambda: crowd.completed() > 20 and one.queue("wide").active >= 6, "requests come, streams run")
    one.send("edge0", signal.SIGHUP)
    wait_for(lambda: not set(pids(one).values()) & set(before.values()), "both are renewed", 60)
    further = crowd.completed() + 20
    wait_for(lambda: crowd.completed() >= further, "the new ones serve")
    seen = crowd.end()
    assert {seen.end for seen in [*seen, *streams.finish()]} == {"complete"}
    one.settled()
    figures = one.edge_figures()
    assert counted(figures) - total == len(seen) + 6
    assert figures.total("tidegate_edge_worker_ends_total", end="retired") == 2

    between = pids(one)
    stream = Crowd(one.ports, lambda _: Ask("wide", 2000), workers=1, total=1)
    holder = wait_for(lambda: next((w["worker"] for w in told(one) if w["leases"]), 0), "a stream runs")
    os.kill(between[holder], signal.SIGHUP)
    (long,) = stream.finish()
    assert (long.end, long.code) == ("broken", "draining")
    after = pids(one)
    assert {number for number in after if after[number] != between[number]} == {holder}
    assert set(one.ends()) == {"released"}


def test_no_worker_outlives_a_master_that_is_killed(one: Apart) -> None:
    """kill -9: the port is free at once, the workers are gone in seconds, with running streams too."""
    stream = Crowd(one.ports, lambda _: Ask("wide", 2000), workers=2, total=2)
    wait_for(lambda: one.queue("wide").active == 2, "streams run")
    one.kill("edge0")
    wait_for(lambda: not connects(one.ports[0]), "nobody listens")
    assert one.base.pids("tidegate_edge"), "the port is closed before the streams are"
    wait_for(lambda: not one.base.pids("tidegate_edge"), "all processes are gone", 15)
    assert {(seen.end, seen.code) for seen in stream.finish()} == {("broken", "draining")}


def connects(port: int) -> bool:
    """Whether somebody listens."""
    try:
        socket.create_connection(("127.0.0.1", port), 2).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.slow
def test_serve_keeps_the_workers_too(gateway: Callable[..., Gateway]) -> None:
    """`tidegate serve`: it starts the edge again when its master is killed; when it is stopped, streams that
    take less than 5 s go to their end, and no process is left."""
    one = gateway({"wide": simulated("--token-rate", "40", always_on=True)}, edge={"workers": 2}).start()
    before = one.pids("tidegate_edge")
    masters = [pid for pid in before if "--worker" not in one.processes()[pid].split("\0")]
    os.kill(masters[0], signal.SIGKILL)
    wait_for(lambda: len(set(one.pids("tidegate_edge")) - set(before)) == 3, "it is started again", 60)
    wait_for(one.is_ready, "it serves again", 60)
    streams = Crowd([one.port], lambda _: Ask("wide", 60), workers=4, total=4)
    wait_for(lambda: one.queue("wide")["active"] == 4, "streams run")
    assert one.stop() == 0
    assert {seen.end for seen in streams.finish()} == {"complete"}
