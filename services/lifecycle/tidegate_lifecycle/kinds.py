"""Kinds of values that only this service's settings have."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from tidegate_chassis.kinds import Kind, Size

MIB = 2**20


class Maybe(Kind):
    """Another kind, or nothing at all."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def parse(self, value: object) -> Any:
        return None if value is None or value == "" else self.kind.parse(value)

    def allowed(self) -> str:
        return f"{self.kind.allowed()}, or nothing"

    def show(self, value: Any) -> str:
        return "" if value is None else self.kind.show(value)


class ListOf(Kind):
    """A list whose items are of one kind; parsed to a tuple."""

    def __init__(self, kind: Kind, low: int = 0, high: int = 1000) -> None:
        self.kind, self.low, self.high = kind, low, high

    def parse(self, value: object) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not self.low <= len(value) <= self.high:
            raise ValueError
        return tuple(self.kind.parse(item) for item in value)

    def allowed(self) -> str:
        return f"a list, each item {self.kind.allowed()}"


class Mapped(Kind):
    """Keys that match a pattern, each with a text."""

    def __init__(self, pattern: str, words: str) -> None:
        self.pattern, self.words = re.compile(pattern), words

    def parse(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict):
            raise ValueError
        for key, text in value.items():
            if not isinstance(key, str) or not self.pattern.fullmatch(key):
                raise ValueError
            if not isinstance(text, str) or "\0" in text:
                raise ValueError
        return dict(value)

    def allowed(self) -> str:
        return self.words


class JsonObject(Kind):
    """Keys and values that JSON can hold."""

    def parse(self, value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value) or "model" in value:
            raise ValueError
        json.dumps(value, allow_nan=False)
        return dict(value)

    def allowed(self) -> str:
        return "keys and values of a JSON object, without `model`"


class Identifier(Kind):
    """A device's id: a name, an index or a UUID."""

    _pattern = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")

    def parse(self, value: object) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not self._pattern.fullmatch(value):
            raise ValueError
        return value

    def allowed(self) -> str:
        return "a name, an index or a UUID of 1 to 64 letters, digits and . _ : -"


@dataclass(frozen=True)
class Vram:
    """Memory per card: an amount in MiB or a share of the card's total."""

    mib: int | None = None
    share: float | None = None


class VramKind(Kind):
    """`10GiB` or `90%`."""

    _size = Size("1MiB", "10TiB")

    def parse(self, value: object) -> Vram:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value.strip()) if isinstance(value, str) else None
        if found is None:
            return Vram(mib=-(-self._size.parse(value) // MIB))
        share = float(found[1]) / 100
        if not 0.01 <= share <= 1:
            raise ValueError
        return Vram(share=share)

    def allowed(self) -> str:
        return "an amount with a unit (MiB, GiB) from 1MiB to 10TiB, or a share of each card from 1% to 100%"

    def show(self, value: Vram) -> str:
        return (
            f"{value.share * 100:g}%" if value.share is not None else self._size.show((value.mib or 0) * MIB)
        )
