"""nvidia-smi: one program, asked with a deadline, off the event loop."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import structlog

log = structlog.get_logger("tidegate.devices")

PROGRAM = "nvidia-smi"
DEADLINE = 10.0
"""Seconds that it may take."""


class Unreadable(Exception):
    """nvidia-smi gave nothing to go by; the text says why, for people."""


class Smi(Protocol):
    """Something that runs nvidia-smi."""

    every: float
    """Seconds that should pass between two questions at least: what it costs to ask."""

    async def ask(self, *arguments: str, deadline: float = DEADLINE) -> str:
        """What nvidia-smi prints with these arguments; Unreadable when it fails or takes longer than that."""

    async def close(self) -> None:
        """Leaves nothing behind."""


class HostSmi:
    """The program on this machine, run as a child process by a thread."""

    every = 0.25

    def __init__(self, program: str = PROGRAM) -> None:
        self._program = program
        self._stuck: subprocess.Popen[str] | None = None
        self._running: set[subprocess.Popen[str]] = set()

    async def ask(self, *arguments: str, deadline: float = DEADLINE) -> str:
        """See `Smi.ask`. The thread is a daemon: one that waits for a driver doesn't keep us from ending."""
        answer: Future[str] = Future()

        def work() -> None:
            try:
                answer.set_result(self._run((self._program, *arguments), deadline))
            except Exception as error:  # noqa: BLE001 - whatever it was, its caller gets it
                answer.set_exception(error)

        threading.Thread(target=work, name="tidegate-nvidia-smi", daemon=True).start()
        return await asyncio.shield(asyncio.wrap_future(answer))

    async def close(self) -> None:
        """What still runs is killed; a hung driver isn't waited for."""
        for process in list(self._running):
            process.kill()

    def _run(self, command: Sequence[str], deadline: float) -> str:
        """In a thread. One that hangs in the driver can't even be killed: it is left, and none is put beside
        it as long as it is there."""
        if self._stuck is not None and self._stuck.poll() is None:
            raise Unreadable(f"an earlier nvidia-smi (process {self._stuck.pid}) hangs in the driver")
        self._stuck = None
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except FileNotFoundError:
            raise Unreadable("nvidia-smi was not found") from None
        except OSError as error:
            raise Unreadable(f"nvidia-smi can't be run: {error.strerror}") from error
        self._running.add(process)
        try:
            output, _ = process.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            self._end(process)
            raise Unreadable(f"nvidia-smi gave no answer within {deadline:g} s") from None
        finally:
            self._running.discard(process)
        return checked(output, process.returncode)

    def _end(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        try:
            process.communicate(timeout=1)
        except subprocess.TimeoutExpired:
            log.error("devices.stuck", pid=process.pid)
            self._stuck = process


def checked(output: str, status: int) -> str:
    """What it printed; Unreadable with its first words when its exit status tells a failure."""
    if status:
        said = printable(" ".join(output.split()), 160)
        raise Unreadable(f"nvidia-smi failed with status {status}{': ' if said else ''}{said}")
    return output


def printable(text: str, length: int) -> str:
    """The beginning of a text that anybody may have written, for people."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:length]
