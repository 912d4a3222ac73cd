"""What each layer of a model is, by `config.json`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate_lifecycle.estimate.shape import UnknownError
from tidegate_lifecycle.estimate.values import maybe, whole

FULL, WINDOW, STATE, NONE = "full", "window", "state", "none"

_WORDS = {
    FULL: "full_attention attention full global global_attention chunked_attention",
    WINDOW: "sliding_attention sliding sliding_window sliding_window_attention local local_attention",
    STATE: "linear_attention linear mamba mamba1 mamba2 ssm conv short_conv shortconv recurrent kda",
    NONE: "mlp moe identity",
}
"""Chunked attention is reckoned as full: vLLM keeps all of it unless told otherwise."""
_KINDS = {word: kind for kind, words in _WORDS.items() for word in words.split()}
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2, "exaone4": 4}
"""Each so-manieth layer has full attention, where config.json doesn't say it."""
_ALL_WINDOW = frozenset({"mistral", "mixtral", "phi3", "starcoder2"})
"""Those that slide in every layer when a window is given."""
_PURE_STATE = frozenset({"mamba", "mamba2", "falcon_mamba"})
_PARALLEL = frozenset({"falcon_h1"})
"""Each layer has attention and a state."""


def kinds(text: Mapping[str, Any], model_type: str) -> list[str]:
    """One word for each thing that a layer keeps; a layer that keeps two has two.

    1. Layers named one by one. 2. Lists, intervals and patterns of hybrid models. 3. Sliding windows by
    pattern. 4. Full attention everywhere: where it isn't known which layers slide, none does, and the
    need comes out too large rather than too small.
    """
    layers = whole(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    if layers > 10_000:
        raise UnknownError(f"{layers} layers make no sense")
    if model_type in _PURE_STATE:
        return [STATE] * layers
    if model_type in _PARALLEL:
        return [FULL, STATE] * layers
    found = _named(text) or _hybrid(text, layers) or _sliding(text, model_type, layers)
    shared = maybe(text, "num_kv_shared_layers") or 0
    return found[: len(found) - shared] if 0 < shared < len(found) else found


def _named(text: Mapping[str, Any]) -> list[str]:  # 1
    for key in ("layer_types", "layers_block_type", "block_types"):
        words = text.get(key)
        if not isinstance(words, list) or not words:
            continue
        named = [_KINDS.get(str(word)) for word in words]
        if None in named:
            unknown = str(words[named.index(None)])[:40]
            raise UnknownError(f"what {unknown!r} among {key} means for memory isn't known")
        return [kind for kind in named if kind]
    letters = text.get("hybrid_override_pattern")
    if isinstance(letters, str) and letters:
        by = {"*": FULL, "M": STATE, "-": NONE, "E": NONE}
        if set(letters) - set(by):
            raise UnknownError("hybrid_override_pattern has letters that aren't known")
        return [by[letter] for letter in letters]
    return []


def _hybrid(text: Mapping[str, Any], layers: int) -> list[str]:  # 2
    period = maybe(text, "attn_layer_period")
    if period:
        offset = maybe(text, "attn_layer_offset") or 0
        return [FULL if index % period == offset else STATE for index in range(layers)]
    interval = maybe(text, "full_attention_interval")
    if interval:
        return [STATE if (index + 1) % interval else FULL for index in range(layers)]
    listed = next((text[key] for key in ("attn_layer_indices", "full_attn_idxs") if text.get(key)), None)
    if isinstance(listed, list):
        return [FULL if index in listed else STATE for index in range(layers)]
    types = text.get("attn_type_list")
    if isinstance(types, list) and types:
        return [FULL if kind == 1 else STATE for kind in types]
    linear = text.get("linear_attn_config")
    if isinstance(linear, Mapping) and isinstance(linear.get("full_attn_layers"), list):
        return [FULL if index + 1 in linear["full_attn_layers"] else STATE for index in range(layers)]
    return []


def _sliding(text: Mapping[str, Any], model_type: str, layers: int) -> list[str]:  # 3
    window = text.get("sliding_window")
    if not window or text.get("use_sliding_window") is False:
        return [FULL] * layers
    if text.get("use_sliding_window"):
        first = maybe(text, "max_window_layers") or 0
        return [WINDOW if index >= first else FULL for index in range(layers)]
    given = (text.get(key) for key in ("sliding_window_pattern", "_sliding_window_pattern"))
    pattern = next((one for one in given if one), _PATTERNS.get(model_type))
    if isinstance(pattern, str) and pattern and not set(pattern) - {"L", "G"}:
        letters = [pattern[index % len(pattern)] for index in range(layers - 1)]
        return [WINDOW if letter == "L" else FULL for letter in letters] + [FULL]
    if isinstance(pattern, int) and pattern > 0:
        return [WINDOW if (index + 1) % pattern else FULL for index in range(layers)]
    return [WINDOW if model_type in _ALL_WINDOW else FULL] * layers  # 4
