"""What the edge needs to know of a request's body, and the only changes it makes to it. Pure.

A body is never parsed and written again: the value of `model` is spliced by its place in the bytes, missing
defaults are inserted behind the opening brace, and everything else stays as the caller sent it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from tidegate_edge.envelope import Failure

MAX_DEPTH = 128
"""Nesting of a JSON body."""
MAX_VALUES = 400_000
"""Values of a JSON body, about: what is parsed must stay small beside what was sent."""

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_SPACE = rb"[ \t\n\r]*+"
_MODEL = re.compile(rb'(?s)"model"' + _SPACE + rb":" + _SPACE)
_VALUE = re.compile(rb"(?s)" + _STRING)
_TOKEN = re.compile(rb"(?s)" + _STRING + rb"|[{}\[\]]")
_COLON = re.compile(_SPACE + rb":" + _SPACE)
_HIDDEN = b"\\u006"
"""Every letter of `model` is written \\u006x when it is escaped at all; no other escape gives a letter."""


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body and what it says."""

    raw: bytes
    model: str
    """As the caller wrote it: a name or an alias."""
    stream: bool
    """The caller wants server-sent events."""
    span: tuple[int, int]
    """Where the value of `model` stands in `raw`."""
    keys: frozenset[str] = frozenset()
    """Top-level keys (JSON only)."""
    max_tokens: int = 0
    """The caller's limit on the answer; 0 = none said."""
    json: bool = True

    def rewritten(self, upstream_model: str, defaults: dict[str, Any]) -> bytes:
        """The bytes for the model server. `upstream_model` empty or equal = that value stays as it is."""
        raw, (begin, end) = self.raw, self.span
        if upstream_model and upstream_model != self.model:
            value = orjson.dumps(upstream_model) if self.json else upstream_model.encode()
            raw = raw[:begin] + value + raw[end:]
        missing = {key: value for key, value in defaults.items() if key not in self.keys} if self.json else {}
        if missing:
            behind = raw.index(b"{") + 1
            raw = raw[:behind] + orjson.dumps(missing)[1:-1] + b"," + raw[behind:]
        return raw


def read_json(raw: bytes) -> Body:
    """Reads a JSON body. Raises Failure (400) for anything that two readers could understand differently."""
    if len(raw) > 65536 and structure(raw) > MAX_VALUES:
        raise Failure("too_complex", f"The body holds more than {MAX_VALUES} values.")
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Failure("invalid_json", f"The body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise Failure("invalid_json", "The body must be a JSON object.")
    _check_depth(raw, data)
    model = data.get("model")
    if not isinstance(model, str) or not model:
        said = "must be a text that is not empty" if "model" in data else "is required"
        raise Failure("missing_model", f"`model` {said}.", param="model")
    limit = data.get("max_completion_tokens") or data.get("max_tokens") or data.get("max_output_tokens")
    return Body(
        raw=raw,
        model=model,
        stream=data.get("stream") is True,
        span=model_span(raw),
        keys=frozenset(data),
        max_tokens=limit if type(limit) is int and 0 < limit < 2**31 else 0,
    )


def model_span(raw: bytes) -> tuple[int, int]:
    """Where the value of the top-level `model` stands in a valid JSON object that has one as a text.

    1. Nothing is escaped that could be `model`, and `"model":` is there once: that is it. (In a text the
       closing quote would be escaped, so it would not look like this.)
    2. Otherwise tokens are walked, and keys of the outermost object are decoded. Two `model` are an error:
       the model server might read the other one.
    """
    if _HIDDEN not in raw:
        found = _MODEL.finditer(raw)
        first, second = next(found, None), next(found, None)
        if first is not None and second is None:
            value = _VALUE.match(raw, first.end())
            if value is not None:
                return value.span()  # 1
    spans = [raw_span for key, raw_span in _top_level(raw) if key == "model"]
    if len(spans) != 1:
        raise Failure("duplicate_model", "`model` is given more than once.", param="model")
    return spans[0]  # 2


def _top_level(raw: bytes) -> list[tuple[str, tuple[int, int]]]:
    """Keys of the outermost object, decoded, with the place of their value where it is a text."""
    found: list[tuple[str, tuple[int, int]]] = []
    depth = 0
    for token in _TOKEN.finditer(raw):
        first = raw[token.start()]
        if first == 0x22:
            if depth == 1 and (colon := _COLON.match(raw, token.end())):
                value = _VALUE.match(raw, colon.end())
                span = value.span() if value else (colon.end(), colon.end())
                found.append((orjson.loads(token.group()), span))
        elif first in b"{[":
            depth += 1
        else:
            depth -= 1
    return found


def structure(raw: bytes) -> int:
    """About how many values a body holds: separators and openers outside of texts, once that matters."""
    count = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if count <= MAX_VALUES:
        return count
    texts = 0
    for text in _VALUE.finditer(raw):
        begin, end = text.span()
        count -= raw.count(b",", begin, end) + raw.count(b"[", begin, end) + raw.count(b"{", begin, end)
        texts += 1
        if texts > MAX_VALUES or count <= MAX_VALUES:
            break
    return max(count, texts)


def _check_depth(raw: bytes, data: dict[str, Any]) -> None:
    if raw.count(b"{") + raw.count(b"[") <= MAX_DEPTH:
        return
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for outer in level
            for child in (outer.values() if type(outer) is dict else outer)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise Failure("too_complex", f"The body is nested deeper than {MAX_DEPTH} levels.")
