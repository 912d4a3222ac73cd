"""Whether a stream of events has ended where the streams of its route end, by its last bytes. Pure.

A model server that fails in mid-stream may still end its answer as HTTP would have it, and without a length
or chunks every cut looks like an end. An end that only looks complete is worse than an error.
"""

from __future__ import annotations

import re

_MARK = rb"data: ?\[DONE\]\s*\Z"
_DONE = re.compile(_MARK)
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"|"error"\s*:\s*\{')
"""Some servers send no end mark, but say why they stopped. (A quote within a text has a stroke before it.)"""
_RESPONSES = b"/v1/responses"
"""Also that of a response asked for again, by its id."""
_TEXT = (_DONE, _FINISHED)
_HEARD = (re.compile(_MARK + rb'|"type"\s*:\s*"transcript\.text\.done"'), _FINISHED)
_LAST_EVENTS = {
    b"/v1/chat/completions": _TEXT,
    b"/v1/completions": _TEXT,
    b"/v1/audio/transcriptions": _HEARD,
    b"/v1/audio/translations": _HEARD,
    b"/v1/audio/speech": (re.compile(_MARK + rb'|"type"\s*:\s*"speech\.audio\.done"'), _FINISHED),
    # The last event holds the whole response and may be long; but only that one tells the usage.
    _RESPONSES: (
        re.compile(rb'"type"\s*:\s*"(response\.(completed|failed|incomplete)|error)"|"usage"\s*:\s*\{'),
        None,
    ),
    b"/v1/messages": (re.compile(rb'"type"\s*:\s*"(message_stop|error)"'), None),
}
"""By route: what the last events are known by, and what will do where HTTP says that all has come."""


def marked(end: bytes) -> bool:
    """Whether these last bytes of a stream hold the end mark of chat and completions."""
    return _DONE.search(end[-64:]) is not None


def complete(path: bytes, end: bytes, framed: bool) -> bool:
    """Whether a stream that ended with these bytes (8 KiB will do) is a whole one of its route. For routes
    that have no such events, what HTTP says holds. `framed`: it is whole by its chunks."""
    route = _RESPONSES if path.startswith(_RESPONSES) else path
    last, enough = _LAST_EVENTS.get(route, (None, None))
    if last is None or last.search(end) is not None:
        return True
    return framed and enough is not None and enough.search(end) is not None
