"""Messages as plain data, for people and scripts."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message


def as_dict(message: Message) -> dict[str, Any]:
    """A message as plain data: numbers stay numbers (protobuf's own JSON makes texts of large ones), and
    enums are words. Unset optional fields are left out."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            found[field.name] = dict(sorted(value.items()))
        elif field.is_repeated:
            found[field.name] = [_plain(field, item) for item in value]
        else:
            found[field.name] = _plain(field, value)
    return found


def word(enum: Any, value: int) -> str:
    """An enum's value as one word: MODEL_STATE_READY of ModelState is `ready`; one that is unknown is ""."""
    if value not in enum.values_by_number:
        return ""
    prefix = "".join(f"_{char}" if char.isupper() else char.upper() for char in enum.name).lstrip("_")
    name: str = enum.values_by_number[value].name
    return name.removeprefix(f"{prefix.upper()}_").lower()


def _plain(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return as_dict(value)
    return value if field.enum_type is None else word(field.enum_type, value)
