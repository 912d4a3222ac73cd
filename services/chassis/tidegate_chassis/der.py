"""What is needed of a certificate's inside and `ssl` doesn't tell: its dates, and the kind of its key."""

from __future__ import annotations

from datetime import UTC, datetime

_VERSION, _UTC_TIME = 0xA0, 0x17

Element = tuple[int, int, int]
"""Tag, start and end of the content; the end is where the next one begins."""


def validity(der: bytes) -> tuple[float, float]:
    """From when and until when a certificate is valid, in seconds since 1970; ValueError when it is none."""
    dates = _signed(der)[3]
    begins = _element(der, dates[1])
    return _moment(der, begins), _moment(der, _element(der, begins[2]))


def key_algorithm(der: bytes) -> bytes:
    """The identifier of a certificate's kind of key, its curve included; ValueError when it is none."""
    key = _signed(der)[5]
    _, start, end = _element(der, key[1])
    return der[start:end]


def _signed(der: bytes) -> list[Element]:
    """Serial number, algorithm, issuer, validity, subject and key, after a version that may be left out: the
    signed part, which is the first thing in a certificate (RFC 5280, 4.1)."""
    certificate = _element(der, 0)
    at = _element(der, certificate[1])[1]
    if der[at : at + 1] == bytes([_VERSION]):
        at = _element(der, at)[2]
    found: list[Element] = []
    for _ in range(6):
        found.append(_element(der, at))
        at = found[-1][2]
    return found


def _element(der: bytes, at: int) -> Element:
    """The element that begins there (X.690, 8.1)."""
    if at + 2 > len(der):
        raise ValueError("it ends too early")
    tag, length, start = der[at], der[at + 1], at + 2
    if length & 0x80:
        count = length & 0x7F
        length, start = int.from_bytes(der[start : start + count], "big"), start + count
    if start + length > len(der):
        raise ValueError("it ends too early")
    return tag, start, start + length


def _moment(der: bytes, element: Element) -> float:
    """A UTCTime or GeneralizedTime, in seconds since 1970. Years of two digits are 1950 to 2049."""
    tag, start, end = element
    text = der[start:end].decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if text >= "5" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
