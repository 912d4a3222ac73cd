"""Requests that make no progress end by their own timeouts, and their slots are free at once."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.crowd import Ask, Crowd
from tests.support.gateway import Gateway, free_port, simulated, wait_for

Make = Callable[..., Gateway]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with short timeouts; each test has a model of one slot."""
    flags = {
        "silent": ("--fault", "stall-after=3,times=1"),
        "stuck": ("--max-model-len", "100000"),
        "idle": (),
    }
    config = {
        "models": {name: simulated(*own, max_concurrent=1, vram="5GiB") for name, own in flags.items()},
        "edge": {"stream_idle_timeout": "1s", "write_timeout": "1s"},
        "admission": {"listen": f"127.0.0.1:{free_port()}"},
    }
    made = Gateway(tmp_path_factory.mktemp("progress"), config).start()
    yield made
    made.close()


def test_a_model_server_that_falls_silent_loses_the_slot(one: Gateway) -> None:
    """After stream_idle_timeout the stream ends with an error, and who waited for the slot is served."""
    stalled = Crowd([one.port], lambda _: Ask("silent", 50), workers=1, total=1)
    wait_for(lambda: one.queue("silent")["active"] == 1, "it runs")
    (served,) = Crowd([one.port], lambda _: Ask("silent"), workers=1, total=1).finish()
    (ended,) = stalled.finish()
    assert (ended.end, ended.code, ended.tokens) == ("broken", "upstream_timeout", 3), ended
    assert served.end == "complete", served
    assert served.ended - ended.ended < 1
    assert wait_for(one.is_idle, "counts return to 0", 5)


def test_a_client_that_takes_nothing_loses_the_slot(one: Gateway) -> None:
    """A stream that nobody reads is cut after write_timeout, and who waited for the slot is served."""
    with socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect(("127.0.0.1", one.port))
        stuck.sendall(Ask("stuck", 50_000).written("stuck"))
        wait_for(lambda: one.queue("stuck")["active"] == 1, "it runs")
        began = time.monotonic()
        (served,) = Crowd([one.port], lambda _: Ask("stuck"), workers=1, total=1).finish()
        assert served.end == "complete", served
        assert served.ended - began < 4
        assert wait_for(one.is_idle, "counts return to 0", 5)
        assert _rest(stuck) < 5_000_000, "it was cut, not served"


def test_a_client_that_only_stays_connected_holds_no_slot(one: Gateway) -> None:
    """The model server has answered; its client has read nothing and stays: the slot is free all the same."""
    with socket.socket() as idle:
        idle.connect(("127.0.0.1", one.port))
        idle.sendall(Ask("idle", 300).written("idle"))
        wait_for(lambda: _ended(one) == 1, "its lease has ended", 10)
        (served,) = Crowd([one.port], lambda _: Ask("idle"), workers=1, total=1).finish()
        assert served.end == "complete", served
        assert one.is_idle()
        idle.settimeout(5)
        assert b" 200 OK" in idle.recv(100)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_model_server_that_never_answers_loses_the_slot(gateway: Make) -> None:
    """After response_timeout (60 s at least): 504, and who waited for the slot is served."""
    hung_once = simulated("--fault", "hang=0,times=1", max_concurrent=1)
    one = gateway({"a": hung_once}, edge={"response_timeout": "60s"}).start()
    with ThreadPoolExecutor(2) as pool:
        hung = pool.submit(one.http.post, "/v1/chat/completions", json=json.loads(_body()), timeout=90)
        wait_for(lambda: one.queue("a")["active"] == 1, "it runs")
        served = pool.submit(one.http.post, "/v1/chat/completions", json=json.loads(_body()), timeout=90)
        assert hung.result().status_code == 504
        assert hung.result().json()["error"]["code"] == "upstream_timeout"
        assert 59 < hung.result().elapsed.total_seconds() < 63
        assert served.result().status_code == 200
    assert wait_for(one.is_idle, "counts return to 0", 5)


def _body() -> bytes:
    return Ask("a", stream=False).written("x").partition(b"\r\n\r\n")[2]


def _ended(one: Gateway) -> int:
    return sum(model.lease_ends["released"] for model in one.books().models if model.model == "idle")


def _rest(sock: socket.socket) -> int:
    """How many bytes still come, until the connection ends."""
    sock.settimeout(10)
    total = 0
    try:
        while piece := sock.recv(65536):
            total += len(piece)
    except ConnectionResetError:
        pass
    return total
