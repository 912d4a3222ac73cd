"""The head of a request, read as RFC 9112 says and no more generously. Pure.

What two servers could read differently is refused: both framings at once, lengths said twice, folded lines,
bare line feeds, spaces around names. A model server behind this one never sees what is left to argue about:
its request is written anew from what was read here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tidegate_edge.envelope import Failure

Headers = list[tuple[bytes, bytes]]

CHUNKED = -1
"""As a length: the body comes in chunks."""
MAX_FIELDS = 256
"""Fields of one head."""

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
"""A name (RFC 9110, 5.6.2), as an expression."""
FIELD = TOKEN + rb":[^\x00-\x08\x0a-\x1f\x7f]*+"
"""A header field or trailer, without its line end, as an expression."""
_REQUEST = re.compile(rb"(" + TOKEN + rb") ([!-~]++) HTTP/([0-9])\.([0-9])")
_FIELDS = re.compile(rb"(?:\r\n" + FIELD + rb")*+")
_METHODS = frozenset((b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE"))
_AUTHORITY = rb"(?:[A-Za-z0-9._~%!$&'()*+,;=\-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?"
_ABSOLUTE = re.compile(rb"(?i:https?)://" + _AUTHORITY + rb"(?=[/?#]|$)")
_HOST = re.compile(rb"(?:" + _AUTHORITY + rb")?")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"connection", b"host", b"expect"))


@dataclass(slots=True)
class RequestHead:
    """One request's head."""

    method: str
    path: bytes
    """As it was sent, without the query."""
    query: bytes
    headers: Headers
    """Names in lower case, in the order sent."""
    length: int
    """Bytes of the body; CHUNKED = they come in chunks."""
    keep: bool
    """The client keeps the connection for another request."""
    expects: bool
    """The client waits for a word before it sends the body (`Expect: 100-continue`)."""
    old: bool
    """HTTP/1.0: the answer can't come in chunks."""


def parse_head(raw: bytes) -> RequestHead:
    """Reads a head up to, and without, its empty line. Raises Failure (400, 417, 431, 501, 505)."""
    line, _, _ = raw.partition(b"\r\n")
    request = _REQUEST.fullmatch(line)
    if request is None:
        raise malformed("its first line is no `METHOD /path HTTP/1.1`")
    method, target, major, minor = request.groups()
    if major != b"1":
        raise Failure("http_version_not_supported", "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    if method not in _METHODS:
        raise Failure("not_implemented", "This method is not known here.")
    if _FIELDS.fullmatch(raw, len(line)) is None:
        raise malformed("a header field is malformed")
    lines = raw.split(b"\r\n")
    if len(lines) > MAX_FIELDS:
        raise Failure("headers_too_large", f"The request has more than {MAX_FIELDS} header fields.")
    headers: Headers = []
    framing: dict[bytes, list[bytes]] = {}
    for field in lines[1:]:
        name, _, value = field.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        headers.append((name, value))
        if name in _FRAMING:
            framing.setdefault(name, []).append(value)
    old = minor == b"0"
    path, query = _target(method, target)
    _check_host(framing.get(b"host", []), old)
    return RequestHead(
        method=method.decode(),
        path=path,
        query=query,
        headers=headers,
        length=_length(framing, old),
        keep=not old and not _says(framing.get(b"connection"), b"close"),
        expects=_expects(framing.get(b"expect")) and not old,
        old=old,
    )


def _target(method: bytes, target: bytes) -> tuple[bytes, bytes]:
    """Path and query. A whole URL is allowed (RFC 9112, 3.2.2); its host is not looked at."""
    if not target.startswith(b"/"):
        if target == b"*" and method == b"OPTIONS":
            return target, b""
        authority = _ABSOLUTE.match(target)
        if authority is None:
            raise malformed("its target is no path")
        target = target[authority.end() :]
        if not target.startswith(b"/"):
            target = b"/" + target
    if b"#" in target:
        raise malformed("its target holds a `#`")
    path, _, query = target.partition(b"?")
    return path, query


def _check_host(hosts: list[bytes], old: bool) -> None:
    if len(hosts) > 1 or (not hosts and not old):
        raise malformed("it must have one `Host`")
    if hosts and _HOST.fullmatch(hosts[0]) is None:
        raise malformed("its `Host` is malformed")


def _length(framing: dict[bytes, list[bytes]], old: bool) -> int:
    """How the body is framed (RFC 9112, 6.3); two answers to that are none."""
    codings, lengths = framing.get(b"transfer-encoding"), framing.get(b"content-length")
    if codings:
        if lengths:
            raise malformed("it has both `Content-Length` and `Transfer-Encoding`")
        if old:
            raise malformed("`Transfer-Encoding` has no meaning in HTTP/1.0")
        if len(codings) > 1:
            raise malformed("`Transfer-Encoding` is said twice")
        if codings[0].lower() != b"chunked":
            raise Failure("not_implemented", "`Transfer-Encoding` may be `chunked` only.")
        return CHUNKED
    if not lengths:
        return 0
    if len(lengths) > 1 or _LENGTH.fullmatch(lengths[0]) is None:
        raise malformed("`Content-Length` must be one number")
    return int(lengths[0])


def _expects(values: list[bytes] | None) -> bool:
    if not values:
        return False
    if len(values) > 1 or values[0].lower() != b"100-continue":
        raise Failure("expectation_failed", "`Expect` may be `100-continue` only.")
    return True


def _says(values: list[bytes] | None, token: bytes) -> bool:
    return values is not None and any(
        token == one.strip().lower() for value in values for one in value.split(b",")
    )


def malformed(why: str) -> Failure:
    """What is refused because of how it is written, not of what it wants."""
    return Failure("bad_request", f"The request is malformed: {why}.")
