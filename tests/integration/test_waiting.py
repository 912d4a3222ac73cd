"""Who waits, and whose turn it is: places, bands and shares through the real services."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.crowd import Ask, Crowd, Seen
from tests.support.figures import say
from tests.support.gateway import Gateway, free_port, simulated, wait_for
from tidegate.admission.v1.admission_pb2 import ModelQueue

Make = Callable[..., Gateway]


def model(slots: int, rate: int = 20, queue: int = 100) -> dict[str, Any]:
    """A model of few slots."""
    room = {"max_concurrent": slots, "max_queue": queue, "vram": "4GiB"}
    return simulated("--token-rate", str(rate), **room)


def running(one: Gateway) -> Gateway:
    """Starts a gateway, and its models."""
    one.start()
    for name in one.status()["models"]:
        assert one.chat(name).status_code == 200
    return one


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose callers are believed who they are; each test has a model of its own."""
    config = {
        "models": {
            "bands": model(1),
            "flood": model(2, queue=20),
            "shares": model(2, rate=50),
            "told": model(1, queue=4),
        },
        "edge": {"auth": "none"},
        "admission": {"listen": f"127.0.0.1:{free_port()}"},
        "tenants": {"vip": {"top_priority": "high"}, "heavy": {"weight": 3}, "light": {"weight": 1}},
    }
    one = running(Gateway(tmp_path_factory.mktemp("waiting"), config))
    yield one
    one.close()


def caller(name: str, tokens: int, **fields: str) -> Ask:
    """A request for a model, with header fields such as tenant and priority."""
    headers = [(f"x-tidegate-{field.replace('_', '-')}", value) for field, value in fields.items()]
    return Ask(name, tokens, headers=tuple(headers))


def queued(one: Gateway, ask: Ask) -> Crowd:
    """One request, once it waits or has a slot."""
    before = _counted(one, ask.model)
    crowd = Crowd([one.port], lambda _: ask, workers=1, total=1)
    wait_for(lambda: _counted(one, ask.model) == before + 1, "it has arrived")
    return crowd


def books(one: Gateway, name: str) -> ModelQueue:
    """What admission says of a model."""
    (found,) = (entry for entry in one.books().models if entry.model == name)
    return found


def _counted(one: Gateway, name: str) -> int:
    queue = books(one, name).queue
    return queue.waiting + queue.active


def in_order(crowds: list[Crowd]) -> list[Seen]:
    """One answer of each, and that they came in this order."""
    seen = [crowd.finish()[0] for crowd in crowds]
    assert [one.end for one in seen] == ["complete"] * len(seen), seen
    assert [one.ended for one in seen] == sorted(one.ended for one in seen)
    return seen


def test_waiting_tickets_keep_their_places_over_a_restart_of_admission(gateway: Make) -> None:
    """kill -9 of admission while a stream runs and others wait for its slot: the stream ends in good order,
    nobody gets the slot before, and then all are served in the order in which they came."""
    listen = f"127.0.0.1:{free_port()}"
    one = running(gateway({"a": model(1)}, admission={"listen": listen, "lease_ttl": "2s"}))
    crowds = [queued(one, caller("a", 80)), *(queued(one, caller("a", 2)) for _ in range(5))]
    one.kill("admission")
    wait_for(lambda: "admission ended" in one.log() and one.is_ready(), "admission is back")
    seen = in_order(crowds)
    gaps = [after.ended - before.ended for before, after in itertools.pairwise(seen)]
    assert min(gaps) > 0.04, "each has the slot for itself"
    assert wait_for(one.is_idle, "counts return to 0")


def test_bands_go_before_each_other(shared: Gateway) -> None:
    """High before normal before low, and each in its order of arrival; none has more than his tenant may."""
    first = queued(shared, caller("bands", 30))
    low = [queued(shared, caller("bands", 2, tenant="vip", priority="low")) for _ in range(2)]
    normal = [queued(shared, caller("bands", 2, tenant="vip", priority="normal")) for _ in range(2)]
    pretender = queued(shared, caller("bands", 2, tenant="vip2", priority="high"))
    high = [queued(shared, caller("bands", 2, tenant="vip", priority="high")) for _ in range(2)]
    in_order([first, *high])
    in_order([high[1], *normal, *low])
    in_order([high[1], pretender, low[0]])


def test_a_flood_locks_nobody_out(shared: Gateway) -> None:
    """One tenant fills the queue and more: another one's requests take places in it, are served among the
    first, and only the flood is refused."""
    flood = Crowd([shared.port], lambda _: caller("flood", 4, tenant="flood"), workers=40, total=160)
    wait_for(lambda: books(shared, "flood").queue.waiting == 20, "the queue is full")
    began = time.monotonic()
    small = Crowd([shared.port], lambda _: caller("flood", 4, tenant="small"), workers=2, total=8).finish()
    between = sum(seen.end == "complete" and began < seen.ended < small[0].ended for seen in flood.seen)
    assert {seen.end for seen in small} == {"complete"}
    assert between <= 8, "it is served when its turn comes, not when the queue is through"
    assert {f"{seen.end} {seen.code}" for seen in flood.finish()} == {"complete ", "refused queue_full"}
    assert wait_for(shared.is_idle, "counts return to 0")


def test_tenants_share_by_weight(shared: Gateway) -> None:
    """Two tenants that both want everything get slots as 3 to 1."""
    crowds = {
        name: Crowd([shared.port], lambda _, name=name: caller("shares", 4, tenant=name), workers=8)  # type: ignore[misc]
        for name in ("heavy", "light")
    }
    wait_for(lambda: all(crowd.completed() > 5 for crowd in crowds.values()), "both are served")
    start = {name: crowd.completed() for name, crowd in crowds.items()}
    wait_for(lambda: sum(crowd.completed() for crowd in crowds.values()) > 120, "both go on")
    served = {name: crowd.completed() - start[name] for name, crowd in crowds.items()}
    for crowd in crowds.values():
        assert {seen.end for seen in crowd.end()} == {"complete"}
    say(f"{served}")
    assert 2.3 < served["heavy"] / served["light"] < 4.2, served


def test_an_answer_tells_how_it_came_about(shared: Gateway) -> None:
    """Its request, its instance, how long it waited, and the queue that it came through."""
    first, second = queued(shared, caller("told", 20)), queued(shared, caller("told", 2))
    in_order([first, second])
    (answer,) = second.finish()
    assert answer.headers["x-request-id"] == answer.identity
    assert answer.headers["x-tidegate-instance"] == books(shared, "told").instances[0].instance_id
    assert 300 < int(answer.headers["x-tidegate-queue-ms"]) < 3000
    queue = [answer.headers[f"x-{name}"] for name in ("queue-depth", "max-concurrent", "max-queue-size")]
    assert queue == ["0", "1", "4"]
