"""Whether a stream of events has ended where the streams of its route end, by its last bytes. Pure.

A model server that fails in mid-stream may still end its answer as HTTP would have it, and without a length
or chunks every cut looks like an end. An end that only looks complete is worse than an error.
"""

from __future__ import annotations

import re

_DONE = re.compile(rb"data: ?\[DONE\]\s*\Z")
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"|"error"\s*:\s*\{')
"""Some servers send no end mark, but say why they stopped."""
_TEXT = (_DONE, _FINISHED)
_LAST_EVENTS = {
    b"/v1/chat/completions": _TEXT,
    b"/v1/completions": _TEXT,
    b"/v1/audio/transcriptions": (re.compile(_DONE.pattern + rb"|transcript\.text\.done"), _FINISHED),
    b"/v1/audio/translations": (re.compile(_DONE.pattern + rb"|transcript\.text\.done"), _FINISHED),
    b"/v1/audio/speech": (re.compile(_DONE.pattern + rb"|speech\.audio\.done"), _FINISHED),
    # The last event holds the whole response and may be long; but only that one tells the usage.
    b"/v1/responses": (
        re.compile(rb'"?response\.(completed|failed|incomplete)|event: error|"usage"\s*:\s*\{'),
        None,
    ),
    b"/v1/messages": (re.compile(rb"message_stop|event: error"), None),
}
"""By route: what the last events are known by, and what will do where HTTP says that all has come."""


def marked(end: bytes) -> bool:
    """Whether these last bytes of a stream hold the end mark of chat and completions."""
    return _DONE.search(end[-64:]) is not None


def complete(path: bytes, end: bytes, framed: bool) -> bool:
    """Whether a stream that ended with these bytes (8 KiB will do) is a whole one of its route. For routes
    that have no such events, what HTTP says holds. `framed`: it is whole by its chunks."""
    last, enough = _LAST_EVENTS.get(path, (None, None))
    if last is None or last.search(end) is not None:
        return True
    return framed and enough is not None and enough.search(end) is not None
