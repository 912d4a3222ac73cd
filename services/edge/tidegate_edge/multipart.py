"""Multipart bodies (audio): finds the part `model` and its place. Pure, and stricter than most servers.

Whatever two readers could take apart differently is refused: text before the first boundary, bare line
feeds around boundaries, a part without a name, two parts `model`.
"""

from __future__ import annotations

import re

from tidegate_edge.envelope import Failure
from tidegate_edge.request import Body

_MAX_PARTS = 100
_MAX_HEADERS = 8192
_MAX_MODEL = 256
_BOUNDARY = re.compile(
    rb"multipart/form-data[ \t]*;(?:[^;\"]*;)*?[ \t]*boundary=(?:\"([0-9A-Za-z'()+_,./:=? -]{1,70})\"|"
    rb"([0-9A-Za-z'+_.-]{1,70}))[ \t]*(?:;.*)?",
    re.IGNORECASE,
)
_NAME = re.compile(rb'(?:^|;)[ \t]*name[ \t]*=[ \t]*(?:"([^"\\]*)"|([^\s";]+))', re.IGNORECASE)
_FILENAME = re.compile(rb";[ \t]*filename\*?[ \t]*=", re.IGNORECASE)


def is_multipart(content_type: bytes) -> bool:
    """Whether a Content-Type is a multipart form's."""
    return content_type[:19].lower() == b"multipart/form-data"


def read_multipart(raw: bytes, content_type: bytes) -> Body:
    """Reads a multipart form. Raises Failure (400)."""
    found = _BOUNDARY.fullmatch(content_type)
    boundary = (found[1] or found[2]) if found else b""
    if not boundary or boundary.endswith(b" ") or content_type.lower().count(b"boundary=") != 1:
        raise _invalid("its boundary is missing or malformed")
    model: tuple[int, int] | None = None
    stream = False
    for name, has_file, begin, end in _parts(raw, boundary):
        if name == b"model":
            if model is not None:
                raise Failure("duplicate_model", "`model` is given more than once.", param="model")
            if has_file or not 0 < end - begin <= _MAX_MODEL:
                raise Failure("missing_model", "`model` must be a short text.", param="model")
            model = begin, end
        elif name == b"stream":
            stream = raw[begin:end].strip().lower() in (b"true", b"1")
    if model is None:
        raise Failure("missing_model", "`model` is required.", param="model")
    try:
        value = raw[slice(*model)].decode()
    except UnicodeDecodeError:
        raise Failure("missing_model", "`model` must be UTF-8.", param="model") from None
    return Body(raw=raw, model=value, stream=stream, span=model, json=False)


def _parts(raw: bytes, boundary: bytes) -> list[tuple[bytes, bool, int, int]]:
    """Name, whether it is a file, and the place of the content, of each part."""
    opener, delimiter = b"--" + boundary, b"\r\n--" + boundary
    if not raw.startswith(opener + b"\r\n"):
        raise _invalid("it doesn't begin with its boundary")
    found: list[tuple[bytes, bool, int, int]] = []
    at = len(opener) + 2
    while len(found) < _MAX_PARTS:
        head = raw.find(b"\r\n\r\n", at, at + _MAX_HEADERS)
        if head < 0:
            raise _invalid("a part has no headers, or too long ones")
        end = raw.find(delimiter, head + 2)
        if end < 0:
            raise _invalid("a part has no end")
        begin = head + 4
        found.append((*_disposition(raw[at:head]), begin, max(begin, end)))
        at = end + len(delimiter)
        after = raw[at : at + 2]
        if after == b"--" and raw[at + 2 :].strip() == b"":
            return found
        if after != b"\r\n":
            raise _invalid("a boundary is followed by something else")
        at += 2
    raise _invalid(f"it has more than {_MAX_PARTS} parts")


def _disposition(headers: bytes) -> tuple[bytes, bool]:
    lines = [line for line in headers.split(b"\r\n") if line[:20].lower() == b"content-disposition:"]
    if len(lines) != 1 or b"\n" in headers.replace(b"\r\n", b"") or re.search(rb"(?m)^[ \t]", headers):
        raise _invalid("a part's headers are malformed")
    names = _NAME.findall(lines[0].split(b":", 1)[1])
    if len(names) != 1:
        raise _invalid("a part has no plain name")
    return names[0][0] or names[0][1], bool(_FILENAME.search(lines[0]))


def _invalid(why: str) -> Failure:
    return Failure("invalid_multipart", f"The multipart body is malformed: {why}.")
