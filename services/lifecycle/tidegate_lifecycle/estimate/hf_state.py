"""What a layer without attention keeps of each sequence, by `config.json`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate_lifecycle.estimate.shape import UnknownError
from tidegate_lifecycle.estimate.values import maybe, whole


def state_elements(text: Mapping[str, Any]) -> int:
    """Elements of one layer and one sequence: the state, and the last inputs of the convolution.

    1. Gated delta rule (Qwen3-Next). 2. Kimi's delta attention. 3. Mamba 2: heads × their width × state.
    4. Mamba: inner width × state. 5. Short convolutions (LFM2). 6. Lightning attention (MiniMax).
    """
    value_heads = maybe(text, "linear_num_value_heads")
    if value_heads:  # 1
        keys = whole(text, "linear_num_key_heads") * whole(text, "linear_key_head_dim")
        values = value_heads * whole(text, "linear_value_head_dim")
        conv = (2 * keys + values) * (whole(text, "linear_conv_kernel_dim", default=4) - 1)
        return values * whole(text, "linear_key_head_dim") + conv
    linear = text.get("linear_attn_config")
    if isinstance(linear, Mapping):  # 2
        heads, width = whole(linear, "num_heads"), whole(linear, "head_dim")
        return heads * width * (width + 3 * (whole(linear, "short_conv_kernel_size", default=4) - 1))
    size = maybe(text, "mamba_d_state", "ssm_state_size", "state_size")
    kernel = maybe(text, "mamba_d_conv", "conv_kernel", "d_conv") or 4
    inner = _inner(text)
    if size and inner and _heads(text):  # 3
        groups = maybe(text, "mamba_n_groups", "n_groups") or 1
        return inner * size + (inner + 2 * groups * size) * (kernel - 1)
    if size and inner:  # 4
        return inner * (size + kernel - 1)
    cached = maybe(text, "conv_L_cache")
    if cached:  # 5
        return whole(text, "hidden_size") * cached
    if text.get("attn_type_list") or text.get("linear_attn_alpha_factor"):  # 6
        heads = whole(text, "num_attention_heads")
        return heads * (maybe(text, "head_dim") or whole(text, "hidden_size") // heads) ** 2
    raise UnknownError("what its layers without attention keep isn't known")


def _heads(text: Mapping[str, Any]) -> int:
    """Heads of Mamba 2; 0 = it is Mamba, or none."""
    return maybe(text, "mamba_n_heads", "mamba_num_heads") or (
        (maybe(text, "num_heads") or 0) if text.get("model_type") == "mamba2" else 0
    )


def _inner(text: Mapping[str, Any]) -> int:
    heads = _heads(text)
    width = text.get("mamba_d_head") or text.get("mamba_head_dim") or text.get("head_dim")
    if heads and isinstance(width, int):
        return heads * width
    given = maybe(text, "mamba_d_ssm")
    if text.get("model_type") in ("mamba", "falcon_mamba"):
        given = maybe(text, "intermediate_size", "d_inner")
    return given or (maybe(text, "mamba_expand", "expand") or 2) * (
        maybe(text, "hidden_size", "d_model") or 0
    )
