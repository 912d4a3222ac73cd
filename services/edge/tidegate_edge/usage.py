"""Tokens of a response, read from its last bytes. Pure."""

from __future__ import annotations

import re
from collections import deque
from typing import NamedTuple

from tidegate_edge.ends import marked

_KEPT = 8192
"""Bytes of the end of a response in which `usage` is looked for."""
_BEGIN = 2048
"""Bytes of the beginning of a stream in which the events are looked for that bring a role and no text."""
_ROLE = re.compile(rb'"role"\s*:\s*"assistant"\s*,\s*"content"\s*:\s*(?:""|null)')
_NAME = b'"usage"'
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d{1,9})')
_COMPLETION = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,9})')
_NO_ANSWER = frozenset(
    (
        b"/v1/embeddings", b"/rerank", b"/v1/rerank", b"/v2/rerank", b"/score", b"/v1/score", b"/pooling",
        b"/classify", b"/v2/embed",
    )
)  # fmt: skip
"""Routes that generate nothing: what they cost is their prompt."""
_PAID = b"/v1/responses/{id}"
"""Routes that begin so tell again what was paid before."""
_FREE = frozenset((b"/tokenize", b"/detokenize", b"/v1/messages/count_tokens"))
"""Routes that cost no tokens at all."""


class Tokens(NamedTuple):
    """Tokens of a request and its response."""

    prompt: int = 0
    completion: int = 0
    estimated: bool = False
    """The response didn't tell: events were counted, or the prompt goes by the size of the request."""
    none: bool = False
    """It is known that there were none; else two zeros mean that nothing is known."""


UNKNOWN = Tokens()
NONE = Tokens(none=True)


def paid(path: bytes) -> bool:
    """Whether the tokens that a route's answer tells have been counted before."""
    return path.startswith(_PAID)


def free(path: bytes) -> bool:
    """Whether a route costs no tokens."""
    return path in _FREE


def estimate(path: bytes, prompt: int, max_tokens: int) -> int:
    """Tokens that a request may cost at most, about; 0 = nobody knows. `prompt`: those of its prompt,
    `max_tokens`: the caller's limit on the answer (0 = none)."""
    return prompt + max_tokens if max_tokens or path in _NO_ANSWER or path in _FREE else 0


class Tail:
    """The end of a response, and how many events it had."""

    __slots__ = ("_begin", "_chunks", "_kept", "events", "size")

    def __init__(self) -> None:
        self._begin = b""
        self._chunks: deque[bytes] = deque()
        self._kept = 0
        self.events = 0
        """Ends of events, about (one that is split between two chunks may be missed); no comments, which come
        alone."""
        self.size = 0
        """Bytes in all."""

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes."""
        size = len(chunk)
        if self.size < _BEGIN:
            self._begin += chunk[:_BEGIN]
        self.size += size
        if not chunk.startswith(b":"):
            self.events += chunk.count(b"\n\n") or chunk.count(b"\n\r\n")
        chunks = self._chunks
        chunks.append(chunk)
        self._kept += size
        while self._kept - len(chunks[0]) >= _KEPT:
            self._kept -= len(chunks.popleft())

    def end(self) -> bytes:
        """The last bytes, at most 8 KiB."""
        return b"".join(self._chunks)[-_KEPT:]

    def tokens(self, stream: bool, prompt: int) -> Tokens:
        """Tokens of the response as far as it has come; `prompt` is an estimate of the prompt's.

        1. By the last `usage`.
           One that lacks the prompt's number is completed by the estimate.
        2. A stream's that stands before the text (as in /v1/messages) told the prompt alone: the events after
           it are counted.
        3. A stream without one: its events are counted, but for its end mark and those that only say whose
           turn it is (of each choice the first one, in chat).
        """
        end = self.end()
        at = end.rfind(_NAME)  # a regular expression over all of it costs several times as much
        while at >= 0 and _USAGE.match(end, at) is None:
            at = end.rfind(_NAME, 0, at)
        if at >= 0:
            asked, answered = _number(_PROMPT, end, at), _number(_COMPLETION, end, at)
            later = end.count(b"\n\n", at) - 2 if stream else 0  # its own end, and that of an end mark
            if later > answered:  # 2
                return Tokens(asked or prompt, later, True)
            if answered and not asked:
                return Tokens(prompt, answered, True)
            return Tokens(asked, answered)  # 1
        if not stream or not self.events:
            return UNKNOWN
        empty = marked(end) + len(_ROLE.findall(self._begin))
        return Tokens(prompt, max(0, self.events - empty), True)  # 3


def _number(wanted: re.Pattern[bytes], text: bytes, at: int) -> int:
    found = wanted.search(text, at)
    return int(found[1]) if found else 0
