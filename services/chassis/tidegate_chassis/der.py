"""The one thing of a certificate's inside that is needed here, and that `ssl` doesn't tell: its dates."""

from __future__ import annotations

from datetime import UTC, datetime

_SEQUENCE, _VERSION, _UTC_TIME = 0x30, 0xA0, 0x17


def validity(der: bytes) -> tuple[float, float]:
    """From when and until when a certificate is valid, in seconds since 1970; ValueError when it is none.

    RFC 5280, 4.1: a sequence, in it the signed part, in it, after a version that may be left out, serial
    number, algorithm, issuer and the validity.
    """
    certificate = _element(der, 0)
    signed = _element(der, certificate[1])
    at = signed[1]
    if der[at : at + 1] == bytes([_VERSION]):
        at = _element(der, at)[2]
    for _ in range(3):
        at = _element(der, at)[2]
    tag, start, _ = _element(der, at)
    if tag != _SEQUENCE:
        raise ValueError("no validity")
    begins = _element(der, start)
    return _moment(der, begins), _moment(der, _element(der, begins[2]))


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Tag, start and end of the content of an element (X.690, 8.1); its end is where the next one begins."""
    if at + 2 > len(der):
        raise ValueError("it ends too early")
    tag, length, start = der[at], der[at + 1], at + 2
    if length & 0x80:
        count = length & 0x7F
        length, start = int.from_bytes(der[start : start + count], "big"), start + count
    if start + length > len(der):
        raise ValueError("it ends too early")
    return tag, start, start + length


def _moment(der: bytes, element: tuple[int, int, int]) -> float:
    """A UTCTime or GeneralizedTime, in seconds since 1970. Years of two digits are 1950 to 2049."""
    tag, start, end = element
    text = der[start:end].decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if text >= "5" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
