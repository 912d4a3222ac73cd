"""The key/values at the head of a GGUF file (ggml/docs/gguf.md), as far as its memory depends on them. Pure.

A reader of its own: llama.cpp's `gguf` maps the whole file, wants numpy, and builds the vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from tidegate_lifecycle.estimate.shape import UnknownError

_FORMATS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_KEYS = 4096
_TEXT = 1 << 20
"""The longest text that is kept, in bytes; longer ones (chat templates) are passed over."""
_ITEMS = 4096
"""The longest list that is kept: one number for each layer. Longer ones (vocabularies) are passed over."""
_HEADER = 256 << 20

Values = dict[str, Any]


class TruncatedError(UnknownError):
    """The bytes end before the header does."""


def read_header(read: Callable[[int], bytes]) -> Values:
    """The key/values, read by `read(n)`, which gives up to n bytes as a file does.

    Ends early where the vocabulary begins and all about the layers is known: it comes first in every file
    that llama.cpp's tools write. UnknownError when this is no GGUF of version 2 or 3, or a damaged one.
    """
    source = _Source(read)
    if source.take(4) != b"GGUF":
        raise UnknownError("it is no GGUF file")
    version = source.number(4)
    if version not in (2, 3):
        raise UnknownError(f"GGUF version {version} isn't known")
    source.number(10)  # tensors
    count = source.number(10)
    if count > _KEYS:
        raise UnknownError(f"the header of the GGUF file is damaged: {count} keys")
    values: Values = {}
    for _ in range(count):
        key = source.text()
        if key.startswith("tokenizer.") and f"{values.get('general.architecture')}.block_count" in values:
            break
        value = source.value(source.number(4))
        if value is not None:
            values[key] = value
    return values


class _Source:
    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self._taken = read, 0

    def take(self, size: int) -> bytes:
        self._taken += size
        if self._taken > _HEADER:
            raise UnknownError("the header of the GGUF file is damaged: it has no end")
        found = self._read(size)
        if len(found) < size:
            raise TruncatedError("the GGUF file ends within its header")
        return found

    def skip(self, size: int) -> None:
        if self._taken + size > _HEADER:
            raise UnknownError("the header of the GGUF file is damaged: it has no end")
        while size > 0:
            self.take(min(size, 1 << 20))
            size -= 1 << 20

    def number(self, kind: int) -> Any:
        form = _FORMATS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        size = self.number(10)
        if size > _TEXT:
            self.skip(size)
            return ""
        return self.take(size).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A number, a text, or a list of numbers; None = passed over."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _FORMATS:
            raise UnknownError(f"the header of the GGUF file is damaged: type {kind}")
        return self.number(kind)

    def _array(self) -> list[Any] | None:
        kind, count = self.number(4), self.number(10)
        if kind == _STRING:
            for _ in range(count):
                self.skip(self.number(10))
            return None
        if kind not in _FORMATS:
            raise UnknownError("the header of the GGUF file is damaged: a list of lists")
        if count > _ITEMS:
            self.skip(count * struct.calcsize(_FORMATS[kind]))
            return None
        return [self.number(kind) for _ in range(count)]
