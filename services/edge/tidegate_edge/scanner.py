"""Reads a large JSON body as it comes: strictly, and without building what it says. Pure.

What a tree costs is many times the body, and all of it at once: 10 MiB would stop every stream for 40 ms.
Here the bytes of each piece are matched once, by regular expressions that are JSON's grammar down to a depth
of three; what is deeper is walked token by token. Only the outermost keys and a few of their values are kept.
"""

from __future__ import annotations

import codecs
import re
from enum import Enum

import orjson

from tidegate_edge.envelope import Failure

MAX_DEPTH = 128
"""Nesting of a JSON body."""
MAX_CONTAINERS = 100_000
"""Objects and arrays of a JSON body: what it may cost a model server stays in proportion."""
MAX_KEYS = 1024
"""Outermost keys of a JSON body."""
MAX_NAME = 1024
"""Characters of an outermost key, and of `model`."""
LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""Outermost keys that limit the answer; the first one that says something counts."""

_HINTS = frozenset(("stream", *LIMITS))
_LONGEST = 6 * MAX_NAME + 2
"""Bytes of a name as it is written, each character escaped; and of a number."""
_HEX = rb"[0-9a-fA-F]"
_UNICODE = rb"u(?:[0-9a-cefA-CEF]%b{3}|[dD][0-7]%b{2}|[dD][89abAB]%b{2}\\u[dD][c-fC-F]%b{2})" % (
    (_HEX,) * 4
)  # a lone half of a surrogate pair is no text
_INSIDE = rb'[^"\\\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|%b)[^"\\\x00-\x1f]*+)*+' % _UNICODE
_TEXT = b'"' + _INSIDE + b'"'
_NUMBER = rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+"
_ATOM = rb"true|false|null|" + _NUMBER
_FLAT = _TEXT + b"|" + _ATOM
_GAP = rb"[ \t\n\r]*+"


def _pair(value: bytes) -> bytes:
    return _TEXT + _GAP + b":" + _GAP + value


def _deeper(value: bytes) -> bytes:
    """A value, or an array or object of them. A comma must be followed by more."""
    items = rb"\[%b(?:(?:%b)%b(?:,%b(?!\])|(?=\])))*+\]" % (_GAP, value, _GAP, _GAP)
    pairs = rb"\{%b(?:%b%b(?:,%b(?!\})|(?=\})))*+\}" % (_GAP, _pair(b"(?:%b)" % value), _GAP, _GAP)
    return b"|".join((_FLAT, items, pairs))


def _several(one: bytes, closer: bytes) -> re.Pattern[bytes]:
    """As many as there are, each with a comma behind it, or the end."""
    return re.compile(rb"(?:%b%b%b(?:,|(?=%b)))++" % (_GAP, one, _GAP, closer))


_DEEP = 3
"""Nesting of what is matched at once."""
_VALUE = b"(?:%b)" % _deeper(_deeper(_deeper(_FLAT)))
_ITEMS = _several(_VALUE, rb"\]")
_PAIRS = _several(_pair(_VALUE), rb"\}")
_REST = re.compile(_INSIDE)
_WORD = re.compile(_TEXT)
_PLAIN = re.compile(_ATOM)
_TOKEN = re.compile(_GAP + rb'([-+.0-9A-Za-z]++|[][{}:,"])')
_CONTROLS = bytes(range(32))
_BLANK = re.compile(_GAP)
_OPENERS = re.compile(_TEXT + rb"|([\[{])")


class _Want(Enum):
    """What may come next."""

    OBJECT = "the body's object"
    KEY_OR_END = "a key or }"
    KEY = "a key"
    COLON = "a colon"
    VALUE = "a value"
    VALUE_OR_END = "a value or ]"
    MORE = "a comma or an end"
    NOTHING = "nothing"


class Scanner:
    """One body. `feed` it, then `finish`; both raise Failure (400)."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        """Outermost keys."""
        self.values: dict[str, object] = {}
        """`model`, where it is no container, and the hints that are a short number, true, false or null."""
        self.span = (0, 0)
        """Where the value of `model` stands."""
        self.opening = 0
        """Behind the first brace."""
        self._want = _Want.OBJECT
        self._open = bytearray()
        self._containers = 0
        self._key = ""
        self._inside = False
        """In a text that began in an earlier piece, and of which nothing is kept."""
        self._held = b""
        self._base = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def feed(self, piece: bytes) -> None:
        """The next bytes."""
        self._decoded(piece)
        data = self._held + piece if self._held else piece
        at = self._scan(data)
        self._held = data[at:]
        self._base += at

    def finish(self) -> None:
        """There are no more."""
        self._decoded(b"", final=True)
        if self._want is not _Want.NOTHING or self._held:
            raise _invalid("it ends too early", self._base + len(self._held))

    def _decoded(self, piece: bytes, final: bool = False) -> None:
        try:
            self._utf8.decode(piece, final)
        except UnicodeDecodeError:
            raise Failure("invalid_json", "The body is not valid JSON: it isn't UTF-8.") from None

    def _scan(self, data: bytes) -> int:
        """Takes what is whole; where the rest begins."""
        at = 0
        while True:
            if self._inside:
                at = _text_end(data, at)
                if data[at : at + 1] != b'"':
                    return self._cut(data, at)
                at += 1
                self._inside = False
                self._want = _Want.MORE
            at = self._run(data, at)
            token = _TOKEN.match(data, at)
            if token is None:
                end = _BLANK.match(data, at).end()  # type: ignore[union-attr]
                if end < len(data):
                    raise _invalid(f"{self._want.value} expected", self._base + end)
                return end
            begin, end = token.span(1)
            if data[begin] == 0x22:
                word = _WORD.match(data, begin)
                if word is None:
                    return self._cut_text(data, begin)
                end = word.end()
            elif end == len(data) and data[begin] not in b"[]{}:," and end - begin < _LONGEST:
                return begin  # a number may go on
            self._take(data[begin:end], self._base + begin)
            at = end

    def _run(self, data: bytes, at: int) -> int:
        """As many items or pairs as there are at once. Outermost ones are looked at one by one."""
        if not 1 < len(self._open) <= MAX_DEPTH - _DEEP:
            return at
        if self._want in (_Want.KEY, _Want.KEY_OR_END):
            run, then = _PAIRS.match(data, at), _Want.KEY
        elif self._open[-1] == 0x5B and self._want in (_Want.VALUE, _Want.VALUE_OR_END):
            run, then = _ITEMS.match(data, at), _Want.VALUE
        else:
            return at
        if run is None:
            return at
        self._want = then if data[run.end() - 1] == 0x2C else _Want.MORE
        self._count(run.group())
        return run.end()

    def _count(self, run: bytes) -> None:
        """The containers in it; braces in texts are none."""
        found = run.count(b"[") + run.count(b"{")
        if found and b'"' in run:
            found = sum(map(len, _OPENERS.findall(run)))
        self._contains(found)

    def _contains(self, more: int) -> None:
        self._containers += more
        if self._containers > MAX_CONTAINERS:
            raise too_many()

    def _take(self, token: bytes, at: int) -> None:
        """One token: the grammar of JSON."""
        want, first = self._want, token[0]
        if want is _Want.MORE and first in b",]}":
            if first == 0x2C:
                self._want = _Want.KEY if self._open[-1] == 0x7B else _Want.VALUE
                return
            self._close(first, at)
        elif want in (_Want.VALUE, _Want.VALUE_OR_END):
            if first == 0x5D and want is _Want.VALUE_OR_END:
                self._close(first, at)
            else:
                self._value(token, at)
        elif want in (_Want.KEY, _Want.KEY_OR_END):
            if first == 0x7D and want is _Want.KEY_OR_END:
                self._close(first, at)
            else:
                self._named(token, at)
        elif want is _Want.COLON and first == 0x3A:
            self._want = _Want.VALUE
        elif want is _Want.OBJECT and first == 0x7B:
            self.opening = at + 1
            self._value(token, at)
        else:
            raise _invalid(f"{want.value} expected", at)

    def _value(self, token: bytes, at: int) -> None:
        first = token[0]
        if first in b"[{":
            self._open.append(first)
            self._contains(1)
            if len(self._open) > MAX_DEPTH:
                raise too_deep()
            self._want = _Want.VALUE_OR_END if first == 0x5B else _Want.KEY_OR_END
        elif first == 0x22 or _PLAIN.fullmatch(token):
            self._want = _Want.MORE
            if len(self._open) == 1:
                self._said(token, at)
        else:
            raise _invalid("a value expected", at)

    def _said(self, token: bytes, at: int) -> None:
        """The value of an outermost key, which is no container."""
        if self._key == "model":
            self.span = at, at + len(token)
            self.values["model"] = orjson.loads(token) if token[0] == 0x22 else None
        elif self._key in _HINTS and token[0] != 0x22 and len(token) < 16:
            self.values[self._key] = orjson.loads(token)

    def _named(self, token: bytes, at: int) -> None:
        if token[0] != 0x22:
            raise _invalid("a key expected", at)
        self._want = _Want.COLON
        if len(self._open) > 1:
            return
        key = self._key = orjson.loads(token)
        if key == "model" and key in self.keys:
            raise duplicate_model()
        self.values.pop(key, None)  # said before: the last one counts
        self.keys.add(key)
        check_names(len(self.keys), len(key))

    def _close(self, closer: int, at: int) -> None:
        if self._open.pop() != closer - 2:
            raise _invalid("another end expected", at)
        self._want = _Want.MORE if self._open else _Want.NOTHING

    def _cut_text(self, data: bytes, begin: int) -> int:
        """A text that isn't whole yet. What is read of it must come whole, of others nothing is kept."""
        name = self._want in (_Want.KEY, _Want.KEY_OR_END)
        if self._want not in (_Want.VALUE, _Want.VALUE_OR_END) and not name:
            raise _invalid(f"{self._want.value} expected", self._base + begin)
        if name or (len(self._open) == 1 and self._key == "model"):
            self._cut(data, _text_end(data, begin + 1))
            if len(data) - begin > _LONGEST:
                raise long_name()
            return begin
        self._inside = True
        return self._cut(data, _text_end(data, begin + 1))

    def _cut(self, data: bytes, at: int) -> int:
        """Where a text's valid part ends, if that is for want of more bytes."""
        if at < len(data) and not (data[at] == 0x5C and len(data) - at < 12):
            raise _invalid("a text has a bad escape or a control character", self._base + at)
        return at


def _text_end(data: bytes, at: int) -> int:
    """Where the valid inside of a text ends: at its quote, if all is well. One without escapes, such as an
    image, goes the quick way."""
    quote = data.find(b'"', at)
    plain = data[at : quote if quote >= 0 else len(data)]
    if b"\\" not in plain and len(plain.translate(None, _CONTROLS)) == len(plain):
        return at + len(plain)
    return _REST.match(data, at).end()  # type: ignore[union-attr]  # it matches nothing, too


def check_names(count: int, longest: int) -> None:
    """Outermost keys are few and short. Raises Failure."""
    if count > MAX_KEYS:
        raise Failure("too_complex", f"The body has more than {MAX_KEYS} keys.")
    if longest > MAX_NAME:
        raise long_name()


def long_name() -> Failure:
    """A key or value that no reader has use for."""
    return Failure("too_complex", f"A key of the body, or `model`, has more than {MAX_NAME} characters.")


def duplicate_model() -> Failure:
    """The model server might read the other one."""
    return Failure("duplicate_model", "`model` is given more than once.", param="model")


def too_deep() -> Failure:
    """Nesting."""
    return Failure("too_complex", f"The body is nested deeper than {MAX_DEPTH} levels.")


def too_many() -> Failure:
    """Containers."""
    return Failure("too_complex", f"The body holds more than {MAX_CONTAINERS} objects and arrays.")


def _invalid(why: str, at: int) -> Failure:
    return Failure("invalid_json", f"The body is not valid JSON: {why}, at byte {at}.")
