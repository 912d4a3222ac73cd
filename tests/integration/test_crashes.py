"""kill -9 of each process in turn, under load: the others live, it comes back, nothing is lost or left."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.support.gateway import Gateway, free_port, simulated, wait_for

Make = Callable[..., Gateway]


class Stream(threading.Thread):
    """A long stream read in the background: what came of it."""

    def __init__(self, gateway: Gateway, model: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.first = threading.Event()
        self.text = ""
        self.error: Exception | None = None
        self._gateway, self._model, self._tokens = gateway, model, tokens
        self.start()

    def run(self) -> None:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": "hello"}],
            "stream": True,
            "max_tokens": self._tokens,
        }
        try:
            with (
                httpx.Client(base_url=self._gateway.url, timeout=60, trust_env=False) as client,
                client.stream("POST", "/v1/chat/completions", json=body) as answer,
            ):
                for text in answer.iter_text():
                    self.text += text
                    self.first.set()
        except httpx.HTTPError as error:
            self.error = error

    @property
    def complete(self) -> bool:
        """It ended with [DONE] and without an error."""
        return self.error is None and self.text.rstrip().endswith("[DONE]") and '"error"' not in self.text


class Load(threading.Thread):
    """Short requests, one after the other, until told to stop: every status, and the longest wait."""

    def __init__(self, gateway: Gateway, model: str) -> None:
        super().__init__(daemon=True)
        self.statuses: list[int] = []
        self.longest = 0.0
        self._gateway, self._model = gateway, model
        self._told = threading.Event()
        self.start()

    def run(self) -> None:
        body = {"model": self._model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
        with httpx.Client(base_url=self._gateway.url, timeout=60, trust_env=False) as client:
            while not self._told.is_set():
                try:
                    answer = client.post("/v1/chat/completions", json=body)
                except httpx.TransportError:
                    self.statuses.append(0)
                    self._told.wait(0.05)
                else:
                    self.statuses.append(answer.status_code)
                    self.longest = max(self.longest, answer.elapsed.total_seconds())

    def end(self) -> None:
        self._told.set()
        self.join(60)


def _comes_back(gateway: Gateway, service: str, old: int) -> None:
    wait_for(lambda: gateway.pids(f"tidegate_{service}") not in ([], [old]), f"{service} is started again")
    wait_for(gateway.is_ready, "/ready answers 200 again")


@pytest.mark.parametrize("service", ["admission", "lifecycle"])
def test_running_streams_survive_the_death_of_a_control_service(gateway: Make, service: str) -> None:
    """kill -9 of admission or lifecycle: streams run to their end, servers live, counts return to 0."""
    one = gateway({"a": simulated("--token-rate", "20", max_concurrent=8)}).start()
    assert one.chat("a").status_code == 200
    servers = one.servers()
    streams = [Stream(one, "a", 100) for _ in range(3)]
    load = Load(one, "a")
    assert all(stream.first.wait(20) for stream in streams)
    _comes_back(one, service, one.kill(service))
    for stream in streams:
        stream.join(60)
    load.end()
    assert all(stream.complete for stream in streams), [(s.error, s.text[-300:]) for s in streams]
    assert set(load.statuses) <= {200, 503}, "nobody sees more than a retryable error"
    assert load.statuses.count(200) > 3
    assert load.longest < 20
    assert one.servers() == servers, "the model server was adopted, not started again"
    assert wait_for(one.is_idle, "counts return to 0", 15)
    assert one.chat("a").status_code == 200


def test_the_edges_death_frees_its_slots(gateway: Make) -> None:
    """kill -9 of the edge: it comes back, its leases are free within the lease's time to live."""
    one = gateway({"a": simulated("--token-rate", "5", max_concurrent=1)}, admission={"lease_ttl": "2s"})
    one.start()
    stream = Stream(one, "a", 1000)
    assert stream.first.wait(20)
    servers = one.servers()
    _comes_back(one, "edge", one.kill("edge"))
    assert one.chat("a").status_code == 200
    stream.join(20)
    assert stream.error is not None
    assert one.servers() == servers
    assert wait_for(one.is_idle, "counts return to 0", 5)


def test_a_killed_model_server_is_started_again(gateway: Make) -> None:
    """kill -9 of a model server: the next request finds a new one."""
    one = gateway({"a": simulated()}).start()
    assert one.chat("a").status_code == 200
    (server,) = one.servers()
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: one.chat("a").status_code == 200, "requests are served again")
    assert one.servers() != [server]


def test_serve_itself_killed_ends_the_three_services(gateway: Make) -> None:
    """kill -9 of `serve`: the three services end by themselves, and the next start works as ever."""
    one = gateway({"a": simulated()}).start()
    assert one.chat("a").status_code == 200
    assert one.process is not None
    one.process.kill()
    one.process.wait()
    wait_for(lambda: not any(one.pids(f"tidegate_{name}") for name in ("edge", "admission", "lifecycle")),
             "the services have ended")  # fmt: skip
    one.start()
    assert one.chat("a").status_code == 200


def test_everything_killed_at_once_leaves_a_server_that_the_next_start_adopts(gateway: Make) -> None:
    """kill -9 of all four: the model server lives on, and is adopted by the next start."""
    one = gateway({"a": simulated()}).start()
    assert one.chat("a").status_code == 200
    servers = one.servers()
    assert one.process is not None
    pids = [one.process.pid, *(one.pid(name) for name in ("edge", "admission", "lifecycle"))]
    for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first: none sees another one die
        for pid in pids:
            os.kill(pid, number)
    one.process.wait()
    assert one.servers() == servers
    one.start()
    assert one.chat("a").status_code == 200
    assert one.servers() == servers


def test_stopping_when_lifecycle_has_just_died_sweeps_the_model_servers(gateway: Make) -> None:
    """SIGTERM right after lifecycle's death still stops the model servers within 10 s."""
    one = gateway({"a": simulated()}).start()
    assert one.chat("a").status_code == 200
    one.kill("lifecycle")
    one.stop(within=10)
    assert not one.processes()


def test_each_service_in_turn_under_load(gateway: Make) -> None:
    """All three are killed one after the other while requests run: no hang, no count left over."""
    one = gateway(
        {"a": simulated("--token-rate", "50", max_concurrent=4)}, admission={"lease_ttl": "2s"}
    ).start()
    assert one.chat("a").status_code == 200
    loads: list[Any] = [Load(one, "a") for _ in range(6)]
    for service in ("lifecycle", "admission", "edge", "admission", "lifecycle"):
        _comes_back(one, service, one.kill(service))
    for load in loads:
        load.end()
    assert {status for load in loads for status in load.statuses} <= {0, 200, 502, 503}
    assert max(load.longest for load in loads) < 20
    assert wait_for(one.is_idle, "counts return to 0", 15)
    assert one.chat("a").status_code == 200


def test_a_frozen_edge_loses_its_slots_and_ends_its_relays_when_it_comes_back(gateway: Make) -> None:
    """SIGSTOP of the edge: its leases are free within their time to live + 1 s; after SIGCONT it works on."""
    admission = {"lease_ttl": "2s", "listen": f"127.0.0.1:{free_port()}"}
    one = gateway({"a": simulated("--token-rate", "5", max_concurrent=1)}, admission=admission).start()
    stream = Stream(one, "a", 1000)
    assert stream.first.wait(20)
    assert [model.queue.active for model in one.books().models] == [1]
    edge = one.pid("edge")
    os.kill(edge, signal.SIGSTOP)
    try:
        wait_for(lambda: not any(model.queue.active for model in one.books().models), "the slot is free", 3.5)
    finally:
        os.kill(edge, signal.SIGCONT)
    stream.join(20)
    assert not stream.is_alive()
    assert '"error"' in stream.text
    assert one.chat("a").status_code == 200
    assert wait_for(one.is_idle, "counts return to 0", 5)
    (books,) = one.books().models
    assert books.lease_ends["expired"] == 1


def test_a_frozen_admission_stops_nothing_that_runs(gateway: Make) -> None:
    """SIGSTOP of admission: streams go on, new requests get a retryable answer; after SIGCONT all is well."""
    one = gateway({"a": simulated("--token-rate", "20", max_concurrent=4)}, admission={"lease_ttl": "2s"})
    one.start()
    stream = Stream(one, "a", 200)
    assert stream.first.wait(20)
    admission = one.pid("admission")
    os.kill(admission, signal.SIGSTOP)
    try:
        waiter = Stream(one, "a", 2)
        wait_for(lambda: not one.status()["edge"]["session_connected"], "the edge notices")
        assert one.chat("a").status_code == 503
    finally:
        os.kill(admission, signal.SIGCONT)
    wait_for(lambda: one.chat("a").status_code == 200, "requests are served again")
    waiter.join(30)
    assert waiter.complete, "one that waited already went on waiting"
    stream.join(30)
    assert stream.complete, stream.text[-300:]
    assert wait_for(one.is_idle, "counts return to 0", 15)


@pytest.mark.parametrize("service", ["lifecycle", "admission"])
def test_killed_again_and_again_in_the_middle_of_swaps(gateway: Make, service: str) -> None:
    """Models swap while a control service is killed at whatever moment: no orphan, no hang, no lost count."""
    models = {name: simulated("--load-time", "0.3", vram="18GiB", max_concurrent=2) for name in "ab"}
    one = gateway(
        models,
        lifecycle={"min_residency": "200ms", "max_swap_wait": "500ms"},
        admission={"lease_ttl": "2s"},
    ).start()
    loads = [Load(one, "ab"[i % 2]) for i in range(4)]

    def served() -> int:
        return sum(load.statuses.count(200) for load in loads)

    for goal in range(4, 17, 4):
        wait_for(lambda least=goal: served() >= least, "requests are served", 40)  # type: ignore[misc]
        _comes_back(one, service, one.kill(service))
    for load in loads:
        load.end()
    assert {status for load in loads for status in load.statuses} <= {200, 502, 503}
    assert max(load.longest for load in loads) < 40
    assert wait_for(one.is_idle, "counts return to 0", 15)
    assert one.chat("a").status_code == 200
    known = {instance["pid"] for instance in one.instances() if instance["pid"]}
    assert set(one.servers()) <= known, "nothing runs that isn't known"
