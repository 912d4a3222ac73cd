"""Lines that every answer has."""

from __future__ import annotations

import time
from email.utils import formatdate
from http import HTTPStatus

_STATUS_LINES = {one.value: b"HTTP/1.1 %d %b" % (one.value, one.phrase.encode()) for one in HTTPStatus}


class _Date:
    second = 0
    text = b""


def status_line(status: int) -> bytes:
    """The first line, without its end."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d " % status


def http_date() -> bytes:
    """The present time, as `Date` has it; made once a second."""
    now = int(time.time())
    if now != _Date.second:
        _Date.second, _Date.text = now, formatdate(now, usegmt=True).encode()
    return _Date.text
