"""Reading requests' bodies: processor time, the longest that the loop is held up, and memory beside the body.

The edge's readers alone, against building the whole tree as orjson does.
"""

from __future__ import annotations

import base64
import json
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator

import orjson

from bench.client import quantile
from bench.table import Table, ms
from tidegate_edge.multipart import Form
from tidegate_edge.request import LARGE, read_json, scanned
from tidegate_edge.scanner import Scanner

SLICE = 16 * 1024
"""What the edge reads of a large body before it looks whether others wait."""
TARGET = 0.01
"""Seconds of one slice at most."""
_TEXT = 'The quick brown fox "jumps" over\nthe lazy dog. '


def run(seconds: float) -> None:
    """Prints the table; all of it takes about `seconds`."""
    table = Table(
        "Reading a body", "body", "bytes", "time", "held up, p99", "memory", "orjson: time", "memory"
    )
    bodies = [(words, make(size)) for size in (300, 100 * 2**10, 10 * 2**20) for words, make in KINDS.items()]
    bodies.append(("JSON: 20,000 small messages", _messages(20_000)))
    for words, raw in bodies:
        slices: list[float] = []
        least = min(_timed(lambda: _read(raw, slices), seconds / len(bodies) / 2))  # noqa: B023 - called here
        tree, size = "", ""
        if raw[:1] == b"{":
            tree = ms(min(_timed(lambda: orjson.loads(raw), seconds / len(bodies) / 2)))  # noqa: B023
            size = _kib(_peak(lambda: orjson.loads(raw)))  # noqa: B023
        longest = quantile(slices, 0.99)
        memory = _kib(_peak(lambda: _read(raw, [])))  # noqa: B023
        table.row(
            words,
            len(raw),
            ms(least),
            ms(longest),
            memory,
            tree,
            size,
            target=f"held up ≤ {ms(TARGET)}",
            met=longest <= TARGET,
        )


def _read(raw: bytes, slices: list[float]) -> None:
    """As the edge does it; `slices` gets the time of each step."""
    if raw[:1] == b"{" and len(raw) <= LARGE:
        began = time.thread_time()
        read_json(raw)
        slices.append(time.thread_time() - began)
        return
    reader = Scanner() if raw[:1] == b"{" else Form(b"multipart/form-data; boundary=B")
    for at in range(0, len(raw), SLICE):
        began = time.thread_time()
        reader.feed(raw[at : at + SLICE])
        slices.append(time.thread_time() - began)
    if isinstance(reader, Scanner):
        scanned(reader)
    else:
        reader.finish()


def _timed(work: Callable[[], object], seconds: float) -> Iterator[float]:
    end = time.monotonic() + seconds
    while True:
        began = time.thread_time()
        work()
        yield time.thread_time() - began
        if time.monotonic() > end:
            return


def _peak(work: Callable[[], object]) -> int:
    """Bytes that it takes at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _kib(size: int) -> str:
    return f"{size / 1024:.0f} KiB"


def _messages(count: int) -> bytes:
    said = {"role": "user", "content": [{"type": "text", "text": _TEXT}]}
    return json.dumps({"model": "small", "messages": [said] * count}).encode()


def _text(size: int) -> bytes:
    text = _TEXT * (size // (len(_TEXT) + 4))
    return json.dumps({"model": "small", "messages": [{"role": "user", "content": text}]}).encode()


def _image(size: int) -> bytes:
    image = base64.b64encode(random.Random(size).randbytes(size * 3 // 4)).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
    return json.dumps({"model": "small", "messages": [{"role": "user", "content": [part]}]}).encode()


def _form(size: int) -> bytes:
    head = b'--B\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    audio = random.Random(size).randbytes(size)
    return head % (b"file", b'; filename="a.wav"', audio) + head % (b"model", b"", b"small") + b"--B--\r\n"


KINDS: dict[str, Callable[[int], bytes]] = {
    "JSON: a text": _text,
    "JSON: an image": _image,
    "a form: a file": _form,
}
