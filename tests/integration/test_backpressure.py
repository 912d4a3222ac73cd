"""A model server's own 429 and 503, through the whole gateway: fewer slots for a while, and no fault."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection, HTTPResponse

import httpx
import pytest

from tests.support.gateway import BIN, Gateway, free_port, simulated, wait_for
from tidegate.admission.v1 import admission_pb2 as pb

Make = Callable[..., Gateway]
BODY = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4000}


class Clients:
    """Requests on their way; closing them cancels those that aren't answered."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack

    def ask(self, one: Gateway, model: str) -> HTTPConnection:
        """One more, not waited for."""
        connection = self.stack.enter_context(closing(HTTPConnection("127.0.0.1", one.port, timeout=60)))
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": model, **BODY}), headers)
        return connection

    def burst(self, one: Gateway, model: str) -> list[HTTPConnection]:
        """Eight to a model that isn't loaded: they are granted together, as soon as it is ready."""
        asked = [self.ask(one, model) for _ in range(8)]
        wait_for(lambda: queue(one, model).queue.waiting == 8, "all eight wait")
        return asked


@pytest.fixture
def clients() -> Iterator[Clients]:
    """Clients that have all gone at the end."""
    with ExitStack() as stack:
        yield Clients(stack)


def queue(one: Gateway, model: str) -> pb.ModelQueue:
    """A model's queue, by admission's own books; empty when it has none."""
    found = [item for item in one.books().models if item.model == model]
    return found[0] if found else pb.ModelQueue()


def slots(one: Gateway, model: str) -> pb.InstanceSlots:
    """The slots of its one instance."""
    instances = queue(one, model).instances
    return instances[0] if instances else pb.InstanceSlots()


def text_of(answer: HTTPResponse) -> dict[str, object]:
    """Its JSON."""
    body: dict[str, object] = json.loads(answer.read())
    return body


def test_backpressure_shrinks_slots_and_they_come_back(gateway: Make, clients: Clients) -> None:
    """A burst of 429s passes to the clients unchanged and takes half of the slots, once. A slot comes back
    after ten seconds, but not where the server says that more than three wait in it. Nothing is restarted."""
    busy = ("--load-time", "1", "--token-rate", "20")
    one = gateway(
        {
            "crowded": simulated(
                *busy, "--max-num-seqs", "1", "--fault", "status=429,times=1", max_concurrent=8
            ),
            "burst": simulated(*busy, "--fault", "status=429,retry_after=7,times=9", max_concurrent=8),
        },
        admission={"listen": f"127.0.0.1:{free_port()}"},
    ).start()

    crowd = clients.burst(one, "crowded")
    wait_for(lambda: slots(one, "crowded").effective_slots == 4, "one refusal halves the slots")
    wait_for(lambda: queue(one, "crowded").queue.active == 7, "leases above the bound stay")
    crowd.append(clients.ask(one, "crowded"))
    wait_for(lambda: queue(one, "crowded").queue.waiting == 1, "and nobody else is granted")
    wait_for(lambda: "more than 3 waiting" in slots(one, "crowded").held_back, "lifecycle's sample came")

    answers = [connection.getresponse() for connection in clients.burst(one, "burst")]
    assert [answer.status for answer in answers] == [429] * 8
    (instance,) = [item for item in one.instances() if item["model"] == "burst"]
    direct = httpx.post(f"{instance['address']}/v1/chat/completions", json={"model": "burst", **BODY})
    for answer in answers:
        assert answer.getheader("retry-after") == direct.headers["retry-after"] == "7"
        assert answer.getheader("x-tidegate-instance") == instance["instance_id"]
        assert text_of(answer) == direct.json()
    shrunk = slots(one, "burst")
    assert (shrunk.effective_slots, shrunk.slots, shrunk.active) == (4, 8, 0)
    assert "4 of 8 slots" in shrunk.held_back
    assert one.chat("burst").status_code == 200, "served again at once"

    wait_for(lambda: slots(one, "burst").effective_slots == 5, "one slot comes back", 15)
    held = slots(one, "crowded")
    assert (held.effective_slots, held.active) == (4, 7)
    assert queue(one, "crowded").queue.waiting == 1
    status = one.status()
    loads = {item["model"]: (item["running"], item["queued"]) for item in status["instances"]}
    assert loads["crowded"] == (1, 6)
    assert {item["state"] for item in status["instances"]} == {"ready"}
    for name in ("burst", "crowded"):
        entry = status["models"][name]
        assert (entry["loads"], entry["failed_loads"], entry["restarts"]) == (1, 0, 0), entry
    for connection in crowd:
        connection.close()
    assert wait_for(one.is_idle, "counts return to 0")


def test_a_server_with_a_full_queue_of_its_own(gateway: Make, clients: Clients) -> None:
    """What it takes is served, what it answers with 503 reaches the client as it is and is never retried."""
    flags = ("--load-time", "1", "--max-num-seqs", "2", "--max-num-queued-reqs", "0", "--token-rate", "4000")
    one = gateway(
        {"a": simulated(*flags, max_concurrent=8)}, admission={"listen": f"127.0.0.1:{free_port()}"}
    ).start()
    answers = [connection.getresponse() for connection in clients.burst(one, "a")]
    assert sorted(answer.status for answer in answers) == [200, 200] + [503] * 6
    refused = [text_of(answer) for answer in answers if answer.status == 503]
    assert all("queue is full: 0 requests are waiting" in str(body) for body in refused)
    assert slots(one, "a").effective_slots == 4
    command = [str(BIN / "tidegate"), "queues", "--config", str(one.config_path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "0/4" in shown
    assert "4 of 8 slots" in shown
    (instance,) = one.instances()
    requests = httpx.get(f"{instance['address']}/simulator/requests").json()["requests"]
    assert len([item for item in requests if item["method"] == "POST"]) == 8
    assert wait_for(one.is_idle, "counts return to 0")
