"""Which layers of a model keep what, by `config.json`. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tidegate_lifecycle.estimate.hf_kinds import FULL, STATE, WINDOW, kinds
from tidegate_lifecycle.estimate.hf_state import state_elements
from tidegate_lifecycle.estimate.shape import Cache, Shape, UnknownError
from tidegate_lifecycle.estimate.values import maybe, whole, words

Config = Mapping[str, Any]

_LATENT = words(
    """axk1 deepseek_v2 deepseek_v3 deepseek_v32 deepseek_mtp glm4_moe_lite glm_moe_dsa kimi_k2 kimi_linear
    longcat_flash pangu_ultra_moe"""
)
"""Those whose keys and values vLLM keeps as one latent (MLA)."""
_STRANGE = ("block_configs", "hybrid_layer_pattern", "compress_ratios", "mamba_layers", "swa_head_dim")
"""Keys that make layers differ in ways that aren't reckoned here."""
_STATE_BYTES = 4
"""States are kept as float32 at most."""


def decoder(text: Config, model_type: str) -> Shape:
    """A decoder: attention, linear attention, state-space layers, in any mixture."""
    strange = next((key for key in _STRANGE if text.get(key)), None)
    if strange is not None:
        raise UnknownError(f"what {strange} in config.json means for memory isn't known")
    if model_type in ("rwkv", "rwkv6", "zamba", "zamba2", "recurrent_gemma"):
        raise UnknownError(f"models of type {model_type} aren't known")
    of = kinds(text, model_type)
    number = of.count
    caches = [cache for cache in _caches(text, model_type, of) if cache.layers]
    state = number(STATE) * state_elements(text) * _STATE_BYTES if number(STATE) else 0
    return Shape(
        caches=tuple(caches),
        state=state,
        layers=len(of),
        vocabulary=maybe(text, "vocab_size") or 0,
        parts=_parts(text),
        kv_heads=max((cache.heads for cache in caches if cache.divided), default=1),
    )


def encoder(text: Config) -> Shape:
    """An encoder keeps nothing between requests."""
    layers = maybe(text, "num_hidden_layers", "n_layers", "n_layer") or 1
    return Shape(layers=layers, parts=_parts(text))


def speech(text: Config, model_type: str) -> Shape:
    """Whisper: its decoder keeps its own tokens, and those of the encoder."""
    if model_type != "whisper":
        raise UnknownError(f"encoder-decoder models of type {model_type or 'unknown'} aren't known")
    layers, heads = whole(text, "decoder_layers"), whole(text, "decoder_attention_heads")
    size = 2 * (whole(text, "d_model") // heads)
    across = 2 * layers * heads * size * whole(text, "max_source_positions")
    return Shape(
        caches=(Cache(layers, heads, size),), state=across, layers=layers, parts=heads, kv_heads=heads
    )


def _caches(text: Config, model_type: str, of: list[str]) -> list[Cache]:
    full, window = of.count(FULL), of.count(WINDOW)
    if not full + window:
        return []
    length = maybe(text, "sliding_window", "sliding_window_size", "local_attention_window")
    if window and not length:
        raise UnknownError("config.json names sliding-window layers and no window")
    rank = maybe(text, "kv_lora_rank")
    if rank and model_type in _LATENT:
        latent = rank + whole(text, "qk_rope_head_dim") + (maybe(text, "index_head_dim") or 0)
        return [Cache(full, 1, latent, divided=False), Cache(window, 1, latent, length, divided=False)]
    heads, size = _heads(text), _size(text)
    if rank:  # an attention of this kind that vLLM keeps unfolded: all heads, and values as wide as keys
        heads = whole(text, "num_attention_heads")
        size = 2 * (whole(text, "qk_nope_head_dim") + whole(text, "qk_rope_head_dim"))
    wide = maybe(text, "global_head_dim")  # Gemma 4: its full-attention layers differ
    few = maybe(text, "num_global_key_value_heads") if text.get("attention_k_eq_v") else None
    return [Cache(full, few or heads, 2 * wide if wide else size), Cache(window, heads, size, length)]


def _heads(text: Config) -> int:
    """Key/value heads, under all the names that families of models have for them."""
    inner = text.get("attn_config")
    given = [maybe(inner, "kv_n_heads")] if isinstance(inner, Mapping) else []
    given.append(maybe(text, "num_key_value_heads", "n_head_kv", "num_kv_heads", "n_kv_heads"))
    if text.get("multi_query_attention"):
        given.append(maybe(text, "multi_query_group_num"))
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        return 1
    return next((one for one in given if one), None) or _queries(text)


def _queries(text: Config) -> int:
    return whole(text, "num_attention_heads", "n_head", "n_heads", "num_heads")


def _size(text: Config) -> int:
    """Elements per token and head, keys and values."""
    head = maybe(text, "head_dim", "attention_head_dim", "kv_channels")
    if not head:
        hidden, queries = whole(text, "hidden_size", "n_embd", "d_model"), _queries(text)
        if hidden % queries:
            raise UnknownError(f"hidden_size {hidden} isn't a multiple of the {queries} attention heads")
        head = hidden // queries
    return head + (maybe(text, "v_head_dim") or head)


def _parts(text: Config) -> int:
    """What a number of cards has to divide."""
    names = (
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "mamba_n_heads"),
        ("intermediate_size", "ffn_dim", "n_inner"),
        ("moe_intermediate_size",),
        ("linear_num_key_heads",),
        ("linear_num_value_heads",),
    )
    return math.gcd(*(maybe(text, *one) or 0 for one in names)) or 1
