"""What browsers are told about pages of other origins (the Fetch standard's CORS protocol). Pure.

It is between a browser and the edge alone: what model servers say about it is dropped, and they aren't told
the origin. Credentials of the browser (cookies) are never asked for, so `*` is as good as a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import ip_address

from tidegate_edge.head import Headers

ANY = "*"
_EXPOSED = b", ".join(
    (
        b"retry-after", b"x-max-concurrent", b"x-max-queue-size", b"x-queue-depth",
        b"x-ratelimit-limit-requests", b"x-ratelimit-limit-tokens", b"x-ratelimit-remaining-requests",
        b"x-ratelimit-remaining-tokens", b"x-ratelimit-reset-requests", b"x-ratelimit-reset-tokens",
        b"x-request-id", b"x-should-retry", b"x-tidegate-instance", b"x-tidegate-queue-ms",
    )
)  # fmt: skip
_NAMES = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:\s*,\s*[!#$%&'*+.^_`|~0-9A-Za-z-]+)*")
_LONGEST = 4096
"""Bytes of a list of field names that are repeated."""
_MAX_AGE = b"600"
"""Seconds that a browser may keep the answer of a preflight."""


class Cors:
    """The origins of `edge.cors_origins`."""

    def __init__(self, origins: Sequence[str]) -> None:
        self._every = ANY in origins
        self._vary: Headers = [(b"vary", b"origin")] if origins and not self._every else []
        self._allowed = {origin.encode(): self._told(origin) for origin in origins}

    def _told(self, origin: str) -> Headers:
        allowed = (b"access-control-allow-origin", origin.encode())
        return [allowed, (b"access-control-expose-headers", _EXPOSED), *self._vary]

    def fields(self, origin: bytes) -> Headers:
        """What goes with every answer; `origin` is the request's field, empty = it had none."""
        if self._every:
            return self._allowed[b"*"]
        return self._allowed.get(origin, self._vary)

    def preflight(self, origin: bytes, method: bytes, names: bytes, methods: Iterable[str]) -> Headers:
        """The fields of an answer to OPTIONS, beside `fields`; `method` and `names` are what the browser asks
        for. Every field may be sent: what a page sends proves nothing but the key in it."""
        allow = ", ".join(sorted(methods)).encode()
        told = [(b"allow", allow)]
        if not method or not self.allows(origin):
            return told
        told += [(b"access-control-allow-methods", allow), (b"access-control-max-age", _MAX_AGE)]
        if len(names) <= _LONGEST and _NAMES.fullmatch(names):
            told.append((b"access-control-allow-headers", names))
        return told

    def allows(self, origin: bytes) -> bool:
        """Whether pages of an origin may call."""
        return bool(origin) and (self._every or origin in self._allowed)


def is_own(origin: bytes, host: bytes) -> bool:
    """Whether an origin is the edge's own, by the request's Host, beyond doubt: a name may be made to resolve
    to any address (DNS rebinding), an address and `localhost` may not."""
    authority = origin.partition(b"://")[2]
    if not authority or authority.lower() != host.lower():
        return False
    text = authority.decode("latin-1")
    name = re.sub(r":[0-9]*$", "", text).strip("[]").lower()
    try:
        return name == "localhost" or bool(ip_address(name))
    except ValueError:
        return False
