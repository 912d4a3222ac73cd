"""Which model gave a response: ids seen in answers of /v1/responses, so that a request for one finds its
model. Pure, and bounded: the longest unused go.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Hashable

_MOST = 8 * 2**20
"""Bytes of all entries, about."""
_COST = 400
"""Bytes of an entry beside its texts."""
_HEAD = 16 * 1024
"""Bytes of an answer in which its id is looked for."""
_ID = re.compile(
    rb'(?:\A\s*+\{|"response"\s*+:\s*+\{)(?:[^"{}[\]]|"(?:[^"\\]|\\.)*+")*?"id"\s*+:\s*+'
    rb'"([A-Za-z0-9_-]{1,256})"'
)
"""The id of the answer itself, or of the `response` in an event, before anything nested."""


class Responses:
    """Models by owner and id of the response. An owner finds only what was answered to it."""

    def __init__(self, most: int = _MOST) -> None:
        """`most`: bytes of all entries, about."""
        self._most = most
        self._models: OrderedDict[tuple[Hashable, bytes], str] = OrderedDict()
        self.size = 0
        """Bytes of all entries, about."""

    def __len__(self) -> int:
        return len(self._models)

    def find(self, owner: Hashable, identity: bytes) -> str:
        """The model's name; empty = it isn't known."""
        key = (owner, identity)
        model = self._models.get(key, "")
        if model:
            self._models.move_to_end(key)
        return model

    def learn(self, owner: Hashable, identity: bytes, model: str) -> None:
        """A response with this id was given to `owner`."""
        key = (owner, identity)
        before = self._models.pop(key, None)
        if before is not None:
            self.size -= _cost(key, before)
        self._models[key] = model
        self.size += _cost(key, model)
        while self.size > self._most:
            self.size -= _cost(*self._models.popitem(last=False))


class Watch:
    """Looks for the id at the begin of one answer."""

    def __init__(self, found: Callable[[bytes], None]) -> None:
        """`found(id)` is called once, or never."""
        self._found: Callable[[bytes], None] | None = found
        self._head = b""

    def feed(self, chunk: bytes) -> None:
        """The next bytes. Costs nothing once it is found, or isn't there."""
        if self._found is None:
            return
        self._head += chunk
        match = _ID.search(self._head[:_HEAD])
        if match is not None:
            self._found(match[1])
        if match is not None or len(self._head) >= _HEAD:
            self._found, self._head = None, b""


def _cost(key: tuple[Hashable, bytes], model: str) -> int:
    return _COST + len(key[1]) + len(model) + len(str(key[0]))
