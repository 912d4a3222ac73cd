"""Log lines: from `structlog` and `logging` through a bounded queue to stderr, and nothing waits for stderr.

A caller pays for a dictionary and an append. One thread turns what has gathered into text and writes it, many
lines with one system call: waking it for every line would cost a busy loop more than the line itself.
"""

from __future__ import annotations

import contextlib
import logging
import re
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import structlog

from tidegate_chassis.config import TelemetrySettings

try:
    from orjson import dumps
except ImportError:  # only the edge has it; the others write few lines
    _json: Any = structlog.processors.JSONRenderer()
else:
    _json = structlog.processors.JSONRenderer(
        serializer=lambda event, **_: dumps(event, default=repr).decode()
    )

_LONGEST = 10_000
"""Lines that wait; what comes then is dropped and counted."""
_GATHER = 0.01
"""Seconds in which further lines may gather before the first is written."""
_PLAIN = re.compile(r"[^\s\"'=\\]*")

Event = MutableMapping[str, Any]


class Sink:
    """Where lines gather: texts, or events that are still to be rendered. Also a file for `logging`."""

    def __init__(self, render: Callable[[Event], str], limit: int = _LONGEST) -> None:
        """`render` runs in the sink's thread; when it fails, that line says so."""
        self.render = render
        self.dropped = 0
        self._limit = limit
        self._lines: deque[str | Event | threading.Event] = deque()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="log")

    def start(self) -> None:
        """Starts the thread. May be called again."""
        if not self._thread.is_alive():
            self._thread.start()

    def put(self, line: str | Event) -> None:
        """Takes a line; an event belongs to the sink from now on. Never waits."""
        if len(self._lines) >= self._limit:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()

    def write(self, text: str) -> int:
        """What `logging` calls."""
        self.put(text)
        return len(text)

    def flush(self, timeout: float = 0.0) -> None:
        """Waits up to `timeout` seconds for the lines so far to be written."""
        if timeout and self._thread.is_alive():
            done = threading.Event()
            self._lines.append(done)
            self._wake.set()
            done.wait(timeout)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(_GATHER)
            self._wake.clear()  # before the look: what comes after it wakes again
            self._write([self._lines.popleft() for _ in range(len(self._lines))])

    def _write(self, lines: list[str | Event | threading.Event]) -> None:
        texts = [self._text(line) for line in lines if not isinstance(line, threading.Event)]
        with contextlib.suppress(OSError, ValueError):
            for part in _parts(texts):
                sys.stderr.write(part)
                sys.stderr.flush()
        for line in lines:
            if isinstance(line, threading.Event):
                line.set()

    def _text(self, line: str | Event) -> str:
        if isinstance(line, str):
            return line
        try:
            return self.render(line) + "\n"
        except Exception as error:  # noqa: BLE001 - one bad value must not end all logging
            return f"a log line could not be rendered ({type(error).__name__})\n"


def _parts(texts: list[str]) -> Iterator[str]:
    """Whole lines, as many as a pipe takes in one piece: several processes may write into the same."""
    part: list[str] = []
    size = 0
    for text in texts:
        length = len(text) if text.isascii() else len(text.encode(errors="replace"))
        if part and size + length > select.PIPE_BUF:
            yield "".join(part)
            part, size = [], 0
        part.append(text)
        size += length
    yield "".join(part)


_sink = Sink(str)


class _Logger:
    """What structlog hands finished events to."""

    def msg(self, event: Event) -> None:
        _sink.put(event)

    debug = info = warning = error = critical = exception = msg


def set_up(service: str, settings: TelemetrySettings, worker: int = 0) -> None:
    """Configures structlog and logging for this process. Call it once, after any fork.

    `worker`: the number of one of several processes of the service, told in each line; 0 = the only one."""
    level = getattr(logging, settings.log_level.upper())
    render = _renderer(settings.log_format)
    _sink.render = lambda event: str(render(None, "", event))
    _sink.start()
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        _named(service, worker),
    ]
    structlog.configure(
        processors=[*shared, lambda _, __, event: ((event,), {})],
        wrapper_class=unfailing(structlog.make_filtering_bound_logger(level)),
        logger_factory=lambda *_: _Logger(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(_sink)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def unfailing(wrapper: type[Any]) -> type[Any]:
    """A structlog wrapper class whose calls never raise: what can't be logged is dropped and counted."""

    class Unfailing(wrapper):  # type: ignore[misc]
        def _proxy_to_logger(self, *args: Any, **fields: Any) -> Any:
            try:
                return super()._proxy_to_logger(*args, **fields)
            except structlog.DropEvent:
                return None
            except Exception:  # noqa: BLE001 - a line of a log is worth no request
                _sink.dropped += 1
                return None

    return Unfailing


def flush(timeout: float) -> None:
    """Waits up to `timeout` seconds for the lines so far to be written."""
    _sink.flush(timeout)


def plain(_: Any, __: str, event: Event) -> str:
    """A line for people: structlog's console look without colours, at a fifth of its cost."""
    stamp, level, name = event.pop("timestamp", ""), event.pop("level", ""), event.pop("event", "")
    exception = event.pop("exception", "")
    fields = " ".join(f"{key}={_word(event[key])}" for key in sorted(event))
    line = f"{stamp} [{level:<9}] {name:<30} {fields}".rstrip()
    return f"{line}\n{exception}" if exception else line


def _word(value: Any) -> str:
    text = str(value)
    return text if not isinstance(value, str) or _PLAIN.fullmatch(text) else repr(text)


def _renderer(form: str) -> Any:
    if form == "json":
        return _json
    return structlog.dev.ConsoleRenderer(colors=True) if sys.stderr.isatty() else plain


def _named(service: str, worker: int) -> Any:
    def add(_: Any, __: str, event: Event) -> Event:
        event["service"] = service
        if worker:
            event["worker"] = worker
        return event

    return add
