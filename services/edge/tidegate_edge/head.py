"""Header fields: what is read of a request's, what is passed on, what the edge adds. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import getrandbits

from tidegate_edge.envelope import Failure
from tidegate_edge.keyring import NOBODY, Caller
from tidegate_edge.ticket import Band, QueueView, Rates

Headers = list[tuple[bytes, bytes]]

SANE_ID = rb"[A-Za-z0-9._-]{1,128}"
"""A request id that is kept, as an expression."""
_REQUEST_ID = re.compile(SANE_ID)
_TENANT = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_AFFINITY = re.compile(rb"[!-~]{1,128}")
_MODEL = re.compile(rb"[!-~]{1,256}")
_HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection",
        b"te", b"trailer", b"transfer-encoding", b"upgrade",
    )
)  # fmt: skip
_READ = frozenset(
    (
        b"host", b"content-length", b"expect", b"x-request-id", b"traceparent", b"x-tidegate-deadline-ms",
        b"content-type", b"content-encoding", b"accept-encoding", b"x-tidegate-tenant",
        b"x-tidegate-priority", b"x-tidegate-affinity", b"x-tidegate-model", b"authorization", b"x-api-key",
        b"origin",
    )
)  # fmt: skip
_SPECIAL = _HOP_BY_HOP | _READ
_SET_HERE = _HOP_BY_HOP | {
    b"x-request-id", b"x-queue-depth", b"x-max-concurrent", b"x-max-queue-size", b"x-tidegate-queue-ms",
    b"x-tidegate-instance", b"access-control-allow-credentials", b"access-control-allow-headers",
    b"access-control-allow-methods", b"access-control-allow-origin", b"access-control-expose-headers",
    b"access-control-max-age",
}  # fmt: skip
"""Fields that model servers don't set: those of their connection, and what the edge says itself. vLLM allows
every origin unless told otherwise; through here that would open the gateway to every page."""
_RATE = b"x-ratelimit-"
_LONGEST_DEADLINE = 86_400_000
_LONGEST_SAID = 40
"""Characters of a caller's value that are repeated in a message."""


@dataclass(slots=True)
class Head:
    """A request's header fields, read once."""

    request_id: bytes
    """The caller's when it is sane, else a new one."""
    forward: Headers
    """End-to-end fields for the model server, as they came."""
    content_type: bytes = b""
    content_length: int = -1
    """Bytes, -1 = not told."""
    trace_parent: bytes = b""
    accept_encoding: bytes = b""
    deadline: float = 0.0
    """The caller's own, in seconds from now; 0 = none."""
    authorization: bytes = b""
    api_key: bytes = b""
    """The field x-api-key."""
    origin: bytes = b""
    """The page that asks, if it is a browser."""
    said_tenant: bytes | None = None
    said_band: bytes | None = None
    """What the caller says of itself; believed by `admit` alone."""
    caller: Caller = NOBODY
    """Who is asking; before `admit` nobody is."""
    tenant: str = ""
    """Whose share and rates count; empty = nobody's in particular."""
    band: Band = Band.NORMAL
    model: str = ""
    """A name or an alias, for requests whose body names none; empty = not told."""
    affinity: str = ""
    """Requests with the same one go to the same instance where it has room; empty = to any."""

    def admit(self, caller: Caller) -> None:
        """Takes over who is asking. Raises Failure (400) for what is wrong with what it says of itself, if it
        is believed."""
        self.caller, self.tenant = caller, caller.tenant
        if caller.act_as and self.said_tenant is not None:
            self.tenant = _tenant(self.said_tenant)
        if caller.act_as and self.said_band is not None:
            self.band = _band(self.said_band)
        if not caller.checked:
            both = ((b"authorization", self.authorization), (b"x-api-key", self.api_key))
            self.forward += [field for field in both if field[1]]

    def to_server(self, trace_parent: str, plain: bool) -> Headers:
        """The fields for one attempt. `plain`: the answer must not be compressed, because it goes into a
        stream whose head has been sent."""
        fields = [*self.forward, (b"x-request-id", self.request_id)]
        parent = trace_parent.encode() or self.trace_parent
        if parent:
            fields.append((b"traceparent", parent))
        if self.accept_encoding and not plain:
            fields.append((b"accept-encoding", self.accept_encoding))
        return fields


def read_head(headers: Headers) -> Head:
    """Reads a request's fields. Raises Failure (400).

    Who is asking, how urgent it is and from which page never goes to the model server.
    """
    head = Head(b"", [])
    forward = head.forward
    named: tuple[bytes, ...] = ()
    for field in headers:
        name, value = field
        if name not in _SPECIAL:
            forward.append(field)
        elif name == b"content-type":
            if head.content_type:
                raise Failure("invalid_header", "content-type is given more than once.")
            head.content_type = value
            forward.append(field)
        elif name == b"content-length":
            head.content_length = int(value) if value.isdigit() and len(value) < 19 else -1
        elif name == b"x-request-id":
            head.request_id = value if _REQUEST_ID.fullmatch(value) else b""
        elif name == b"accept-encoding":
            head.accept_encoding = value
        elif name == b"traceparent":
            head.trace_parent = value
        elif name == b"connection":
            named = tuple(token.strip().lower() for token in value.split(b","))
        elif name == b"x-tidegate-deadline-ms":
            head.deadline = _deadline(value)
        elif name == b"x-tidegate-affinity":
            head.affinity = _affinity(value)
        elif name == b"x-tidegate-model":
            head.model = _model(value)
        elif name == b"x-tidegate-tenant":
            head.said_tenant = value
        elif name == b"x-tidegate-priority":
            head.said_band = value
        elif name == b"authorization":
            head.authorization = head.authorization or value
        elif name == b"x-api-key":
            head.api_key = head.api_key or value
        elif name == b"origin":
            head.origin = value
        elif name == b"content-encoding" and value.lower() != b"identity":
            raise Failure("unsupported_encoding", "Compressed request bodies are not supported.")
    if named:
        head.forward = [field for field in forward if field[0] not in named]
    head.request_id = head.request_id or new_request_id()
    return head


def request_id(headers: Headers) -> bytes:
    """The caller's when it is sane, else a new one; also of a request whose other fields are wrong."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value
    return new_request_id()


def new_request_id() -> bytes:
    """A name, no secret."""
    return b"%032x" % getrandbits(128)


def _deadline(value: bytes) -> float:
    if not value.isdigit() or not 0 < int(value[:12]) <= _LONGEST_DEADLINE:
        words = f"x-tidegate-deadline-ms must be a whole number from 1 to {_LONGEST_DEADLINE}"
        raise Failure("invalid_header", f"{words}, not {_said(value)}.")
    return int(value) / 1000


def _affinity(value: bytes) -> str:
    if not _AFFINITY.fullmatch(value):
        words = f"x-tidegate-affinity must be 1 to 128 visible ASCII characters, not {_said(value)}."
        raise Failure("invalid_header", words)
    return value.decode()


def _model(value: bytes) -> str:
    if not _MODEL.fullmatch(value):
        words = f"x-tidegate-model must be 1 to 256 visible ASCII characters, not {_said(value)}."
        raise Failure("invalid_header", words)
    return value.decode()


def _said(value: bytes) -> str:
    """A caller's value in a message, cut short."""
    text = value.decode("latin-1")
    return (
        f"`{text}`" if len(text) <= _LONGEST_SAID else f"`{text[:_LONGEST_SAID]}…` ({len(text)} characters)"
    )


def _tenant(value: bytes) -> str:
    if not _TENANT.fullmatch(value):
        words = (
            f"x-tidegate-tenant must be 1 to 64 letters, digits and the signs . _ and -, not {_said(value)}."
        )
        raise Failure("invalid_header", words)
    return value.decode()


def _band(value: bytes) -> Band:
    try:
        return Band[value.decode("latin-1").upper()]
    except KeyError:
        words = f"x-tidegate-priority must be high, normal or low, not {_said(value)}."
        raise Failure("invalid_header", words) from None


def to_client(headers: Headers, own: Headers) -> Headers:
    """A model server's response fields without those of its connection, and with the edge's own.

    What it says about rates is passed on where the tenant has none here: two limits can't be told apart.
    """
    named: tuple[bytes, ...] = ()
    kept = []
    for name, value in headers:
        lower = name.lower()
        if lower not in _SET_HERE:
            kept.append((lower, value))
        elif lower == b"connection":
            named = tuple(token.strip().lower() for token in value.split(b","))
    if named:
        kept = [field for field in kept if field[0] not in named]
    if any(name.startswith(_RATE) for name, _ in own):
        kept = [field for field in kept if not field[0].startswith(_RATE)]
    return kept + own


def queue_fields(queue: QueueView) -> Headers:
    """The state of the model's queue."""
    return [
        (b"x-queue-depth", b"%d" % queue.waiting),
        (b"x-max-concurrent", b"%d" % queue.max_concurrent),
        (b"x-max-queue-size", b"%d" % queue.max_queue),
    ]


def rate_fields(rates: Rates | None) -> Headers:
    """What is left of the tenant's rates, in OpenAI's fields; none where it has none."""
    fields = []
    for name, one in rates.items() if rates else ():
        kind = name.encode()
        fields.append((_RATE + b"limit-" + kind, b"%d" % one.limit))
        fields.append((_RATE + b"remaining-" + kind, b"%d" % one.remaining))
        fields.append((_RATE + b"reset-" + kind, _duration(one.reset)))
    return fields


def _duration(milliseconds: int) -> bytes:
    """As OpenAI writes durations: 0s, 120ms, 1.5s, 6m0s, 1h0m0s."""
    if 0 < milliseconds < 1000:
        return b"%dms" % milliseconds
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest / 1000:g}s"
    if not minutes:
        return seconds.encode()
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" * bool(hours) + f"{minutes}m{seconds}").encode()


def field(headers: Headers, wanted: bytes) -> bytes:
    """A field's value, lower-case; empty = it isn't there."""
    for name, value in headers:
        if name.lower() == wanted:
            return value.lower()
    return b""


def raw_field(headers: Headers, wanted: bytes) -> bytes:
    """The value as it came of a request's field, whose names are in lower case; empty = it isn't there."""
    for name, value in headers:
        if name == wanted:
            return value
    return b""
