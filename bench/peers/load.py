"""What is asked of a gateway: whole answers by wrk, streams by `bench.peers.streams`; and what it used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from bench.peers.gateways import ANSWERS, STREAMS, Cores, Target
from bench.peers.install import ROOT, install

_SCRIPT = Path(__file__).with_name("wrk.lua")
_QUIET = 0.03
"""Share of a core below which a gateway has nothing more to do."""
_SETTLE = 10.0
"""Seconds that one may take until it is quiet again."""
_ENDLESS = 100_000
"""Chunks of a stream that nobody waits for the end of."""
Figures = dict[str, Any]


def requests(target: Target, connections: int, seconds: int, cores: Cores, threads: int = 1) -> Figures:
    """A closed loop of whole answers: requests a second, latency, and processor seconds by part."""
    wrk = install("wrk")
    command = [
        *_pinned(cores), str(wrk.path), "-t", str(threads), "-c", str(connections), "-d", f"{seconds}s",
        "--timeout", "60s", "-s", str(_SCRIPT),
    ]  # fmt: skip
    for name, value in target.headers.get(ANSWERS, {}).items():
        command += ["-H", f"{name}: {value}"]
    environ = os.environ | wrk.environ | {"BODY": json.dumps(target.body(ANSWERS))}
    url = target.urls[ANSWERS] + "/v1/chat/completions"
    before = target.cpu()
    said = subprocess.run(
        [*command, url], env=environ, stdout=subprocess.PIPE, text=True, check=True, timeout=seconds + 90
    )
    figures = cast(Figures, json.loads(said.stdout.splitlines()[-1]))
    figures["cpu"] = {part: used - before[part] for part, used in target.cpu().items()}
    figures["rate"] = figures["requests"] / figures["seconds"]
    return figures


def first(target: Target, seconds: float, cores: Cores) -> Figures:
    """Time to the first chunk, one stream after another."""
    with _client(_plan(target, "first", seconds=seconds), cores) as client:
        return _result(client)


def streams(target: Target, emitter: Target, seconds: float, cores: Cores) -> Figures:
    """Many streams at once: processor time and delay of their chunks, and memory beyond that before them."""
    memory = target.rss()
    with _client(_plan(target, "many", count=target.streams, seconds=seconds), cores) as client:
        _expect(client, "steady")
        before, emitted = target.cpu(), emitter.cpu()
        grown = {part: size - memory[part] for part, size in target.rss().items()}
        _expect(client, "over")
        used = {part: at - before[part] for part, at in target.cpu().items()}
        emitted = {part: at - emitted[part] for part, at in emitter.cpu().items()}
        figures = _result(client)
    figures |= {"count": target.streams, "cpu": used, "memory": grown}
    figures["emitter"] = sum(emitted.values()) / figures["seconds"]
    return figures


@contextmanager
def held(target: Target, model: str, count: int, cores: Cores) -> Iterator[None]:
    """So many requests that wait."""
    with _client(_plan(target, "hold", model, count=count), cores) as client:
        _expect(client, "open")
        yield
        failed = _result(client)["failed"]
        assert not failed, f"{failed} of {count} waiting requests were closed"


def settle(target: Target) -> None:
    """Waits until a gateway has nothing more to do."""
    deadline = time.monotonic() + _SETTLE
    while target.processes and time.monotonic() < deadline:
        before, began = sum(target.cpu().values()), time.monotonic()
        time.sleep(0.2)
        if sum(target.cpu().values()) - before <= _QUIET * (time.monotonic() - began) + 0.011:
            return


def _plan(target: Target, kind: str, model: str = STREAMS, **keys: Any) -> dict[str, Any]:
    tokens = 2 if kind == "first" else _ENDLESS
    return {
        "kind": kind,
        "url": target.urls[model],
        "body": target.body(model, stream=True, max_tokens=tokens),
        "headers": target.headers.get(model, {}),
        **keys,
    }


@contextmanager
def _client(plan: dict[str, Any], cores: Cores) -> Iterator[subprocess.Popen[str]]:
    client = subprocess.Popen(
        [*_pinned(cores), sys.executable, "-m", "bench.peers.streams"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert client.stdin is not None, "it was asked for"
        client.stdin.write(json.dumps(plan) + "\n")
        client.stdin.flush()
        yield client
    finally:
        client.kill()
        client.wait()


def _expect(client: subprocess.Popen[str], word: str) -> None:
    assert client.stdout is not None, "it was asked for"
    said = client.stdout.readline().strip()
    assert said == word, f"the client of streams said {said!r}, not {word!r}"


def _result(client: subprocess.Popen[str]) -> Figures:
    assert client.stdin is not None, "it was asked for"
    assert client.stdout is not None, "it was asked for"
    client.stdin.close()
    return cast(Figures, json.loads(client.stdout.readline()))


def _pinned(cores: Cores) -> list[str]:
    return ["taskset", "-c", ",".join(map(str, sorted(cores.rest)))]
