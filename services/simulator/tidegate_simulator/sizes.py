"""Amounts as people write them on a command line."""

from __future__ import annotations

import re

MIB = 1024 * 1024
GIB = 1024 * MIB

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*$")
# vLLM's own reading: a small letter counts in thousands, a capital in 1024s.
_FACTORS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "K": 1024,
    "M": MIB,
    "G": GIB,
    "T": 1024 * GIB,
    "KiB": 1024,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": 1024 * GIB,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
}


def parse_count(text: str) -> int:
    """Reads `4096`, `4k` (4000), `4K` (4096), `1.5G`, `10GiB`. Raises ValueError on anything else."""
    match = _NUMBER.match(text)
    if match is None or match[2] not in _FACTORS:
        raise ValueError(f"{text!r} is not an amount such as 4096, 1.5G or 10GiB")
    return int(float(match[1]) * _FACTORS[match[2]])


def parse_mib(text: str) -> int:
    """Reads an amount of memory into MiB; a bare number is MiB already."""
    if re.fullmatch(r"\s*[0-9]+\s*", text):
        return int(text)
    return parse_count(text) // MIB


def gib(mib: float) -> str:
    """Writes MiB as vLLM's log lines do: GiB with two decimals, no unit."""
    return f"{mib / 1024:.2f}"
