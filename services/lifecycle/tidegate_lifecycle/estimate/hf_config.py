"""A model's shape from its `config.json`, as the hub and vLLM name things there. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tidegate_lifecycle.estimate.hf_layers import decoder, encoder, speech
from tidegate_lifecycle.estimate.hf_length import native_length
from tidegate_lifecycle.estimate.shape import Shape, UnknownError
from tidegate_lifecycle.estimate.values import words

_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
_ENCODERS = words(
    """albert bert camembert clip clip_text_model deberta deberta-v2 distilbert electra gte modernbert mpnet
    new nomic_bert roberta siglip siglip_text_model xlm-roberta xlm-roberta-xl"""
)
_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma3_text": {
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_size": 2304,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
        "vocab_size": 262_208,
    },
    "llama": {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_size": 4096,
        "max_position_embeddings": 2048,
        "vocab_size": 32_000,
    },
    "mistral": {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_size": 4096,
        "max_position_embeddings": 131_072,
        "vocab_size": 32_000,
    },
}
"""What transformers assumes, and what nested configurations of multimodal models therefore leave out."""
_BYTES = {"float64": 8, "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


def shape(
    config: Mapping[str, Any], weights: int, dtype: str = "auto", quantization: str = "", stored: int = 0
) -> Shape:
    """What `config.json` tells of a model whose weights are so many bytes as they lie on the disk.

    `dtype` and `quantization` are the model's settings; `stored`: bytes of an element of the weights by the
    files themselves, 0 = not known. UnknownError when the file doesn't say enough, or says strange things.
    """
    text = _text(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "")
    text = {**_DEFAULTS.get(model_type, {}), **text}
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        made = speech(text, model_type)
    elif model_type in _ENCODERS:
        made = encoder(text)
    else:
        made = decoder(text, model_type)
    stored, used = _elements(config, text, dtype, stored)
    quantized = any(
        part.get(key) for part in (config, text) for key in ("quantization_config", "compression_config")
    )
    if not quantized and not quantization:
        weights = weights * used // stored
    return dataclasses.replace(
        made, weights=weights, native_length=native_length(text, model_type), element=min(used, 4)
    )


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model; in multimodal ones it is nested."""
    inner = next((config[key] for key in _NESTED if isinstance(config.get(key), Mapping)), None)
    return config if inner is None else _text(inner)


def _elements(config: Mapping[str, Any], text: Mapping[str, Any], dtype: str, stored: int) -> tuple[int, int]:
    """Bytes of an element as it is stored, and as vLLM loads it: `auto` makes two of float32's four."""
    told = [part.get(key) for part in (text, config) for key in ("dtype", "torch_dtype")]
    name = next((str(one).removeprefix("torch.") for one in told if one), "")
    stored = stored or _BYTES.get(name, 2)
    if dtype == "auto":
        return stored, min(stored, 2)
    if dtype not in _BYTES:
        raise UnknownError(f"the dtype {dtype} isn't known")
    return stored, _BYTES[dtype]
