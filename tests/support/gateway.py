"""A real `tidegate serve` for tests: its own port, folder and processes, and a look at all of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import yaml

from tidegate.admission.v1 import admission_pb2, admission_pb2_grpc

GUARD = Path(__file__).parent / "guard"
BIN = Path(sys.executable).parent
MARK = "TIDEGATE_TEST"
SERVICES = ("edge", "admission", "lifecycle")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """Polls until `condition` holds and returns its value; fails with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        pause.wait(0.02)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def simulated(*flags: str, **keys: Any) -> dict[str, Any]:
    """A model that the simulator serves; `keys` are keys of the model in the configuration."""
    command = [sys.executable, "-m", "tidegate_simulator", "--port", "{port}", "--model", "{name}", *flags]
    return {"engine": "command", "command": command, "vram": "10GiB", **keys}


class Gateway:
    """`tidegate serve` with a configuration, from start to the proof that nothing is left."""

    def __init__(self, folder: Path, config: dict[str, Any], environ: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        self.mark = uuid.uuid4().hex
        self.config_path = folder / "tidegate.yaml"
        self.log_path = folder / "tidegate.log"
        config = {"edge": {}, "lifecycle": {}, **config}
        config["edge"] = {"listen": f"127.0.0.1:{self.port}", **config["edge"]}
        config["lifecycle"] = {
            "devices": [{"id": "gpu0", "memory": "24GiB", "budget": 1.0}],
            "data_dir": str(folder / "data"),
            **config["lifecycle"],
        }
        for model in config.get(
            "models", {}
        ).values():  # model servers get a clean environment, so say it there
            model["env"] = {MARK: self.mark, **model.get("env", {})}
        self.config_path.write_text(yaml.safe_dump(config))
        self.environ = os.environ | {MARK: self.mark, "PYTHONPATH": str(GUARD)} | (environ or {})
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def start(self, ready: bool = True) -> Gateway:
        """Starts `serve`; waits until it is ready unless told not to."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [BIN / "tidegate", "serve", "--config", self.config_path],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environ,
                start_new_session=True,
            )
        if ready:
            wait_for(self.is_ready, "/ready answers 200", 60)
        return self

    def is_ready(self) -> bool:
        """Whether /ready answers 200. Fails at once when the process has ended."""
        assert self.process is not None
        assert self.process.poll() is None, f"serve ended: {self.log()}"
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, number: int = signal.SIGTERM, within: float = 12.0) -> int:
        """Stops `serve` by a signal; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(within)

    def close(self) -> None:
        """The end of every test: stops what runs, then nothing may be left and nothing may have blocked."""
        self.http.close()
        if self.process is not None and self.process.poll() is None:
            self.stop()
        left = wait_for(lambda: not self.processes() or None, f"nothing is left: {self.processes()}", 10)
        assert left
        assert "BlockingError" not in self.log(), self.log()
        assert "sitecustomize" not in self.log(), "the guard against blocking calls was not active"

    def log(self) -> str:
        """All that was logged so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def processes(self) -> dict[int, str]:
        """Every living process of this gateway: pid and command line."""
        return dict(_marked(self.mark))

    def pids(self, word: str) -> list[int]:
        """Pids of the processes with a word in their command line, such as tidegate_edge."""
        return [pid for pid, command in self.processes().items() if word in command.split("\0")]

    def pid(self, service: str) -> int:
        """The pid of a service."""
        (pid,) = self.pids(f"tidegate_{service}")
        return pid

    def servers(self) -> list[int]:
        """Pids of the simulated model servers."""
        return self.pids("tidegate_simulator")

    def kill(self, service: str) -> int:
        """kill -9 of a service; the pid that it had."""
        pid = self.pid(service)
        os.kill(pid, signal.SIGKILL)
        return pid

    def status(self) -> dict[str, Any]:
        """/gateway/status."""
        status: dict[str, Any] = json.loads(self.http.get("/gateway/status").text)
        return status

    def instances(self) -> list[dict[str, Any]]:
        """The instances that exist, as the status tells them."""
        instances: list[dict[str, Any]] = self.status()["instances"]
        return instances

    def queue(self, model: str) -> dict[str, int]:
        """A model's queue, by admission's own books."""
        queue: dict[str, int] = self.status()["models"][model].get("queue", {"waiting": 0, "active": 0})
        return queue

    def is_idle(self) -> bool:
        """No ticket waits and no lease is held, by admission's own books; False while it can't be asked."""
        try:
            status = self.status()
        except (httpx.HTTPError, ValueError):
            return False
        queues = [model["queue"] for model in status["models"].values() if "queue" in model]
        asked: bool = status["admission"]["reachable"]
        return asked and all(queue["waiting"] == queue["active"] == 0 for queue in queues)

    def books(self) -> admission_pb2.Queues:
        """Admission's own books, asked for without the edge. It must listen on TCP."""
        address = yaml.safe_load(self.config_path.read_text())["admission"]["listen"]
        with grpc.insecure_channel(address) as channel:
            stub = admission_pb2_grpc.AdmissionServiceStub(channel)
            return stub.GetQueues(admission_pb2.GetQueuesRequest(), timeout=5).queues

    def chat(self, model: str, **body: Any) -> httpx.Response:
        """One chat completion, not streamed unless the body says so."""
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4} | body
        return self.http.post("/v1/chat/completions", json=body)


def _marked(mark: str) -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environ = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in environ and command:
            yield int(entry.name), command
