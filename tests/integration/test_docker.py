"""The whole gateway on real containers: swap, crash, adoption, a hung daemon, and the end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_crashes import Load, Stream
from tests.support import containers
from tests.support.contained import Fleet, contained
from tests.support.docker_proxy import Proxy
from tests.support.gateway import Gateway, wait_for

pytestmark = [pytest.mark.docker, pytest.mark.timeout(400)]  # the image may have to be built first

Make = Callable[..., Gateway]


def test_containers_that_do_not_fit_together_take_turns_and_ctrl_c_leaves_nothing(
    gateway: Make, fleet: Fleet
) -> None:
    """A request starts a container and is answered; another model's evicts it; at the end all is gone."""
    models = {"a": contained(), "b": {"engine": "vllm", "source": "org/model", "vram": "18GiB"}}
    one = gateway(models, lifecycle={"min_residency": "0s", **fleet.lifecycle}).start()
    for name, other in (("a", "b"), ("b", "a"), ("a", "b")):
        assert one.chat(name).status_code == 200
        (instance,) = one.instances()
        assert instance["model"] == name
        assert instance["address"].endswith(":8000")
        assert len(fleet.listed(name)) == 1
        assert not fleet.listed(other)
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 9999}
    with one.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        next(stream.iter_lines())
        assert one.stop(signal.SIGINT, within=12) == 0
    assert not fleet.listed()
    with containers.engine() as client:
        assert not client.networks(names=[fleet.network])


def test_a_killed_lifecycle_adopts_its_containers_with_no_request_failed(gateway: Make, fleet: Fleet) -> None:
    """kill -9 of lifecycle under streams and load: the same container serves on, nothing fails."""
    one = gateway({"a": contained("--token-rate", "20", max_concurrent=8)}, lifecycle=fleet.lifecycle).start()
    assert one.chat("a").status_code == 200
    before = fleet.listed()
    streams = [Stream(one, "a", 120) for _ in range(2)]
    load = Load(one, "a")
    assert all(stream.first.wait(20) for stream in streams)
    old = one.kill("lifecycle")
    wait_for(lambda: one.pids("tidegate_lifecycle") not in ([], [old]), "lifecycle is started again")
    wait_for(lambda: [item["adopted"] for item in one.instances()] == [True], "it has adopted the container")
    for stream in streams:
        stream.join(60)
    load.end()
    assert all(stream.complete for stream in streams), [(s.error, s.text[-300:]) for s in streams]
    assert set(load.statuses) == {200}
    assert fleet.listed() == before
    containers.remove(before[0])
    wait_for(lambda: one.chat("a").status_code == 200, "one that was removed by hand is started again")
    assert fleet.listed() != before


def test_a_hung_daemon_keeps_nobody_from_models_that_run(gateway: Make, fleet: Fleet, tmp_path: Path) -> None:
    """While Docker hangs requests are served and lifecycle answers; when it is back another model starts."""
    proxy = Proxy(tmp_path)
    models = {"a": contained(vram="10GiB"), "b": contained(vram="10GiB")}
    one = gateway(models, environ=proxy.environ, lifecycle=fleet.lifecycle).start()
    try:
        assert one.chat("a").status_code == 200
        proxy.hang()
        waiting = Stream(one, "b", 5)
        for _ in range(10):
            answer = one.chat("a")
            assert answer.status_code == 200
            assert answer.elapsed.total_seconds() < 5
            assert one.status()["lifecycle"]["reachable"]
        assert not waiting.first.is_set()
        proxy.lift()
        waiting.join(60)
        assert waiting.complete, (waiting.error, waiting.text)
    finally:
        proxy.lift()
        one.stop()
        proxy.close()
