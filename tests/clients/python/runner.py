"""What every Python client's program has in common: orders come in, line by line, and facts go out.

It runs in the client's own environment, so it needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Facts = dict[str, Any]


def serve(routes: Mapping[str, Callable[..., Facts]]) -> None:
    """Answers `{"number": n, "do": route, "with": {...}}` with the facts of that route, until no more come.

    The route `routes` tells which there are. What a client raises is a fact too. Clients print; so facts have
    a descriptor of their own.
    """
    known = {**routes, "routes": lambda **_: {"routes": sorted(routes)}}
    facts = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        begin = time.monotonic()
        try:
            found = known[order["do"]](**order["with"])
        except Exception as error:
            found = raised(error)
        found |= {"number": order["number"], "seconds": time.monotonic() - begin}
        facts.write(json.dumps(found) + "\n")
        facts.flush()


def raised(error: Exception) -> Facts:
    """What a caller can tell of an error."""
    body = getattr(error, "body", None)
    return {
        "raised": type(error).__name__,
        "kinds": [kind.__name__ for kind in type(error).__mro__],
        "status": getattr(error, "status_code", None),
        "code": getattr(error, "code", None),
        "request_id": getattr(error, "request_id", None),
        "body": body if isinstance(body, dict) else None,
        "message": str(error)[:1000],
    }


def digest(data: bytes) -> str:
    """A long answer in short."""
    return hashlib.sha256(data).hexdigest()
