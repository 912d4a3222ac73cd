"""Log lines: who writes them, and what can't go wrong on the way."""

from __future__ import annotations

import logging
import select
import threading
from typing import Any

import pytest
import structlog

from tidegate_chassis import logs
from tidegate_chassis.logs import Event, Sink, plain


def written(capsys: pytest.CaptureFixture[str], sink: Sink) -> list[str]:
    sink.start()
    sink.flush(10.0)
    return capsys.readouterr().err.splitlines()


def test_lines_come_out_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts and events keep their order, and events are rendered by the sink's thread."""
    threads: set[str] = set()

    def render(event: Event) -> str:
        threads.add(threading.current_thread().name)
        return f"event {event['n']}"

    sink = Sink(render)
    sink.put({"n": 1})
    sink.write("text\n")
    sink.put({"n": 2})
    assert written(capsys, sink) == ["event 1", "text", "event 2"]
    assert threads == {"log"}


def test_a_line_that_cannot_be_rendered_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """An exception in a renderer costs its own line only: the thread goes on."""

    class Bad:
        def __str__(self) -> str:
            raise LookupError("secret")

    sink = Sink(lambda event: plain(None, "", event))
    sink.put({"event": "bad", "value": Bad()})
    sink.put({"event": "good"})
    assert [line.split()[-1] for line in written(capsys, sink)] == ["(LookupError)", "good"]


def test_lines_of_several_processes_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written at a time is whole lines, and no more than a pipe takes in one piece."""
    pieces: list[str] = []

    class Pipe:
        def write(self, text: str) -> None:
            pieces.append(text)

        def flush(self) -> None: ...

    monkeypatch.setattr("sys.stderr", Pipe())
    lines = ["ä" * (n % 700) + "\n" for n in range(3000)] + ["x" * 10_000 + "\n", "last\n"]
    sink = Sink(str)
    for line in lines:
        sink.put(line)
    sink.start()
    sink.flush(10.0)
    assert "".join(pieces) == "".join(lines)
    assert all(piece.endswith("\n") for piece in pieces if piece)
    too_long = [piece for piece in pieces if len(piece.encode()) > select.PIPE_BUF]
    assert too_long == ["x" * 10_000 + "\n"]


def test_a_full_sink_drops_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """What can't be written is dropped; nobody waits."""
    sink = Sink(lambda event: str(event["n"]), limit=2)
    for n in range(5):
        sink.put({"n": n})
    assert sink.dropped == 3
    assert written(capsys, sink) == ["0", "1"]


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"event": "a", "level": "info", "n": 1, "b": "x y"}, " [info     ] a" + " " * 30 + "b='x y' n=1"),
        ({"event": "a", "exception": "Traceback\n  x"}, " [         ] a\nTraceback\n  x"),
        ({"event": "", "path": "/v1", "e": ""}, " [         ] " + " " * 31 + "e= path=/v1"),
    ],
)
def test_a_plain_line_reads_like_structlogs(event: dict[str, Any], line: str) -> None:
    """Sorted fields behind time, level and event; texts with blanks are quoted."""
    assert plain(None, "", event) == line


def test_json_lines_take_any_value() -> None:
    """A value that JSON doesn't know is written as its repr."""
    line = logs._renderer("json")(None, "", {"event": "x", "level": logging.Logger})
    assert line == '{"event":"x","level":"<class \'logging.Logger\'>"}'


def test_a_log_call_never_raises() -> None:
    """Whatever a processor throws costs the line, never whoever logs."""

    def broken(*_: Any) -> Any:
        raise MemoryError

    wrapper = logs.unfailing(structlog.make_filtering_bound_logger(logging.INFO))
    log = structlog.wrap_logger(None, processors=[broken], wrapper_class=wrapper)
    before = logs._sink.dropped
    log.info("one", value=1)
    log.bind(more=2).warning("another")
    assert logs._sink.dropped == before + 2
