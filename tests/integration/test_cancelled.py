"""Thousands of requests cancelled at random points: nothing is left over, by everybody's own account."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.crowd import LAST, Ask, Crowd, Leave, Seen
from tests.support.figures import Figures, descriptors, resident, say, scrape
from tests.support.gateway import Gateway, free_port, simulated, wait_for

Make = Callable[..., Gateway]
SLOTS = {"busy": 6, "left": 4, "right": 4}
TOKENS = 6
ENDS = ("released", "expired", "revoked", "reclaimed", "instance_lost")
FACTS = "tidegate_admission_"


def plan(rng: random.Random) -> Ask:
    """Half of the requests go to a model whose slots are short, the others to two that share a card, so that
    one of them is always loading, or waits to. Nine of ten are cancelled."""
    model = rng.choices(["busy", "left", "right"], [2, 1, 1])[0]
    stream = rng.random() < 0.7
    how = rng.choices(["close", "reset", "half"], [3, 3, 1])[0]
    point = rng.random()
    if point < 0.10:
        leave = Leave()
    elif point < 0.60:  # whatever is going on then
        leave = Leave(seconds=10 ** rng.uniform(-3, 0.3), how=how)
    elif point < 0.85:  # after so many events; 0: after the head
        leave = Leave(seconds=rng.uniform(1, 4), events=rng.randrange(TOKENS), how=how)
    else:
        leave = Leave(seconds=rng.uniform(2, 5), events=LAST, how=how)
    return Ask(model, TOKENS, stream, leave, keep=rng.random() < 0.5)


def _models() -> dict[str, Any]:
    flags = ("--token-rate", "60", "--ttft", "0.03", "--load-time", "0.4")
    rooms = {"busy": "4GiB", "left": "18GiB", "right": "18GiB"}
    return {
        name: simulated(*flags, vram=room, max_concurrent=SLOTS[name], max_queue=40)
        for name, room in rooms.items()
    }


class Watch:
    """What admission's own metrics say while it runs."""

    def __init__(self, one: Gateway, address: str) -> None:
        self.address = address
        self.scrapes = 0
        self.most = Counter[str]()
        self._pids = {name: one.pid(name) for name in ("edge", "admission")}
        self.memory: list[dict[str, float]] = []

    def look(self) -> Figures:
        """One scrape: conservation is exact, no model has more leases than slots."""
        figures = scrape(self.address)
        self.scrapes += 1
        assert figures.total(FACTS + "conservation_error") == 0
        for model, active in figures.by(FACTS + "active_leases", "model").items():
            assert active <= SLOTS[model], model
            self.most[model] = max(self.most[model], int(active))
        return figures

    def weigh(self) -> None:
        """Notes the memory of the services."""
        self.memory.append({name: resident(pid) for name, pid in self._pids.items()})

    def descriptors(self) -> dict[str, int]:
        """Open files and sockets of the services."""
        return {name: descriptors(pid) for name, pid in self._pids.items()}


@pytest.mark.parametrize(
    "total", [2_000, pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_requests_cancelled_at_random_points_leave_nothing(
    gateway: Make, total: int, request: pytest.FixtureRequest
) -> None:
    """Cancelled while queued, loading, before the first byte, in mid-stream and at the last byte: each is
    answered or cut once; books, gauges, the servers' own ledgers and the kernel know of nothing left."""
    given = request.config.getoption("--seed")
    seed = random.randrange(2**32) if given is None else given
    metrics = f"127.0.0.1:{free_port()}"
    one = gateway(
        _models(),
        edge={"auth": "none"},
        admission={"metrics_listen": metrics, "listen": f"127.0.0.1:{free_port()}"},
        lifecycle={"min_residency": "200ms", "max_swap_wait": "700ms"},
        telemetry={"log_format": "json"},
    ).start()
    assert one.chat("busy").status_code == 200
    watch, began = Watch(one, metrics), time.monotonic()
    before = watch.descriptors()
    crowd = Crowd([one.port], plan, workers=80, seed=seed, total=total)
    quarters = [total * i // 4 for i in range(1, 5)]
    while crowd.is_alive():
        crowd.join(0.2)
        watch.look()
        if len(watch.memory) < len(quarters) and len(crowd.seen) >= quarters[len(watch.memory)]:
            watch.weigh()
    seen, took = crowd.finish(), time.monotonic() - began
    assert wait_for(one.is_idle, "counts return to 0", 15)
    watch.weigh()
    lines = wait_for(lambda: _settled(one, seen), "every request has its line in the log")
    figures = watch.look()
    ends = {end: int(figures.total(FACTS + "lease_ends_total", end=end)) for end in ENDS}
    granted = int(figures.total(FACTS + "grants_total"))
    phases = _phases(lines)
    say(
        f"\nseed {seed}: {total} requests in {took:.1f} s, {watch.scrapes} scrapes",
        f"clients saw {dict(crowd.ends())}",
        f"cut {dict(phases)}; most leases at once {dict(watch.most)}",
        f"granted {granted}, {ends}, unknown ids {figures.total(FACTS + 'unknown_ids_total'):.0f}",
        f"loads {_loads(one)}; memory in MiB {watch.memory}",
    )
    _agree(seen, lines)
    assert min(phases[name] for name in ("queued", "loading", "first byte", "stream")) >= total * 0.01, phases
    assert sum(seen.end == "complete" for seen in seen) >= total * 0.05
    assert granted == ends["released"]
    assert ends == {"released": granted, "expired": 0, "revoked": 0, "reclaimed": 0, "instance_lost": 0}
    _nothing_left(one, watch, before)
    growth = {name: watch.memory[-1][name] - watch.memory[0][name] for name in watch.memory[0]}
    assert max(growth.values()) < 16, growth


def _settled(one: Gateway, seen: list[Seen]) -> dict[str, list[dict[str, Any]]] | None:
    """The access lines by request, once each one that was answered has its own and none runs any more."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for text in one.log().splitlines():
        line = json.loads(text) if text.startswith("{") else {}
        if line.get("event") == "request":
            lines.setdefault(line["request_id"], []).append(line)
    answered = {one.identity for one in seen if one.status}
    return lines if answered <= lines.keys() else None


def _phases(lines: dict[str, list[dict[str, Any]]]) -> Counter[str]:
    """Where the edge found that clients had gone, by its access log. `queued` and `loading` tell what the
    model does all the time: the busy one is never stopped, one of the other two always is."""
    gone = Counter[str]()
    for line in (each[0] for each in lines.values() if each[0]["outcome"] == "client_gone"):
        if not line["model"]:
            gone["body"] += 1
        elif line["instance"]:
            gone["stream" if line["first_byte_ms"] else "first byte"] += 1
        else:
            gone["queued" if line["model"] == "busy" else "loading"] += 1
    return gone


def _agree(seen: list[Seen], lines: dict[str, list[dict[str, Any]]]) -> None:
    """Every request ended once, and what its client saw is what the edge wrote down."""
    twice = {identity: found for identity, found in lines.items() if len(found) > 1}
    assert not twice
    allowed = {
        "complete": {"ok"},
        "refused": {"queue_full"},
        "left": {"ok", "client_gone", "queue_full"},
    }
    for one in seen:
        assert one.end in allowed, one
        if one.identity in lines:
            assert lines[one.identity][0]["outcome"] in allowed[one.end], (one, lines[one.identity])


def _nothing_left(one: Gateway, watch: Watch, before: dict[str, int]) -> None:
    """Gauges, the model servers' ledgers, sockets."""
    edge = Figures(one.http.get("/metrics").text)
    for gauge in ("in_flight", "tickets", "leases", "buffered_bytes"):
        assert edge.total("tidegate_edge_" + gauge) == 0, gauge
    assert [(model.queue.waiting, model.queue.active) for model in one.books().models if model.instances] == [
        (0, 0) for model in one.books().models if model.instances
    ]
    for instance in one.instances():
        ledger = httpx.get(f"{instance['address']}/simulator/requests", trust_env=False).json()
        assert (ledger["running"], ledger["waiting"]) == (0, 0)
        assert all(entry["ended"] != "running" for entry in ledger["requests"] if entry["method"] == "POST")

    def closed() -> bool:
        now = watch.descriptors()
        return all(now[name] <= before[name] + 4 for name in now)

    wait_for(closed, f"sockets are closed: {before} before, {watch.descriptors()} now", 15)


def _loads(one: Gateway) -> dict[str, int]:
    return {name: model["loads"] for name, model in one.status()["models"].items()}
