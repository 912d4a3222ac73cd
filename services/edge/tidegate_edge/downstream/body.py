"""Bodies as they come off the wire: by length, or in chunks (RFC 9112, 7.1). Pure."""

from __future__ import annotations

import re

from tidegate_edge.downstream.grammar import FIELD, TOKEN, malformed

_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+"'
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:;" + TOKEN + rb"(?:=(?:" + TOKEN + rb"|" + _QUOTED + rb"))?)*+")
"""A chunk's size and extensions; without the blanks around `;` and `=` that nobody sends."""
_LONGEST_LINE = 1024
"""Bytes of a line with a chunk's size and its extensions."""
_TRAILER = re.compile(rb"(?!(?i:content-length|transfer-encoding):)" + FIELD)
_LONGEST_TRAILERS = 8192
_MOST_EXCESS = 16384
"""Bytes of lines beyond 16 and twice the data, for each chunk: the body's limit counts no extensions."""


class Sized:
    """A body of a known length."""

    __slots__ = ("left",)

    def __init__(self, length: int) -> None:
        self.left = length
        """Bytes that have not come yet."""

    @property
    def complete(self) -> bool:
        """All of it has come."""
        return not self.left

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Takes what came; gives what belongs to the body, and what is behind it."""
        left = self.left
        if len(data) <= left:
            self.left = left - len(data)
            return data, b""
        self.left = 0
        return data[:left], data[left:]


class Chunks:
    """A body in chunks. Trailers are checked and dropped, extensions too."""

    __slots__ = ("_excess", "_in_chunk", "_rest", "_trailers", "complete")

    left = None
    """How much is still to come isn't known."""

    def __init__(self) -> None:
        self.complete = False
        """All of it has come."""
        self._rest = b""
        self._in_chunk = 0
        """Bytes of the present chunk that have not come yet, its line end included; 0 = a line is next."""
        self._excess = 0
        self._trailers = -1
        """Bytes of trailers seen; -1 = the last chunk hasn't come."""

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Takes what came; gives what belongs to the body, and what is behind it. Raises Failure (400)."""
        data = self._rest + data if self._rest else data
        pieces: list[bytes] = []
        at = 0
        while not self.complete:
            taken = self._chunk(data, at, pieces) if self._in_chunk else self._line(data, at)
            if not taken:
                break
            at += taken
        rest, self._rest = data[at:], b""
        if not self.complete:
            self._rest, rest = rest, b""
        return b"".join(pieces), rest

    def _chunk(self, data: bytes, at: int, pieces: list[bytes]) -> int:
        """Takes what there is of a chunk's bytes; its line end only as a whole."""
        here = min(len(data) - at, self._in_chunk - 2)
        if here > 0:
            pieces.append(data[at : at + here])
            self._in_chunk -= here
            return here
        end = data[at : at + 2]
        if not b"\r\n".startswith(end):
            raise malformed("a chunk is longer than it said")
        if len(end) < 2:
            return 0
        self._in_chunk = 0
        return 2

    def _line(self, data: bytes, at: int) -> int:
        """Takes a line with a size, or one of the trailers."""
        end = data.find(b"\r\n", at)
        if end < 0:
            if len(data) - at > _LONGEST_LINE or b"\n" in data[at:]:
                raise malformed("a chunk's size is malformed")
            return 0
        line = data[at:end]
        if self._trailers >= 0:
            self._trailer(line)
        else:
            size = _SIZE.fullmatch(line) if len(line) <= _LONGEST_LINE else None
            if size is None:
                raise malformed("a chunk's size is malformed")
            length = int(size[1], 16)
            self._excess = max(0, self._excess + len(line) - 16 - 2 * length)
            if self._excess > _MOST_EXCESS:
                raise malformed("its chunks are mostly extensions")
            if length:
                self._in_chunk = length + 2
            else:
                self._trailers = 0
        return end + 2 - at

    def _trailer(self, line: bytes) -> None:
        self._trailers += len(line)
        if not line:
            self.complete = True
        elif self._trailers > _LONGEST_TRAILERS or _TRAILER.fullmatch(line) is None:
            raise malformed("a trailer is malformed, or there are too many")
