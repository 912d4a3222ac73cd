"""The real clients, each a program in an environment of its own that takes orders and gives facts."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.clients import NODE, PROGRAMS, interpreter, node

Facts = dict[str, Any]
PYTHON = PROGRAMS / "python"
_PATIENCE = 100.0
"""Seconds for one order, the time that the client needs to be imported included."""

CHAT = frozenset({"chat", "complete", "embed", "use_tool", "shape", "read", "leave"})
RESPONSES = frozenset({"respond", "use_tool_in_response", "shape_response"})
KEPT = frozenset({"keep", "fetch", "drop"})
MEDIA = frozenset({"transcribe", "speak", "draw", "redraw"})
MODELS = frozenset({"models", "model"})
OPENAI = CHAT | RESPONSES | KEPT | MEDIA | MODELS | {"translate", "upload"}


@dataclass(frozen=True)
class Program:
    """How a client is started, and what it has."""

    command: tuple[str | Path, ...]
    routes: frozenset[str]
    """The routes that its program knows: all that the client has and the gateway relays."""
    whole: frozenset[str] = frozenset()
    """Those of them that it can't stream, where others can."""
    obeys: bool = True
    """It knows `x-should-retry`, as the clients made by OpenAI's and Anthropic's generator do."""


def _python(name: str, program: str = "") -> tuple[str | Path, ...]:
    return interpreter(name), PYTHON / (program or name) / "client.py"


CLIENTS: dict[str, Program] = {
    "openai": Program((sys.executable, PYTHON / "openai" / "client.py"), OPENAI),
    "openai_httpx": Program(_python("openai_httpx", "openai"), OPENAI),
    "openai_node": Program((node(), NODE / "openai.mjs"), OPENAI),
    "anthropic": Program(_python("anthropic"), MODELS | {"chat", "count", "use_tool", "read", "leave"}),
    "litellm": Program(
        _python("litellm"),
        CHAT | KEPT | MEDIA | {"respond", "message", "rank"},
        whole=frozenset({"transcribe", "speak"}),
    ),
    "langchain": Program(_python("langchain"), (CHAT | RESPONSES) - {"shape_response"}),
    "ai_openai": Program(
        (node(), NODE / "ai.mjs", "openai"),
        CHAT | RESPONSES | MEDIA,
        whole=frozenset({"transcribe", "speak"}),
        obeys=False,
    ),
    "ai_compatible": Program((node(), NODE / "ai.mjs", "compatible"), CHAT | {"draw", "redraw"}, obeys=False),
    "curl": Program(
        (sys.executable, PYTHON / "curl" / "client.py"),
        frozenset({"chat", "embed", "transcribe", "models", "leave"}),
        whole=frozenset({"transcribe"}),
        obeys=False,
    ),
}


def has_status(facts: Facts, status: int) -> bool:
    """Whether the client tells that status of an error; curl tells it in words only."""
    return facts["status"] == status or f"error: {status}" in facts["message"]


class Client:
    """One client's process, started with its first order. `at` goes with each: where, and by which key."""

    def __init__(self, name: str, at: Facts) -> None:
        self.name = name
        self._at = at
        self.program = CLIENTS[name]
        self._process: subprocess.Popen[str] | None = None
        self._orders = 0
        self._facts: queue.Queue[str] = queue.Queue()

    def begin(self, route: str, **words: Any) -> None:
        """Sends an order and doesn't wait."""
        process = self._process or self._start()
        assert process.stdin is not None
        self._orders += 1
        order = {"number": self._orders, "do": route, "with": self._at | words}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()

    def result(self) -> Facts:
        """The facts of the last order; what the client raised is among them, as `raised`."""
        while True:
            line = self._facts.get(timeout=_PATIENCE)
            assert line, f"{self.name} ended in the middle of an order"
            facts: Facts = json.loads(line)
            if facts.pop("number") == self._orders:  # not of one that a test before gave up
                return facts

    def do(self, route: str, **words: Any) -> Facts:
        """The facts of an order in which nothing may be raised."""
        self.begin(route, **words)
        facts = self.result()
        assert "raised" not in facts, f"{self.name}, {route}: {facts}"
        return facts

    def fail(self, route: str, **words: Any) -> Facts:
        """The facts of an order in which something must be raised."""
        self.begin(route, **words)
        facts = self.result()
        assert "raised" in facts, f"{self.name}, {route}: {facts}"
        return facts

    def close(self) -> None:
        """Ends the process."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        environ |= {"PYTHONPATH": str(PYTHON), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        self._process = process = subprocess.Popen(
            self.program.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )
        threading.Thread(target=self._read, args=(process,), daemon=True).start()
        return process

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._facts.put(line)
        self._facts.put("")
