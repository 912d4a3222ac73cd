"""A service as a process: one event loop, signals, a lifeline to its parent, and gaps of the loop."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from importlib import metadata
from pathlib import Path

import structlog

from tidegate_chassis.config import EXIT_CONFIG, ConfigError, Problem

LIFELINE = "TIDEGATE_LIFELINE_FD"
"""Names the environment variable with the file descriptor of a pipe whose other end the parent holds. When it
closes, for whatever reason, the parent is gone and the service stops, as on SIGTERM."""

VERSION = metadata.version("tidegate")  # read at import: it looks at files, which a loop must not
"""Version of the software, as every service tells it."""

log = structlog.get_logger("tidegate.process")


class GapMeter:
    """Tells how much longer than planned an event loop was away (SIGSTOP, a suspended machine, a stall)."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        """Seconds between two calls of `observe`, as planned."""
        self._last: float | None = None

    def observe(self, now: float) -> float:
        """Seconds beyond the interval since the last call; 0 when on time. `now` is monotonic."""
        last, self._last = self._last, now
        return 0.0 if last is None else max(0.0, now - last - self.interval)


def command_line(service: str, check: Callable[[Path], list[Problem]]) -> Path:
    """Parses `--config FILE [--check]`. With `--check` it prints the problems as JSON and exits.

    Exits with 78 when the configuration has problems, and says every one of them.
    """
    parser = argparse.ArgumentParser(prog=f"tidegate {service}")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="the configuration file")
    parser.add_argument("--check", action="store_true", help="only check the configuration; problems as JSON")
    arguments = parser.parse_args()
    problems = check(arguments.config)
    if arguments.check:
        print(json.dumps([[problem.path, problem.message, problem.warning] for problem in problems]))
    else:
        for problem in problems:
            print(f"tidegate {service}: {problem}", file=sys.stderr)
    refused = any(not problem.warning for problem in problems)
    if refused or arguments.check:
        sys.exit(EXIT_CONFIG if refused else 0)
    config: Path = arguments.config
    return config


class Terminal:
    """The terminal that the process was started from, if any: tells a SIGHUP that was sent on purpose from
    the one that comes when the terminal is closed."""

    def __init__(self) -> None:
        self._had = _has_terminal()

    def closed(self) -> bool:
        """There was one, and it is gone."""
        return self._had and not _has_terminal()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def run(main: Callable[[asyncio.Event], Awaitable[None]], hangup: asyncio.Event | None = None) -> int:
    """Runs a service until its stop event is set and `main` has returned; gives the exit status.

    SIGTERM, SIGINT, the end of the lifeline and of the terminal set the event; a second signal ends the
    process at once. Any other SIGHUP sets `hangup`: the configuration is to be read again. A service without
    it reads its own at its start alone, and says so.
    An exception out of `main` is fatal: logged, status 1. A ConfigError is status 78.
    """
    try:
        import uvloop
    except ImportError:
        runner = asyncio.Runner()
    else:
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    try:
        with runner:
            runner.run(_guarded(main, hangup))
    except ConfigError as error:
        for problem in error.problems:
            print(f"tidegate: {problem}", file=sys.stderr)
        return EXIT_CONFIG
    except Exception:
        log.exception("a fatal error; the process ends")
        return 1
    return 0


async def _guarded(main: Callable[[asyncio.Event], Awaitable[None]], hangup: asyncio.Event | None) -> None:
    loop, terminal = asyncio.get_running_loop(), Terminal()
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    def on_hangup() -> None:
        if terminal.closed():
            on_signal(signal.SIGHUP)
        elif hangup is not None:
            hangup.set()
        else:
            log.info("SIGHUP has no function here: this service reads its configuration when it starts")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    watch_lifeline(loop, stop)
    await main(stop)


def watch_lifeline(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Sets `stop` when the parent that gave this process a lifeline is gone. Without one it does nothing."""
    text = os.environ.pop(LIFELINE, "")
    if not text.isdigit():
        return
    fd = int(text)
    os.set_inheritable(fd, False)  # a model server that inherited it would look like a live parent's child

    def ended() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        log.warning("the parent process is gone; stopping")
        stop.set()

    loop.add_reader(fd, ended)


def monotonic() -> float:
    """The clock of all shells, in seconds. It counts on while the process is stopped."""
    return time.monotonic()
