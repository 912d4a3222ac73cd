"""Multipart forms (audio, images): finds the part `model` and its place, as the body comes. Pure, and
stricter than most servers.

Whatever two readers could take apart differently is refused: text before the first boundary, bare line
feeds around boundaries, a part without a plain name, two parts `model`, another charset or encoding.
"""

from __future__ import annotations

import re

from tidegate_edge.downstream.grammar import TOKEN
from tidegate_edge.envelope import Failure
from tidegate_edge.request import Said
from tidegate_edge.scanner import duplicate_model

_MAX_PARTS = 100
_MAX_HEADERS = 8192
_MAX_VALUE = 256
"""Bytes of a part that is read."""
_LONGEST_END = 1024
"""Bytes behind the last boundary, which are white space."""
_SPACE = rb"[ \t]*+"
_PARAMETER = re.compile(
    rb';%b(%b)%b=%b(?:"((?:[^"\\\x00-\x1f\x7f]|\\(?!"))*+)"|(%b))%b'
    % (_SPACE, TOKEN, _SPACE, _SPACE, TOKEN, _SPACE)
)
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")
_HEADER = re.compile(rb"(%b):%b([^\x00-\x08\x0a-\x1f\x7f]*+)" % (TOKEN, _SPACE))
_UTF8 = (b"utf-8", b"utf8", b"us-ascii")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_NO_NAMES = (b"", b"_charset_")
"""The second one changes what all parts mean."""
_AS_IT_IS = (b"7bit", b"8bit", b"binary")


def is_multipart(content_type: bytes) -> bool:
    """Whether a Content-Type is a multipart form's."""
    return content_type[:19].lower() == b"multipart/form-data"


class Form:
    """One form. `feed` it, then `finish`; both, and making one, raise Failure (400)."""

    def __init__(self, content_type: bytes) -> None:
        self._boundary = _boundary(content_type)
        self._opener = b"--" + self._boundary
        self._step = self._start
        self._held = b""
        self._base = 0
        self._parts = 0
        self._names: set[bytes] = set()
        self._name = b""
        """Of the part whose content is read, as are the next three."""
        self._value = b""
        """What its content begins with."""
        self._begin = 0
        self._length = -1
        """What it says of its length; -1 = nothing."""
        self._model = b""
        self._span = (0, 0)
        self._stream = False
        self._after = 0

    def feed(self, piece: bytes) -> None:
        """The next bytes."""
        data, at = self._held + piece, 0
        while (then := self._step(data, at)) is not None:
            at = then
        self._held = data[at:]
        self._base += at

    def finish(self) -> Said:
        """There are no more: what it says."""
        if self._step != self._epilogue:
            raise _invalid("it has no end")
        if b"model" not in self._names:
            raise Failure("missing_model", "`model` is required.", param="model")
        return Said(
            model=_text(self._model),
            stream=self._stream,
            span=self._span,
            keys=frozenset(name.decode("utf-8", "replace") for name in self._names),
            boundary=self._boundary,
        )

    # Steps: each takes what it can and gives where the rest begins; None = it needs more.

    def _start(self, data: bytes, at: int) -> int | None:
        size = len(self._opener)
        if data[:size] != self._opener[: len(data)]:
            raise _invalid("it doesn't begin with its boundary")
        self._step = self._boundary_end if len(data) >= size else self._step
        return size if len(data) >= size else None

    def _boundary_end(self, data: bytes, at: int) -> int | None:
        after = data[at : at + 2]
        if len(after) < 2:
            return None
        if after == b"--" and self._parts:
            self._step = self._epilogue
        elif after == b"\r\n":
            self._step = self._headers
            self._parts += 1
        else:
            raise _invalid("a boundary is followed by something else")
        if self._parts > _MAX_PARTS:
            raise _invalid(f"it has more than {_MAX_PARTS} parts")
        return at + 2

    def _headers(self, data: bytes, at: int) -> int | None:
        end = data.find(b"\r\n\r\n", at, at + _MAX_HEADERS)
        if end < 0:
            if len(data) - at >= _MAX_HEADERS:
                raise _invalid("a part has no headers, or too long ones")
            return None
        self._name, self._length, plain = _described(data[at:end])
        if self._opener in data[at:end]:
            raise _invalid("a part's headers are malformed")
        if self._name == b"model" and b"model" in self._names:
            raise duplicate_model()
        if self._name == b"model" and not plain:
            raise _no_text()
        self._names.add(self._name)
        self._value, self._begin = b"", self._base + end + 4
        self._step = self._content
        return end + 4

    def _content(self, data: bytes, at: int) -> int | None:
        """Up to a boundary. One that isn't at the begin of a line would be one to other readers."""
        found = data.find(self._opener, at)
        if found >= 0 and (found - 2 < at or data[found - 2 : found] != b"\r\n"):
            raise _invalid("a boundary isn't at the begin of a line")
        end = found - 2 if found >= 0 else max(at, len(data) - len(self._opener) - 1)
        if len(self._value) <= _MAX_VALUE:
            self._value += data[at : min(end, at + _MAX_VALUE + 1)]
        if found < 0:
            return end if end > at else None
        self._close(self._base + end)
        self._step = self._boundary_end
        return found + len(self._opener)

    def _close(self, end: int) -> None:
        if self._length not in (-1, end - self._begin):
            raise _invalid("a part's length isn't what it says")
        if self._name == b"model":
            if not 0 < len(self._value) <= _MAX_VALUE:
                raise _no_text()
            self._model, self._span = self._value, (self._begin, end)
        elif self._name == b"stream":
            self._stream = self._value.strip().lower() in (b"true", b"1")

    def _epilogue(self, data: bytes, at: int) -> int | None:
        self._after += len(data) - at
        if data[at:].strip() or self._after > _LONGEST_END:
            raise _invalid("something follows its end")
        return len(data) if len(data) > at else None


def _boundary(content_type: bytes) -> bytes:
    """Of a Content-Type. Raises Failure."""
    parameters = _parameters(content_type[len(b"multipart/form-data") :])
    found = parameters.get(b"boundary", b"")
    if not _BOUNDARY.fullmatch(found):
        raise _invalid("its boundary is missing or malformed")
    if parameters.get(b"charset", b"utf-8").lower() not in _UTF8:
        raise _invalid("its charset must be UTF-8")
    return found


def _parameters(raw: bytes) -> dict[bytes, bytes]:
    """`; name=value` by name in lower case. Raises Failure when one is there twice, or is anything else."""
    found: dict[bytes, bytes] = {}
    at = 0
    raw = raw.strip(b" \t")
    while at < len(raw):
        one = _PARAMETER.match(raw, at)
        name = one[1].lower() if one else b""
        if one is None or name in found:
            raise _invalid("a header's parameters are malformed")
        found[name] = one[2] if one[2] is not None else one[3]
        at = one.end()
    return found


def _described(headers: bytes) -> tuple[bytes, int, bool]:
    """A part's name, the length that it tells (-1 = none), and whether its content is a text that all readers
    read alike. Raises Failure."""
    fields: dict[bytes, bytes] = {}
    for line in headers.split(b"\r\n"):
        field = _HEADER.fullmatch(line)
        if field is None or field[1].lower() in fields:
            raise _invalid("a part's headers are malformed")
        fields[field[1].lower()] = field[2].rstrip(b" \t")
    kind, semicolon, rest = fields.get(b"content-disposition", b"").partition(b";")
    parameters = _parameters(semicolon + rest)
    name = parameters.get(b"name", b"")
    if kind.strip().lower() != b"form-data" or b"name*" in parameters or name in _NO_NAMES or b"\\" in name:
        raise _invalid("a part has no plain name")
    length = fields.get(b"content-length", b"0")
    if not _LENGTH.fullmatch(length):
        raise _invalid("a part's headers are malformed")
    _, semicolon, rest = fields.get(b"content-type", b"").partition(b";")
    plain = (
        b"filename" not in parameters
        and b"filename*" not in parameters
        and b"content-encoding" not in fields
        and fields.get(b"content-transfer-encoding", b"binary").lower() in _AS_IT_IS
        and _parameters(semicolon + rest).get(b"charset", b"utf-8").lower() in _UTF8
    )
    return name, int(length) if b"content-length" in fields else -1, plain


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _no_text() from None


def _no_text() -> Failure:
    words = f"`model` must be a text of 1 to {_MAX_VALUE} bytes of UTF-8, not a file."
    return Failure("missing_model", words, param="model")


def _invalid(why: str) -> Failure:
    return Failure("invalid_multipart", f"The multipart body is malformed: {why}.")
