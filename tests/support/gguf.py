"""Makes the heads of GGUF files."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "llama.context_length": 8192,
    "llama.embedding_length": 4096,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
}
"""The keys of Llama 3 8B that tell its shape."""


def header(values: Mapping[str, Any], version: int = 3) -> bytes:
    """Magic, version, no tensors, and the key/values in their order."""
    body = b"".join(_text(key) + _typed(value) for key, value in values.items())
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(values)) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Any) -> bytes:
    kind, data = _value(value)
    return struct.pack("<I", kind) + data


def _value(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if value < 2**31 else (10, struct.pack("<Q", value))
    if isinstance(value, float):
        return 12, struct.pack("<d", value)
    if isinstance(value, str):
        return 8, _text(value)
    items = [_value(item) for item in value]
    return 9, struct.pack("<IQ", items[0][0], len(items)) + b"".join(data for _, data in items)
