"""Every error that the edge itself answers with, in one table: status, words, and whether to retry."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import orjson

from tidegate_edge.ticket import Rates

_LONGEST = 500
"""Characters of a message; an error must not echo a caller's megabytes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One row of the table."""

    status: int
    type: str
    retry: float = 0.0
    """Seconds for Retry-After when nobody knows better; 0 = none is sent unless the failure brings one."""
    close: bool = False
    """The connection is closed: what is left of the request on it can't be told from the next one."""
    final: bool = False
    """No retry can help, though clients' libraries try again after such a status."""


_INVALID = "invalid_request_error"
_BUSY = "service_unavailable_error"
_SLOW = "timeout_error"

KINDS: dict[str, Kind] = {
    "bad_request": Kind(400, _INVALID, close=True),
    "invalid_json": Kind(400, _INVALID),
    "invalid_multipart": Kind(400, _INVALID),
    "invalid_header": Kind(400, _INVALID),
    "missing_model": Kind(400, _INVALID),
    "duplicate_model": Kind(400, _INVALID),
    "too_complex": Kind(400, _INVALID),
    "unsupported_encoding": Kind(400, _INVALID),
    "invalid_request": Kind(400, _INVALID),
    "invalid_api_key": Kind(401, _INVALID),
    "permission_denied": Kind(403, _INVALID),
    "not_found": Kind(404, _INVALID),
    "model_not_found": Kind(404, _INVALID),
    "response_not_found": Kind(404, _INVALID),
    "method_not_allowed": Kind(405, _INVALID),
    "request_timeout": Kind(408, _INVALID, close=True),
    "body_too_large": Kind(413, _INVALID, close=True),
    "expectation_failed": Kind(417, _INVALID, close=True),
    "queue_full": Kind(429, "rate_limit_error", retry=5),
    "rate_limit_exceeded": Kind(429, "rate_limit_error", retry=5),
    "headers_too_large": Kind(431, _INVALID, close=True),
    "internal_error": Kind(500, "api_error"),
    "not_implemented": Kind(501, _INVALID, close=True, final=True),
    "http_version_not_supported": Kind(505, _INVALID, close=True, final=True),
    "upstream_error": Kind(502, "upstream_error"),
    "model_failed": Kind(503, _BUSY, retry=30),
    "no_capacity": Kind(503, _BUSY, retry=30),
    "lease_lost": Kind(503, _BUSY, retry=1),
    "server_is_overloaded": Kind(503, _BUSY, retry=5),
    "draining": Kind(503, _BUSY, retry=5, close=True),
    "queue_timeout": Kind(504, _SLOW),
    "deadline_unreachable": Kind(504, _SLOW),
    "deadline_exceeded": Kind(504, _SLOW),
    "upstream_timeout": Kind(504, _SLOW),
}

REFUSALS: dict[str, str] = {
    "QUEUE_FULL": "queue_full",
    "RATE_LIMITED": "rate_limit_exceeded",
    "QUEUE_TIMEOUT": "queue_timeout",
    "DEADLINE_UNREACHABLE": "deadline_unreachable",
    "DEADLINE_EXCEEDED": "deadline_exceeded",
    "MODEL_NOT_FOUND": "model_not_found",
    "MODEL_FAILED": "model_failed",
    "NO_CAPACITY": "no_capacity",
    "UNAVAILABLE": "server_is_overloaded",
    "DRAINING": "server_is_overloaded",
}
"""Admission's reasons; any other one is `server_is_overloaded`."""

LOSSES: dict[str, str] = {
    "REVOKED": "An operator ended this request.",
    "INSTANCE_LOST": "The model server that ran this request is gone.",
    "CONTROL_LOST": "The control plane has been away for too long.",
}
_LOST = "The slot of this request was taken back."


class Failure(Exception):
    """A request ends with an error of the edge's own; `code` names a row of KINDS."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: float = 0.0,
        final: bool = False,
        allow: str = "",
        limited: str = "",
        told: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.kind = KINDS[code]
        self.message = bounded(message)
        self.param = param
        self.retry_after = retry_after
        """Seconds until a retry may help; 0 = the table's."""
        self.told = told
        """Admission has told that time, and has spread it already."""
        self.final = final
        """No retry can help."""
        self.allow = allow
        """Methods for the header Allow."""
        self.type = limited or self.kind.type
        """OpenAI's type: of a rate, what it limits."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.kind.status

    def error(self) -> dict[str, Any]:
        """The inner object of OpenAI's envelope."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        """The envelope."""
        return orjson.dumps({"error": self.error()})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What goes with it. 429 and 503 always carry Retry-After: SDKs obey it between 1 and 120 s."""
        found = [(b"content-type", b"application/json")]
        seconds = self.retry_after or self.kind.retry
        if seconds:
            seconds = seconds if self.told and self.retry_after else spread(seconds)
            found.append((b"retry-after", str(retry_after(seconds)).encode()))
        if self.final or self.kind.final:
            found.append((b"x-should-retry", b"false"))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        if self.kind.close:
            found.append((b"connection", b"close"))
        if self.allow:
            found.append((b"allow", self.allow.encode()))
        return found


def refusal(reason: str, message: str, retry: float, rates: Rates | None = None) -> Failure:
    """Admission's refusal. Without a time to retry, a model that failed or doesn't fit stays that way."""
    code = REFUSALS.get(reason, "server_is_overloaded")
    final = not retry and code in ("model_failed", "no_capacity", "deadline_exceeded", "deadline_unreachable")
    return Failure(
        code,
        message or "The request was refused.",
        limited=_used_up(rates) if code == "rate_limit_exceeded" else "",
        retry_after=retry,
        told=True,
        final=final,
        param="model" if code == "model_not_found" else None,
    )


def _used_up(rates: Rates | None) -> str:
    """The rate that a request was refused for: the one of which there isn't one left, else tokens."""
    requests = rates.get("requests") if rates else None
    return "requests" if requests is not None and not requests.remaining else "tokens"


def internal_error() -> Failure:
    """A bug of ours, of which a client is told nothing."""
    return Failure("internal_error", "An internal error; the service's log tells more.")


def loss(reason: str) -> Failure:
    """A lease that ended otherwise."""
    return Failure("lease_lost", LOSSES.get(reason, _LOST))


def upstream_error(status: int, content: bytes) -> dict[str, Any]:
    """A model server's error response as an error object for a stream that has begun."""
    try:
        data = orjson.loads(content)
    except orjson.JSONDecodeError:
        data = None
    inner = data.get("error", data) if isinstance(data, dict) else None
    if isinstance(inner, dict) and isinstance(inner.get("message"), str):
        return inner
    message = f"The model server answered with status {status} and no stream."
    return {"message": message, "type": "upstream_error", "param": None, "code": "upstream_error"}


def retry_after(seconds: float) -> int:
    """Whole seconds from 1 to 120: SDKs obey nothing else."""
    return max(1, min(120, math.ceil(seconds)))


def spread(seconds: float) -> float:
    """A time of the edge's own, longer by up to a fifth by chance, so that those refused together don't come
    back so. Admission does the same to those that it tells."""
    return seconds * random.uniform(1.0, 1.2)  # noqa: S311 - no secret


def bounded(text: str) -> str:
    """A message of at most 500 printable characters."""
    text = "".join(char if char.isprintable() else " " for char in text[: _LONGEST + 1])
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def in_stream(path: bytes, error: dict[str, Any]) -> bytes:
    """An error inside an SSE stream, in the dialect of the route, as the stream's last bytes.

    chat, completions and audio end with [DONE] as vLLM does; responses and messages have named events and
    no end mark. The object always has a truthy `error`, at which openai-python raises.
    """
    if path.startswith(b"/v1/responses"):
        event = {"type": "error", "sequence_number": 0, **_flat(error), "error": error}
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"
    if path == b"/v1/messages":
        kind = {_BUSY: "overloaded_error", _SLOW: "timeout_error"}
        kind |= dict.fromkeys(("rate_limit_error", "requests", "tokens"), "rate_limit_error")
        inner = {"type": kind.get(str(error.get("type")), "api_error"), "message": error.get("message")}
        return b"event: error\ndata: " + orjson.dumps({"type": "error", "error": inner}) + b"\n\n"
    return b"data: " + orjson.dumps({"error": error}) + b"\n\ndata: [DONE]\n\n"


def _flat(error: dict[str, Any]) -> dict[str, Any]:
    return {"code": error.get("code"), "message": error.get("message"), "param": error.get("param")}
