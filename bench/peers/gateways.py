"""How each gateway is started and asked, and what its processes use. Each has one core."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench import machine
from bench.peers.install import OUT, ROOT, Missing, install
from bench.upstream import COMPLETION
from tests.support.gateway import SERVICES, Gateway, free_port, wait_for

ANSWERS, STREAMS, SLOW = "answers", "streams", "slow"
"""Models: of the upstream that answers whole, of the one that streams, and one with a single slot."""
RUN = OUT / "run"
"""Configuration and log of each process."""
_PATIENCE = 90.0
"""Seconds until a gateway must answer."""
Starter = Callable[[ExitStack, "Upstreams", "Cores"], "Target"]
_PORTKEY = "node_modules/@portkey-ai/gateway/build/start-server.js"


@dataclass(frozen=True)
class Cores:
    """Which cores are whose."""

    gateway: frozenset[int]
    rest: frozenset[int]
    """Upstream, load, and what of a gateway isn't its edge."""


@dataclass
class Target:
    """A gateway, or the upstream itself."""

    name: str
    version: str
    urls: dict[str, str]
    """By model: where it is asked for."""
    processes: dict[str, Callable[[], list[int]]] = field(default_factory=dict)
    """Process ids by part; the first part is the gateway proper, which has the core."""
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    """By model: what else is said in a request's head."""
    streams: int = 500
    """Streams at once that it is asked for; 0 = none."""
    slow: bool = False
    """Measured in one round at the levels that it can hardly reach."""

    def cpu(self) -> dict[str, float]:
        """Seconds of processor time so far, by part."""
        return {part: sum(map(machine.cpu, pids())) for part, pids in self.processes.items()}

    def rss(self) -> dict[str, int]:
        """Bytes of memory now, by part."""
        return {part: sum(map(machine.rss, pids())) for part, pids in self.processes.items()}

    def body(self, model: str, **keys: Any) -> dict[str, Any]:
        """A request's body: the same for all."""
        return {"model": model, "messages": [{"role": "user", "content": "x" * 200}], "max_tokens": 10} | keys


def children(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@contextmanager
def started(name: str, command: list[str], cores: frozenset[int], **environ: str) -> Iterator[int]:
    """A process on its cores, in a session of its own; the process id. Its log is `RUN/name.log`."""
    pinned = ["taskset", "-c", ",".join(map(str, sorted(cores))), *command]
    inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    with (RUN / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            pinned,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=inherited | environ,
            start_new_session=True,
            cwd=ROOT,
        )
    try:
        yield process.pid
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in children(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + 3
            while children(process.pid) and time.monotonic() < deadline:
                process.poll()
                time.sleep(0.05)
        process.wait()


class Upstreams:
    """The two model servers that everybody goes to: nginx for whole answers, the bench's own for streams."""

    def __init__(self, stack: ExitStack, cores: Cores) -> None:
        self.answers = f"http://127.0.0.1:{free_port()}"
        self.streams = f"http://127.0.0.1:{free_port()}"
        nginx = install("nginx")
        config = _nginx(
            "upstream",
            f"server {{ listen {_host(self.answers)} backlog=4096; default_type application/json;"
            f" location = /v1/chat/completions {{ return 200 '{COMPLETION.decode()}'; }}"
            " location / { return 200 '{}'; } }",
        )
        stack.enter_context(
            started("upstream", [str(nginx.path), "-c", str(config)], cores.rest, **nginx.environ)
        )
        port = self.streams.rpartition(":")[2]
        self.emitter = stack.enter_context(
            started("emitter", [sys.executable, "-m", "bench.upstream", "--port", port], cores.rest)
        )
        for url in (self.answers, self.streams):
            wait_for(partial(_answers, url + "/health"), f"{url} answers")

    def of(self, model: str) -> str:
        """Where a model is served."""
        return self.answers if model == ANSWERS else self.streams


def start(name: str, stack: ExitStack, upstreams: Upstreams, cores: Cores) -> Target:
    """Starts a gateway and waits until it answers. Raises Missing."""
    print(f"starting {name}", flush=True)
    target = _STARTERS[name](stack, upstreams, cores)
    for model in target.urls.keys() - {SLOW}:
        url = target.urls[model] + "/v1/chat/completions"
        asked = partial(_asked, target, url, model)
        try:
            wait_for(asked, f"{name} answers", _PATIENCE)
        except AssertionError as error:
            raise Missing(f"{name} doesn't answer: {error}") from None
    return target


def _direct(_: ExitStack, upstreams: Upstreams, __: Cores) -> Target:
    return Target("direct", "", {model: upstreams.of(model) for model in (ANSWERS, STREAMS)})


def _start_nginx(stack: ExitStack, upstreams: Upstreams, cores: Cores) -> Target:
    peer = install("nginx")
    urls, servers = _two_urls(), ""
    for model, url in urls.items():
        servers += (
            f"upstream {model} {{ server {_host(upstreams.of(model))}; keepalive 1024;"
            " keepalive_requests 1000000000; }\n"
            f"server {{ listen {_host(url)} backlog=4096; location / {{ proxy_pass http://{model};"
            ' proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; } }\n'
        )
    command = [str(peer.path), "-c", str(_nginx("nginx", servers))]
    leader = stack.enter_context(started("nginx", command, cores.gateway, **peer.environ))
    return Target("nginx", peer.version, urls, {"gateway": lambda: children(leader)})


def _start_haproxy(stack: ExitStack, upstreams: Upstreams, cores: Cores) -> Target:
    peer = install("haproxy")
    urls = _two_urls()
    text = (
        "global\n  nbthread 1\n  maxconn 4000\n"
        "defaults\n  mode http\n  timeout connect 10s\n  timeout client 600s\n  timeout server 600s\n"
        "  http-reuse always\n"
    )
    for model, url in urls.items():
        text += f"frontend {model}\n  bind {_host(url)}\n  default_backend to_{model}\n"
        text += f"backend to_{model}\n  server one {_host(upstreams.of(model))}\n"
    config = RUN / "haproxy.cfg"
    config.write_text(text)
    command = [str(peer.path), "-db", "-f", str(config)]
    leader = stack.enter_context(started("haproxy", command, cores.gateway, **peer.environ))
    return Target("haproxy", peer.version, urls, {"gateway": lambda: children(leader)})


def _router(peer: str, program: tuple[str, ...], *flags: str, suffix: str = "") -> Starter:
    """A router of the vLLM or SGLang project: a process has one set of servers, so there is one for each.
    With a suffix it is one with other flags, and for whole answers alone."""
    name, models = peer + suffix, (ANSWERS,) if suffix else (ANSWERS, STREAMS)

    def begin(stack: ExitStack, upstreams: Upstreams, cores: Cores) -> Target:
        installed = install(peer)
        urls, leaders = {model: f"http://127.0.0.1:{free_port()}" for model in models}, []
        for model, url in urls.items():
            command = [
                str(installed.path / "bin" / program[0]), *program[1:], "--worker-urls", upstreams.of(model),
                "--host", "127.0.0.1", "--port", url.rpartition(":")[2],
                "--prometheus-port", str(free_port()), *flags,
            ]  # fmt: skip
            leaders.append(stack.enter_context(started(f"{name}-{model}", command, cores.gateway)))
        processes = {"gateway": lambda: [pid for one in leaders for pid in children(one)]}
        return Target(name, installed.version, urls, processes, streams=0 if suffix else 500)

    return begin


def _start_litellm(stack: ExitStack, upstreams: Upstreams, cores: Cores) -> Target:
    peer, url = install("litellm"), f"http://127.0.0.1:{free_port()}"
    config = RUN / "litellm.yaml"
    config.write_text(
        "model_list:\n"
        + "".join(
            f"  - model_name: {model}\n    litellm_params:\n      model: openai/{model}\n"
            f"      api_base: {upstreams.of(model)}/v1\n      api_key: none\n"
            for model in (ANSWERS, STREAMS)
        )
    )
    command = [
        str(peer.path / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port",
        url.rpartition(":")[2], "--num_workers", "1", "--telemetry", "False",
    ]  # fmt: skip
    leader = stack.enter_context(
        started(
            "litellm",
            command,
            cores.gateway,
            LITELLM_LOG="ERROR",
            LITELLM_LOCAL_MODEL_COST_MAP="True",
            LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY="true",
        )
    )
    urls = dict.fromkeys((ANSWERS, STREAMS), url)
    processes = {"gateway": lambda: children(leader)}
    return Target("litellm", peer.version, urls, processes, streams=10, slow=True)


def _start_portkey(stack: ExitStack, upstreams: Upstreams, cores: Cores) -> Target:
    peer, url = install("portkey"), f"http://127.0.0.1:{free_port()}"
    command = ["node", str(peer.path / _PORTKEY), f"--port={url.rpartition(':')[2]}", "--headless"]
    leader = stack.enter_context(started("portkey", command, cores.gateway))
    return Target(
        "portkey",
        peer.version,
        dict.fromkeys((ANSWERS, STREAMS), url),
        {"gateway": lambda: children(leader)},
        {
            model: {
                "x-portkey-provider": "openai",
                "authorization": "Bearer none",
                "x-portkey-custom-host": upstreams.of(model) + "/v1",
            }
            for model in (ANSWERS, STREAMS)
        },
        streams=100,
        slow=True,
    )


def tidegate(stack: ExitStack, upstreams: Upstreams, cores: Cores, **sections: Any) -> tuple[Target, Gateway]:
    """All three services, the edge alone on the gateway's cores; the models are served by the upstreams."""
    folder = RUN / f"tidegate-{free_port()}"
    folder.mkdir()
    slots = {ANSWERS: 1000, STREAMS: 1000, SLOW: 1}
    models = {
        model: {"engine": "external", "urls": [upstreams.of(model)], "max_concurrent": most,
                "max_queue": 10_000}
        for model, most in slots.items()
    }  # fmt: skip
    one = Gateway(folder, {"models": models, "telemetry": {"log_level": "warning"}} | sections)
    one.environ.pop("PYTHONPATH", None)  # no guard against blocking calls: it costs time
    stack.callback(one.close)
    try:
        one.start(ready=False)
        wait_for(one.is_ready, "/ready answers 200", _PATIENCE)
        wait_for(lambda: one.chat(ANSWERS).status_code == 200, "a model is ready", _PATIENCE)
    except AssertionError as error:
        raise Missing(f"tidegate doesn't start: {error}") from None
    processes: dict[str, Callable[[], list[int]]] = {}
    for service in SERVICES:
        pids = one.pids(f"tidegate_{service}")
        processes[service] = partial(list, pids)
        for pid in pids:
            machine.pin(pid, set(cores.gateway if service == "edge" else cores.rest))
    return Target("tidegate", "", dict.fromkeys(slots, one.url), processes), one


_VLLM = ("vllm-router",)
_SGLANG = ("python", "-m", "sglang_router.launch_router")
_STARTERS: dict[str, Starter] = {
    "direct": _direct,
    "nginx": _start_nginx,
    "haproxy": _start_haproxy,
    "vllm-router": _router("vllm-router", _VLLM, "--log-level", "warning"),
    "vllm-router-rr": _router(
        "vllm-router", _VLLM, "--log-level", "warning", "--policy", "round_robin", suffix="-rr"
    ),
    "sglang-router": _router("sglang-router", _SGLANG, "--log-level", "warn"),
    "sglang-router-rr": _router(
        "sglang-router", _SGLANG, "--log-level", "warn", "--policy", "round_robin", suffix="-rr"
    ),
    "tidegate": lambda stack, upstreams, cores: tidegate(stack, upstreams, cores)[0],
    "portkey": _start_portkey,
    "litellm": _start_litellm,
}
NAMES = tuple(_STARTERS)


def _two_urls() -> dict[str, str]:
    return {model: f"http://127.0.0.1:{free_port()}" for model in (ANSWERS, STREAMS)}


def _host(url: str) -> str:
    return url.removeprefix("http://")


def _nginx(name: str, servers: str) -> Path:
    path = RUN / f"{name}.conf"
    paths = " ".join(
        f"{kind}_temp_path {RUN}/{name}-{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path.write_text(
        f"daemon off;\nworker_processes 1;\nworker_rlimit_nofile 16000;\npid {RUN}/{name}.pid;\n"
        f"error_log {RUN}/{name}.err;\nevents {{ worker_connections 8000; }}\n"
        f"http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600s;\n"
        f"{paths}\n{servers}\n}}\n"
    )
    return path


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def _asked(target: Target, url: str, model: str) -> bool:
    """Whether a request is served."""
    headers = target.headers.get(model, {})
    body = target.body(model, stream=model == STREAMS, max_tokens=1)
    try:
        return httpx.post(url, json=body, headers=headers, timeout=20, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
