"""What the edge needs to know of a request's body, and the only changes it makes to it. Pure.

A body is never parsed and written again: the value of `model` is spliced by its place in the bytes, missing
defaults are inserted before everything else, and the rest stays as the caller sent it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from tidegate_edge.envelope import Failure
from tidegate_edge.scanner import (
    LIMITS,
    MAX_DEPTH,
    MAX_NAME,
    Scanner,
    check_names,
    duplicate_model,
    long_name,
    too_deep,
)

LARGE = 256 * 1024
"""Bytes from which on a JSON body is scanned as it comes rather than parsed."""

Edit = tuple[int, int, bytes]
"""Bytes that take the place of those from one offset to another."""

_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_SPACE = rb"[ \t\n\r]*+"
_MODEL = re.compile(rb'(?s)"model"' + _SPACE + rb":" + _SPACE)
_VALUE = re.compile(rb"(?s)" + _STRING)
_TOKEN = re.compile(rb"(?s)" + _STRING + rb"|[{}\[\]]")
_COLON = re.compile(_SPACE + rb":" + _SPACE)
_HIDDEN = b"\\u006"
"""Every letter of `model` is written \\u006x when it is escaped at all; no other escape gives a letter."""


class Said(NamedTuple):
    """What a request's body says."""

    model: str
    """As the caller wrote it: a name or an alias."""
    stream: bool
    """The caller wants server-sent events."""
    span: tuple[int, int]
    """Where the value of `model` stands."""
    keys: frozenset[str]
    """Outermost keys, or names of parts."""
    max_tokens: int = 0
    """The caller's limit on the answer; 0 = none said."""
    opening: int = 0
    """Where defaults are inserted."""
    boundary: bytes = b""
    """A form's; empty = the body is JSON."""

    def edits(self, upstream_model: str, defaults: Mapping[str, bytes]) -> list[Edit]:
        """What is changed for the model server, by place.

        `upstream_model` empty or equal = that value stays as it is. `defaults` are JSON texts by key; those
        that the caller has given stay away. A form takes texts, numbers and truth values alone. Raises
        Failure (400).
        """
        found: list[Edit] = []
        missing = {key: value for key, value in defaults.items() if key not in self.keys}
        new = _parts(missing, self.boundary) if self.boundary else _pairs(missing)
        if new:
            found.append((self.opening, self.opening, new))
        if upstream_model and upstream_model != self.model:
            value = upstream_model.encode() if self.boundary else orjson.dumps(upstream_model)
            found.append((*self.span, value))
        return sorted(found)

    def hints(self, defaults: Mapping[str, bytes]) -> tuple[bool, int]:
        """Whether the answer is a stream, and the limit on its tokens (0 = none), defaults included."""
        stream = self.stream or ("stream" not in self.keys and defaults.get("stream") == b"true")
        if self.max_tokens or self.boundary:
            return stream, self.max_tokens
        texts = {key: text for key, text in defaults.items() if key in LIMITS and key not in self.keys}
        return stream, _limit({key: orjson.loads(text) for key, text in texts.items()})


def splice(raw: bytes, edits: list[Edit]) -> bytes:
    """The bytes with the changes, which are in the order of their places and don't overlap."""
    if not edits:
        return raw
    pieces: list[bytes | memoryview] = []
    view, at = memoryview(raw), 0
    for begin, end, new in edits:
        pieces += view[at:begin], new
        at = end
    return b"".join((*pieces, view[at:]))


def read_json(raw: bytes) -> Said:
    """Reads a JSON body. Raises Failure (400) for anything that two readers could understand differently."""
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Failure("invalid_json", f"The body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise Failure("invalid_json", "The body must be a JSON object.")
    _check_depth(raw, data)
    if len(raw) > MAX_NAME:
        check_names(len(data), max(map(len, data), default=0))
    model = _model(data)
    return Said(
        model=model,
        stream=data.get("stream") is True,
        span=model_span(raw),
        keys=frozenset(data),
        max_tokens=_limit(data),
        opening=raw.index(b"{") + 1,
    )


def scanned(scanner: Scanner) -> Said:
    """What a scanner has found in a whole body. Raises Failure (400)."""
    scanner.finish()
    told = {"model": None} if "model" in scanner.keys else {}  # whatever it is, if it is no plain value
    return Said(
        model=_model(told | scanner.values),
        stream=scanner.values.get("stream") is True,
        span=scanner.span,
        keys=frozenset(scanner.keys),
        max_tokens=_limit(scanner.values),
        opening=scanner.opening,
    )


def _model(data: Mapping[str, object]) -> str:
    model = data.get("model")
    if not isinstance(model, str) or not model:
        said = "must be a text that is not empty" if "model" in data else "is required"
        raise Failure("missing_model", f"`model` {said}.", param="model")
    if len(model) > MAX_NAME:
        raise long_name()
    return model


def _limit(data: Mapping[str, object]) -> int:
    first, second, third = LIMITS
    limit = data.get(first) or data.get(second) or data.get(third)
    return limit if type(limit) is int and 0 < limit < 2**31 else 0


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
        raise duplicate_model()
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
    raise too_deep()


def _pairs(defaults: Mapping[str, bytes]) -> bytes:
    """Behind the opening brace: there is always more, `model` at least."""
    return b"".join(orjson.dumps(key) + b":" + value + b"," for key, value in defaults.items())


def _parts(defaults: Mapping[str, bytes], boundary: bytes) -> bytes:
    """Before a form's first part. Lists, objects and null have no form that all servers agree on."""
    found = b""
    for key, text in defaults.items():
        if text[:1] not in b"[{n":
            name = key.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A").encode()
            value = orjson.loads(text).encode() if text[:1] == b'"' else text
            found += b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (
                boundary,
                name,
                value,
            )
    if found.count(b"--" + boundary) != found.count(b"--" + boundary + b"\r\nContent-Disposition"):
        raise Failure("invalid_multipart", "The multipart body's boundary is a text of the model's defaults.")
    return found
