"""Headers of GGUF files, and the shapes that they tell."""

from __future__ import annotations

import contextlib
import io
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.gguf import header
from tidegate_lifecycle.estimate.amounts import cache_per_token
from tidegate_lifecycle.estimate.gguf import TruncatedError, read_header
from tidegate_lifecycle.estimate.gguf_shape import shape
from tidegate_lifecycle.estimate.shape import UnknownError

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 32,
    "llama.context_length": 131_072,
    "llama.embedding_length": 4096,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
}
GEMMA3 = {
    "general.architecture": "gemma3",
    "gemma3.block_count": 62,
    "gemma3.context_length": 131_072,
    "gemma3.attention.head_count": 32,
    "gemma3.attention.head_count_kv": 16,
    "gemma3.attention.key_length": 128,
    "gemma3.attention.value_length": 128,
    "gemma3.attention.sliding_window": 1024,
}
QWEN3_NEXT = {
    "general.architecture": "qwen3next",
    "qwen3next.block_count": 48,
    "qwen3next.context_length": 262_144,
    "qwen3next.attention.head_count": 16,
    "qwen3next.attention.head_count_kv": 2,
    "qwen3next.attention.key_length": 256,
    "qwen3next.attention.value_length": 256,
    "qwen3next.ssm.conv_kernel": 4,
    "qwen3next.ssm.state_size": 128,
    "qwen3next.ssm.group_count": 16,
    "qwen3next.ssm.inner_size": 4096,
}
LFM2 = {
    "general.architecture": "lfm2",
    "lfm2.block_count": 4,
    "lfm2.context_length": 32_768,
    "lfm2.embedding_length": 2048,
    "lfm2.attention.head_count": 32,
    "lfm2.attention.head_count_kv": [0, 0, 8, 0],
    "lfm2.shortconv.l_cache": 3,
}
MAMBA = {
    "general.architecture": "mamba",
    "mamba.block_count": 64,
    "mamba.context_length": 1_048_576,
    "mamba.embedding_length": 2560,
    "mamba.attention.head_count": 0,
    "mamba.ssm.conv_kernel": 4,
    "mamba.ssm.inner_size": 5120,
    "mamba.ssm.state_size": 16,
}
BERT = {
    "general.architecture": "bert",
    "bert.block_count": 24,
    "bert.context_length": 8192,
    "bert.embedding_length": 1024,
    "bert.attention.head_count": 16,
    "bert.attention.causal": False,
}


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_is_read_with_all_its_types(version: int) -> None:
    """Numbers, texts and lists of numbers are kept, vocabularies are passed over."""
    values: dict[str, Any] = {
        **LLAMA,
        "general.name": "Llama é",
        "llama.rope.freq_base": 500_000.5,
        "llama.flags": [True, False],
        "llama.per_layer": [1, 2, 3],
        "general.tags": ["a", "b"],
        "llama.long": list(range(5000)),
    }
    found = read_header(io.BytesIO(header(values, version)).read)
    del values["general.tags"], values["llama.long"]
    assert found == values


def test_the_vocabulary_ends_the_reading() -> None:
    """It comes after all that matters and is long; the file may be cut there."""
    whole = header({**LLAMA, "tokenizer.ggml.tokens": ["x" * 100] * 10_000})
    assert read_header(io.BytesIO(whole[: len(header(LLAMA)) + 60]).read) == LLAMA


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends within its header"),
        (b"PK\3\4" + bytes(60), "no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 isn't known"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648 isn't known"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**40), "damaged: 1099511627776 keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "damaged: it has no end"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "damaged: type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "damaged: a list of lists"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 10, 2**60), "damaged: it has no end"),
    ],
)
def test_a_damaged_header_is_refused_with_its_reason(data: bytes, words: str) -> None:
    """And never costs memory or time without bound."""
    with pytest.raises(UnknownError, match=words):
        read_header(io.BytesIO(data).read)


@given(st.integers(0, len(header(LLAMA)) - 1))
def test_a_header_that_is_cut_anywhere_says_so(end: int) -> None:
    """So that more of it can be fetched."""
    with pytest.raises(TruncatedError):
        read_header(io.BytesIO(header(LLAMA)[:end]).read)


@given(st.binary(max_size=300))
def test_rubbish_is_refused_and_nothing_else_happens(rubbish: bytes) -> None:
    """Whatever comes after the first bytes."""
    with contextlib.suppress(UnknownError):
        read_header(io.BytesIO(b"GGUF" + struct.pack("<IQQ", 3, 0, 5) + rubbish).read)


@pytest.mark.parametrize(
    ("values", "per_token", "length"),
    [
        (LLAMA, 32 * 8 * 256 * 2, 131_072),
        (GEMMA3, 10 * 16 * 256 * 2, 131_072),
        (QWEN3_NEXT, 12 * 2 * 512 * 2, 262_144),
        (LFM2, 1 * 8 * 128 * 2, 32_768),
        (MAMBA, 0, 1_048_576),
        (BERT, 0, 8192),
    ],
)
def test_kv_cache_per_token(values: dict[str, Any], per_token: int, length: int) -> None:
    """The same numbers as from the published config.json."""
    made = shape(values, 1000)
    assert cache_per_token(made) == per_token
    assert (made.native_length, made.weights) == (length, 1000)


@pytest.mark.parametrize(
    ("values", "state"),
    [
        (QWEN3_NEXT, 36 * (4096 * 128 + (4096 + 2 * 16 * 128) * 3) * 4),
        (MAMBA, 64 * 5120 * (16 + 3) * 4),
        (LFM2, 3 * 2048 * 2 * 4),
        (LLAMA, 0),
        (BERT, 0),
    ],
)
def test_what_each_sequence_keeps_whatever_its_length(values: dict[str, Any], state: int) -> None:
    """States of layers without attention."""
    assert shape(values, 1).state == state


def test_sliding_windows_by_architecture_by_list_and_not_at_all() -> None:
    """Where it isn't known which layers slide, none does: too much rather than too little."""
    assert [(cache.layers, cache.window) for cache in shape(GEMMA3, 1).caches] == [(52, 1024), (10, None)]
    listed = {**LLAMA, "llama.attention.sliding_window": 512, "llama.block_count": 2}
    listed["llama.attention.sliding_window_pattern"] = [True, False]
    assert [cache.window for cache in shape(listed, 1).caches] == [512, None]
    unknown = {**LLAMA, "llama.attention.sliding_window": 512}
    assert [cache.window for cache in shape(unknown, 1).caches] == [None]
    narrow = {**listed, "llama.attention.key_length_swa": 64}
    assert [cache.size for cache in shape(narrow, 1).caches] == [128, 256]


@given(
    st.sampled_from([LLAMA, GEMMA3, QWEN3_NEXT, LFM2, MAMBA, BERT]),
    st.integers(0, 20),
    st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=70),
)
def test_whatever_a_header_says_it_is_a_shape_or_a_reason(
    values: dict[str, Any], which: int, value: Any
) -> None:
    """Files are others' work; one odd value must not be a fault here."""
    key = list(values)[which % len(values)]
    with contextlib.suppress(UnknownError):
        made = shape({**values, key: value}, 1000)
        assert made.state >= 0
        assert made.divides(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": 7}, "doesn't name its architecture"),
        ({"general.architecture": "t5"}, "architecture t5 isn't known"),
        ({"general.architecture": "rwkv7"}, "architecture rwkv7 isn't known"),
        ({"llama.block_count": 0}, "block_count isn't given"),
        ({"llama.block_count": 10**6}, "1000000 layers make no sense"),
        ({"llama.attention.head_count_kv": [8, 8]}, "head_count_kv names 2 layers of 32"),
        ({"llama.embedding_length": None}, "embedding_length isn't given"),
    ],
)
def test_what_isnt_understood_is_never_guessed(change: dict[str, Any], words: str) -> None:
    """It is said instead."""
    with pytest.raises(UnknownError, match=words):
        shape({**LLAMA, **change}, 1)
