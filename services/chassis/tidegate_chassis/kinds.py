"""Kinds of values in the configuration: how each is written, what is allowed, and how to say so.

A kind is used as an annotation, `Annotated[int, Whole(1, 64)]`. It parses what YAML or the environment
gave, checks the range, and describes itself for error messages and for the configuration reference.
"""

from __future__ import annotations

import ipaddress
import re
from abc import ABC, abstractmethod
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_DURATION = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")


class Kind(ABC):
    """Base of all kinds: `parse` returns the value or raises ValueError, `allowed` says what may be given."""

    @abstractmethod
    def parse(self, value: object) -> Any:
        """The value as the program uses it; ValueError when it is not of this kind."""

    @abstractmethod
    def allowed(self) -> str:
        """What may be given, to follow "give "."""

    def show(self, value: Any) -> str:
        """A parsed value as users would write it."""
        return str(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Puts `parse` into pydantic; every failure names the value and what is allowed."""

        def validate(value: object) -> Any:
            try:
                return self.parse(value)
            except (ValueError, TypeError):
                message = f"{_quoted(value)} is not allowed; give {self.allowed()}"
                raise PydanticCustomError("kind", "{message}", {"message": message}) from None

        return core_schema.no_info_plain_validator_function(validate)


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Whole(Kind):
    """A whole number from `low` to `high`."""

    def __init__(self, low: int, high: int, zero: str = "") -> None:
        self.low, self.high, self.zero = low, high, zero

    def parse(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        if not (self.low <= value <= self.high or (self.zero and value == 0)):
            raise ValueError
        return value

    def allowed(self) -> str:
        zero = f", or 0 ({self.zero})" if self.zero else ""
        return f"a whole number from {self.low} to {self.high}{zero}"


class Number(Kind):
    """A number from `low` to `high`."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def parse(self, value: object) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not self.low <= value <= self.high
        ):
            raise ValueError
        return float(value)

    def allowed(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"


class Duration(Kind):
    """A duration with a unit (`250ms`, `10s`, `30m`, `2h`); parsed to seconds."""

    def __init__(self, low: str, high: str, zero: str = "") -> None:
        self.text = (low, high)
        self.zero = zero
        self.low, self.high = (_quantity(text, _DURATION) for text in self.text)

    def parse(self, value: object) -> float:
        if value in (0, "0") and not isinstance(value, bool) and self.zero:
            return 0.0
        seconds = _quantity(value, _DURATION)
        if self.zero and seconds == 0:
            return 0.0
        if not self.low <= seconds <= self.high:
            raise ValueError
        return seconds

    def allowed(self) -> str:
        zero = f", or 0 ({self.zero})" if self.zero else ""
        return f"a duration with a unit (ms, s, m, h, d) from {self.text[0]} to {self.text[1]}{zero}"

    def show(self, value: Any) -> str:
        for unit in ("d", "h", "m", "s"):
            if value and value % _DURATION[unit] == 0:
                return f"{value / _DURATION[unit]:g}{unit}"
        return f"{round(value * 1000)}ms" if value else "0"


class Size(Kind):
    """A size of memory or data with a unit (`32MiB`, `24GiB`); parsed to bytes."""

    def __init__(self, low: str, high: str) -> None:
        self.text = (low, high)
        self.low, self.high = (_quantity(text, _SIZE) for text in self.text)

    def parse(self, value: object) -> int:
        size = _quantity(value, _SIZE)
        if not self.low <= size <= self.high:
            raise ValueError
        return int(size)

    def allowed(self) -> str:
        return f"a size with a unit (KiB, MiB, GiB) from {self.text[0]} to {self.text[1]}"

    def show(self, value: Any) -> str:
        for unit in ("TiB", "GiB", "MiB", "KiB"):
            if value % _SIZE[unit] == 0:
                return f"{value // _SIZE[unit]}{unit}"
        return f"{value}B"


class Text(Kind):
    """A text that matches `pattern` as a whole."""

    def __init__(self, pattern: str, words: str) -> None:
        self.pattern, self.words = re.compile(pattern), words

    def parse(self, value: object) -> str:
        if not isinstance(value, str) or not self.pattern.fullmatch(value):
            raise ValueError
        return value

    def allowed(self) -> str:
        return self.words


class Flag(Kind):
    """true or false."""

    def parse(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    def allowed(self) -> str:
        return "true or false"

    def show(self, value: Any) -> str:
        return str(value).lower()


class Choice(Kind):
    """One of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def parse(self, value: object) -> str:
        if value not in self.words or not isinstance(value, str):
            raise ValueError
        return value

    def allowed(self) -> str:
        return " or ".join(self.words)


class Address(Kind):
    """Where a service listens or is reached: `host:port`, or `unix:/path` where `unix` is allowed."""

    def __init__(self, unix: bool = True, optional: bool = False) -> None:
        self.unix, self.optional = unix, optional

    def parse(self, value: object) -> str:
        if self.optional and (value is None or value == ""):
            return ""
        if not isinstance(value, str):
            raise ValueError
        if self.unix and value.startswith("unix:/") and len(value) - len("unix:") < 108:
            return value
        host, colon, port = value.rpartition(":")
        if not host or not colon or not port.isdigit() or not 0 <= int(port) <= 65535:
            raise ValueError
        return value

    def allowed(self) -> str:
        return "host:port" + (" or unix:/path (shorter than 108 characters)" if self.unix else "")


def is_loopback(listen: str) -> bool:
    """Whether an address of the form `host:port` is reachable from this machine alone."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _quantity(value: object, units: dict[str, Any]) -> float:
    found = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if not found or found[2] not in units:
        raise ValueError
    return float(found[1]) * float(units[found[2]])
