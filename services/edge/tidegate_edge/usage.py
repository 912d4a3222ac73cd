"""Tokens of a response, read from its last bytes. Pure."""

from __future__ import annotations

import re
from collections import deque

_KEPT = 8192
"""Bytes of the end of a response in which `usage` is looked for."""
_NAME = b'"usage"'
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d{1,9})')
_COMPLETION = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,9})')


class Tail:
    """The end of a response, and how many events it had."""

    __slots__ = ("_chunks", "_kept", "events", "size")

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._kept = 0
        self.events = 0
        """Ends of events, about (one that is split between two chunks may be missed)."""
        self.size = 0
        """Bytes in all."""

    def feed(self, chunk: bytes) -> None:
        """Takes the next bytes."""
        size = len(chunk)
        self.size += size
        self.events += chunk.count(b"\n\n")
        chunks = self._chunks
        chunks.append(chunk)
        self._kept += size
        while self._kept - len(chunks[0]) >= _KEPT:
            self._kept -= len(chunks.popleft())

    def marked(self) -> bool:
        """Whether the last event is the end mark of a chat or completions stream."""
        return b"".join(self._chunks)[-64:].rstrip().endswith(b"data: [DONE]")

    def tokens(self, stream: bool) -> tuple[int, int, bool]:
        """Prompt tokens, completion tokens, and whether they are an estimate: without a `usage` the events
        of a stream are counted."""
        end = b"".join(self._chunks)[-_KEPT:]
        at = end.rfind(_NAME)  # a regular expression over all of it costs several times as much
        while at >= 0 and _USAGE.match(end, at) is None:
            at = end.rfind(_NAME, 0, at)
        if at >= 0:
            prompt, completion = _PROMPT.search(end, at), _COMPLETION.search(end, at)
            return int(prompt[1]) if prompt else 0, int(completion[1]) if completion else 0, False
        return (0, max(0, self.events - 1), True) if stream and self.events > 1 else (0, 0, False)
