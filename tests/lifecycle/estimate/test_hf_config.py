"""Shapes from `config.json`, against hand-reckoned bytes of KV cache per token."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lifecycle.estimate import published as p
from tidegate_lifecycle.estimate.amounts import cache_per_token
from tidegate_lifecycle.estimate.hf_config import shape
from tidegate_lifecycle.estimate.shape import UnknownError

# layers with full attention × key/value heads × (key + value) × 2 bytes
PER_TOKEN = [
    (p.LLAMA_3_8B, 32 * 8 * 256 * 2, 131_072, 8192),
    (p.LLAMA_31_8B, 32 * 8 * 256 * 2, 131_072, 131_072),
    (p.QWEN3_8B, 36 * 8 * 256 * 2, 147_456, 40_960),
    (p.QWEN25_7B, 28 * 4 * 256 * 2, 57_344, 32_768),
    (p.GEMMA_3_27B, 10 * 16 * 256 * 2, 81_920, 131_072),  # each 6th of 62 layers
    (p.GEMMA_3_4B, 5 * 4 * 512 * 2, 20_480, 131_072),  # each 6th of 34 layers
    (p.QWEN3_NEXT_80B, 12 * 2 * 512 * 2, 24_576, 262_144),  # each 4th of 48 layers
    (p.DEEPSEEK_V2_LITE, 27 * (512 + 64) * 2, 31_104, 163_840),  # one latent, not keys and values
    (p.MIXTRAL_8X7B, 32 * 8 * 256 * 2, 131_072, 32_768),
    (p.PHI_4, 40 * 10 * 256 * 2, 204_800, 16_384),
    (p.PHI_3_MINI_4K, 0, 0, 4096),  # all of it slides
    (p.GPT_OSS_20B, 12 * 8 * 128 * 2, 24_576, 131_072),
    (p.MAMBA_2_8B, 0, 0, 2048),
    (p.JAMBA_MINI, 4 * 8 * 256 * 2, 16_384, 262_144),
    (p.NEMOTRON_H_8B, 4 * 8 * 256 * 2, 16_384, 8192),
    (p.BGE_M3, 0, 0, 8194),
    (p.WHISPER_LARGE_V3, 32 * 20 * 128 * 2, 163_840, 448),
]


@pytest.mark.parametrize(("config", "by_hand", "bytes_", "length"), PER_TOKEN)
def test_kv_cache_per_token_and_native_length(
    config: p.Config, by_hand: int, bytes_: int, length: int
) -> None:
    """As reckoned by hand from what is published."""
    made = shape(config, 1000)
    assert cache_per_token(made) == by_hand == bytes_
    assert made.native_length == length


@pytest.mark.parametrize(
    ("config", "layers", "window", "elements"),
    [
        (p.GEMMA_3_27B, 52, 1024, 52 * 16 * 256),
        (p.GEMMA_3_4B, 29, 1024, 29 * 4 * 512),
        (p.PHI_3_MINI_4K, 32, 2047, 32 * 32 * 192),
        (p.GPT_OSS_20B, 12, 128, 12 * 8 * 128),
    ],
)
def test_sliding_layers_hold_their_window(config: p.Config, layers: int, window: int, elements: int) -> None:
    """The rest of the layers, with the window that the file names."""
    [sliding] = [cache for cache in shape(config, 1).caches if cache.window]
    assert (sliding.layers, sliding.window, sliding.elements()) == (layers, window, elements)


@pytest.mark.parametrize(
    ("config", "state"),
    [
        # 36 layers × (32 heads × 128 × 128 + 3 × (2 × 16 × 128 + 32 × 128)) × 4 bytes
        (p.QWEN3_NEXT_80B, 36 * (32 * 128 * 128 + 3 * 8192) * 4),
        (p.MAMBA_2_8B, 64 * 5120 * (16 + 3) * 4),
        (p.JAMBA_MINI, 28 * 8192 * (16 + 3) * 4),
        # 24 layers × (128 heads × 64 × 128 + 3 × (8192 + 2 × 8 × 128)) × 4 bytes
        (p.NEMOTRON_H_8B, 24 * (8192 * 128 + 3 * (8192 + 2048)) * 4),
        (p.WHISPER_LARGE_V3, 32 * 20 * 128 * 1500 * 2),  # the encoder's output, as keys and values
        (p.LLAMA_3_8B, 0),
    ],
)
def test_what_each_sequence_keeps_whatever_its_length(config: p.Config, state: int) -> None:
    """States of linear attention, Mamba and Mamba 2."""
    assert shape(config, 1).state == state


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        (p.LLAMA_3_8B, [1, 2, 4, 8, 16, 32]),
        (p.QWEN25_7B, [1, 2, 4]),
        (p.GEMMA_3_27B, [1, 2, 4, 8, 16, 32]),
        (p.PHI_4, [1, 2, 5, 10, 20, 40]),
        (p.QWEN3_NEXT_80B, [1, 2, 4, 8, 16]),
        (p.BGE_M3, [1, 2, 4, 8, 16]),
    ],
)
def test_over_how_many_cards_it_can_be_spread(config: p.Config, counts: list[int]) -> None:
    """They divide the attention heads and the widths, and divide the key/value heads or are a multiple."""
    made = shape(config, 1)
    assert [cards for cards in range(1, 65) if made.divides(cards)] == counts


def test_float32_weights_are_loaded_as_two_bytes_unless_asked_otherwise() -> None:
    """vLLM's `auto`; quantized weights stay what they are."""
    assert shape(p.BGE_M3, 1000).weights == 500
    assert shape(p.BGE_M3, 1000, dtype="float32").weights == 1000
    assert shape(p.LLAMA_3_8B, 1000).weights == 1000
    assert shape(p.LLAMA_3_8B, 1000, dtype="float32").weights == 2000
    assert shape(p.LLAMA_3_8B, 1000, dtype="float32").element == 4
    assert shape(p.GPT_OSS_20B, 1000, dtype="float32").weights == 1000
    assert shape({**p.LLAMA_3_8B, "torch_dtype": None}, 1000, stored=4).weights == 500


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 32_768),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, 16_384),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}},
            32_768,
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 8192),
        (
            {"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096}
            | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            4096,
        ),
        ({"model_max_length": 500_000}, 500_000),
        ({"seq_length": 1024}, 1024),
    ],
)
def test_native_length_follows_the_rope_scaling(change: p.Config, length: int) -> None:
    """As vLLM derives it."""
    assert shape({**p.LLAMA_3_8B, **change}, 1).native_length == length


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": None, "model_type": "other"}, "num_hidden_layers isn't given"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is no number"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers make no sense"),
        ({"num_key_value_heads": -1}, "num_key_value_heads = -1 makes no sense"),
        ({"num_key_value_heads": float("nan")}, "num_key_value_heads is no number"),
        ({"hidden_size": 4097}, "hidden_size 4097 isn't a multiple of the 32 attention heads"),
        ({"layer_types": ["full_attention", "telepathy"]}, "what 'telepathy' among layer_types means"),
        ({"layer_types": ["sliding_attention"]}, "names sliding-window layers and no window"),
        ({"layer_types": ["linear_attention"]}, "what its layers without attention keep isn't known"),
        ({"block_configs": [{}]}, "what block_configs in config.json means for memory isn't known"),
        ({"hybrid_override_pattern": "M?"}, "letters that aren't known"),
        ({"is_encoder_decoder": True, "model_type": "t5"}, "encoder-decoder models of type t5 aren't known"),
        ({"model_type": "rwkv"}, "models of type rwkv aren't known"),
    ],
)
def test_what_isnt_understood_is_never_guessed(change: dict[str, Any], words: str) -> None:
    """It is said instead."""
    with pytest.raises(UnknownError, match=words.replace("?", r"\?")):
        shape({**p.LLAMA_3_8B, **change}, 1)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = sorted(
    {key for config, *_ in PER_TOKEN for key in config} | {"layer_types", "block_types", "rope_parameters"}
)


@given(st.sampled_from([config for config, *_ in PER_TOKEN]), st.sampled_from(KEYS), values)
def test_whatever_a_file_says_it_is_a_shape_or_a_reason(config: p.Config, key: str, value: Any) -> None:
    """Files are others' work; one odd value must not be a fault here."""
    for changed in ({**config, key: value}, {"text_config": {**config, key: value}, "model_type": "llava"}):
        with contextlib.suppress(UnknownError):
            made = shape(changed, 1000)
            assert made.weights >= 0
            assert made.state >= 0
            assert made.native_length is None or made.native_length > 0
            assert made.divides(1)
            assert all(cache.layers > 0 and cache.elements() >= 0 for cache in made.caches)


def test_a_dtype_that_isnt_known() -> None:
    """vLLM wouldn't know it either."""
    with pytest.raises(UnknownError, match="the dtype int3 isn't known"):
        shape(p.LLAMA_3_8B, 1, dtype="int3")


def test_other_kinds_of_layers() -> None:
    """Windows by the letters of a pattern, from a certain layer on, and layers that share their cache."""
    of = {**p.LLAMA_3_8B, "sliding_window": 4096}
    exaone = shape({**of, "sliding_window_pattern": "LLLG", "model_type": "exaone4"}, 1)
    assert [cache.layers for cache in exaone.caches] == [8, 24]
    late = shape({**of, "use_sliding_window": True, "max_window_layers": 20, "model_type": "qwen2"}, 1)
    assert [cache.layers for cache in late.caches] == [20, 12]
    assert [cache.window for cache in shape({**of, "model_type": "mistral"}, 1).caches] == [4096]
    assert [cache.window for cache in shape({**of, "model_type": "other"}, 1).caches] == [None]
    shared = shape({**p.LLAMA_3_8B, "num_kv_shared_layers": 12}, 1)
    assert [cache.layers for cache in shared.caches] == [20]
    minicpm = shape({**p.DEEPSEEK_V2_LITE, "model_type": "minicpm3"}, 1)
    assert cache_per_token(minicpm) == 27 * 16 * 2 * 192 * 2
    falcon = shape({**p.LLAMA_3_8B, "model_type": "falcon", "multi_query": True}, 1)
    assert cache_per_token(falcon) == 32 * 1 * 256 * 2
