"""A model's shape from a GGUF file's key/values, as llama.cpp names things there. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tidegate_lifecycle.estimate.shape import Cache, Shape, UnknownError
from tidegate_lifecycle.estimate.values import maybe, whole

_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "llama4": 4}
"""Each so-manieth layer has full attention: llama.cpp knows it by the architecture."""
_PARALLEL = frozenset({"falcon-h1"})
"""Each layer has attention and a state."""
_UNKNOWN = frozenset({"t5", "t5encoder", "wavtokenizer-dec", "mmproj", "clip"})
_STATE_BYTES = 4
_DEFAULT_INTERVAL = 4
"""Of Qwen3-Next, in files that don't tell it."""


def shape(values: Mapping[str, Any], weights: int) -> Shape:
    """What the header tells of a model whose files are so many bytes together.

    UnknownError when it doesn't say enough, or says strange things.
    """
    name = values.get("general.architecture")
    if not isinstance(name, str) or not name:
        raise UnknownError("the GGUF file doesn't name its architecture")
    if name in _UNKNOWN or name.startswith("rwkv"):
        raise UnknownError(f"the architecture {name} isn't known")
    own = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
    layers = whole(own, "block_count")
    if layers > 10_000:
        raise UnknownError(f"{layers} layers make no sense")
    heads = _each(own, "attention.head_count", layers, 0)
    kv_heads = _kv_heads(name, own, layers, heads)
    caches = () if own.get("attention.causal") is False else _caches(name, own, kv_heads, max(heads))
    states = layers if name in _PARALLEL else kv_heads.count(0)
    return Shape(
        weights=weights,
        caches=tuple(caches),
        state=states * _state(own) * _STATE_BYTES,
        native_length=maybe(own, "context_length"),
        layers=layers,
        parts=math.gcd(*heads) or 1,
        kv_heads=max(kv_heads) or 1,
    )


def _each(own: Mapping[str, Any], key: str, layers: int, default: int) -> list[int]:
    """A number for each layer; the file gives one for all or one each."""
    given = own.get(key)
    if not isinstance(given, list):
        number = maybe(own, key)
        return [default if number is None else number] * layers
    if len(given) < layers:
        raise UnknownError(f"{key} names {len(given)} layers of {layers}")
    return [maybe({key: one}, key) or 0 for one in given[:layers]]


def _kv_heads(name: str, own: Mapping[str, Any], layers: int, heads: list[int]) -> list[int]:
    """Key/value heads of each layer; 0 = it has no attention, but a state."""
    if own.get("attention.head_count_kv") is None:
        found = heads
    else:
        found = _each(own, "attention.head_count_kv", layers, 0)
    interval = maybe(own, "full_attention_interval")
    interval = interval or (_DEFAULT_INTERVAL if name == "qwen3next" else None)
    if interval:
        found = [0 if (index + 1) % interval else number for index, number in enumerate(found)]
    return found


def _caches(name: str, own: Mapping[str, Any], kv_heads: list[int], heads: int) -> list[Cache]:
    if not any(kv_heads):
        return []
    size = _size(own, heads)
    window = maybe(own, "attention.sliding_window")
    slides = _slides(name, own, len(kv_heads)) if window else [False] * len(kv_heads)
    small = maybe(own, "attention.key_length_swa")
    narrow = small + (maybe(own, "attention.value_length_swa") or small) if small else size
    kinds = [(count, bool(slide)) for count, slide in zip(kv_heads, slides, strict=True) if count]
    return [
        Cache(kinds.count(kind), kind[0], narrow if kind[1] else size, window if kind[1] else None)
        for kind in dict.fromkeys(kinds)
    ]


def _size(own: Mapping[str, Any], heads: int) -> int:
    """Elements per token and head. Of a latent (MLA) both parts: llama.cpp kept both at first."""
    key = maybe(own, "attention.key_length")
    if not key:
        if not heads:
            raise UnknownError("attention.head_count isn't given")
        key = whole(own, "embedding_length") // heads
    return key + (maybe(own, "attention.value_length") or key)


def _slides(name: str, own: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers keep their window alone; where that isn't known, none: too much rather than too little."""
    pattern = own.get("attention.sliding_window_pattern", _PATTERNS.get(name))
    if isinstance(pattern, list) and len(pattern) >= layers:
        return [bool(one) for one in pattern[:layers]]
    if isinstance(pattern, int) and pattern > 0 and not isinstance(pattern, bool):
        return [bool((index + 1) % pattern) for index in range(layers)]
    return [False] * layers


def _state(own: Mapping[str, Any]) -> int:
    """Elements of one layer's state and of its convolution's last inputs, per sequence."""
    inner, size = maybe(own, "ssm.inner_size") or 0, maybe(own, "ssm.state_size") or 0
    groups = maybe(own, "ssm.group_count") or 0
    kernel = maybe(own, "ssm.conv_kernel", "shortconv.l_cache") or 1
    width = inner or (maybe(own, "embedding_length") or 0)
    return inner * size + (width + 2 * groups * size) * (kernel - 1)
