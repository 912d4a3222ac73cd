"""Real simulators on real ports, and what tests ask of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest

READY = "Application startup complete."
_PATIENCE = 20.0


class Simulated:
    """A running simulator: its process, what it printed, and a client of it."""

    def __init__(self, arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tidegate_simulator", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._client: httpx.Client | None = None

    def line(self, part: str) -> str:
        """Waits for a line that holds this text; fails where the output ends without one."""
        with self._news:
            self._news.wait_for(lambda: self._ended or self._with(part), _PATIENCE)
            found = self._with(part)
        assert found, f"no line with {part!r} in:\n" + "\n".join(self.lines)
        return found[0]

    @property
    def url(self) -> str:
        """Where it listens; waits until it does."""
        return self.line("Listening on").split()[-1]

    @property
    def http(self) -> httpx.Client:
        """A client of it."""
        if self._client is None:
            self._client = httpx.Client(base_url=self.url, timeout=_PATIENCE)
        return self._client

    def fault(self, fault: str, **fields: Any) -> None:
        """Sets a fault on it."""
        assert self.http.post("/simulator/faults", json={"fault": fault, **fields}).status_code == 200

    def until(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Asks for its journal until the condition holds of it."""
        for _ in range(2000):
            seen: dict[str, Any] = self.http.get("/simulator/requests").json()
            if condition(seen):
                return seen
        raise AssertionError(f"never so: {seen}")

    def wait(self) -> int:
        """The exit status, once it ends."""
        return self.process.wait(_PATIENCE)

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def close(self) -> None:
        """Kills what is left of it."""
        if self._client is not None:
            self._client.close()
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _with(self, part: str) -> list[str]:
        return [line for line in self.lines if part in line]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


class Simulate:
    """Starts simulators; all end with the test."""

    def __init__(self) -> None:
        self._started: list[Simulated] = []

    def start(self, *arguments: str, **environment: str) -> Simulated:
        """One with this command line, which need not be ready."""
        simulated = Simulated(arguments, environment)
        self._started.append(simulated)
        return simulated

    def __call__(self, *arguments: str, **environment: str) -> Simulated:
        """One of the model `small` on a free port, ready."""
        simulated = self.start("--port", "0", "--model", "small", *arguments, **environment)
        simulated.line(READY)
        return simulated

    def close(self) -> None:
        """Ends all."""
        for simulated in self._started:
            simulated.close()


@pytest.fixture
def simulate() -> Iterator[Simulate]:
    """Starts simulators that end with the test."""
    starter = Simulate()
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Simulated]:
    """One simulator for the tests of a module that leave it as it was."""
    starter = Simulate()
    yield starter("--served-model-name", "small", "other", "--max-model-len", "200")
    starter.close()
