"""From shapes and settings to what a server needs of each card."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lifecycle.estimate import published as p
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.estimate.amounts import estimate
from tidegate_lifecycle.estimate.hf_config import shape as from_config
from tidegate_lifecycle.estimate.reservation import reserved_seqs
from tidegate_lifecycle.estimate.shape import Cache, Shape
from tidegate_lifecycle.needs import need_of

GIB = 2**30
KIB = 2**10
CHAT = Model("chat", engine="vllm", source="org/chat")


def model(**keys: object) -> Model:
    return dataclasses.replace(CHAT, **keys)  # type: ignore[arg-type]


def mib(weights: float, cache: float, sampling: int = 0) -> int:
    """The formula; what sampling takes beyond half a GiB is added."""
    return math.ceil(((weights + cache) * 1.1 + GIB + max(0, sampling - GIB // 2)) / 2**20)


def test_qwen3_8b_by_hand() -> None:
    """16 sequences of 8,192 tokens, 144 KiB each: 18 GiB beside 15.3 GiB of weights."""
    found = estimate(from_config(p.QWEN3_8B, p.QWEN3_8B_BYTES), model(max_model_len=8192, max_num_seqs=16))
    assert found.mib[1] == mib(p.QWEN3_8B_BYTES, 18 * GIB) == 38_485
    assert found.mib[2] == mib(p.QWEN3_8B_BYTES / 2, 9 * GIB)
    assert found.mib[8] == mib(p.QWEN3_8B_BYTES / 8, 18 / 8 * GIB)
    assert found.mib[16] == mib(p.QWEN3_8B_BYTES / 16, 18 / 8 * GIB)  # 8 heads: held twice by then
    assert found.least[1] == mib(p.QWEN3_8B_BYTES, 8192 * 144 * KIB)
    assert found.why == (
        "15.3 GiB weights and 18 GiB KV cache for 16 sequences of 8,192 tokens; divided by the number of "
        "cards, a tenth more, and 1 GiB on each card"
    )


def test_sliding_windows_cost_a_fifth_and_hybrid_layers_a_quarter_of_full_attention() -> None:
    """Gemma 3 and Qwen3-Next at 128 Ki tokens: what counting every layer as full would make of them."""
    settings = model(max_model_len=131_072, max_num_seqs=1, tensor_parallel_size=1)
    gemma = estimate(from_config(p.GEMMA_3_27B, 0), settings)
    windows = 52 * 16 * 256 * 2 * (1024 + 8192)  # a step's tokens beside the window
    assert gemma.mib[1] == mib(0, 131_072 * 81_920 + windows)
    assert 4.5 < (62 * 16 * 256 * 2 * 131_072) / (131_072 * 81_920 + windows) < 5
    hybrid = estimate(from_config(p.QWEN3_NEXT_80B, 0), settings)
    assert hybrid.mib[1] == mib(0, 131_072 * 24_576 + 79_036_416)
    assert 3.8 < (48 * 2 * 512 * 2 * 131_072) / (131_072 * 24_576 + 79_036_416) < 4


def test_a_latent_is_held_whole_by_each_card() -> None:
    """DeepSeek-V2-Lite: weights are divided, 31,104 bytes per token aren't."""
    found = estimate(from_config(p.DEEPSEEK_V2_LITE, 32 * GIB), model(max_model_len=32_768, max_num_seqs=1))
    assert found.mib[1] == mib(32 * GIB, 32_768 * 31_104)
    assert found.mib[4] == mib(8 * GIB, 32_768 * 31_104)


def test_an_encoder_needs_its_weights_alone() -> None:
    """bge-m3 in two bytes: 1.06 GiB."""
    found = estimate(from_config(p.BGE_M3, p.BGE_M3_BYTES), model())
    assert found.mib[1] == found.least[1] == mib(p.BGE_M3_BYTES / 2, 0) == 2216
    assert "1.1 GiB weights and no KV cache" in found.why


def test_a_small_model_with_a_large_vocabulary_needs_room_to_sample() -> None:
    """Qwen3-0.6B: 256 sequences × 151,936 tokens × 28 bytes = 1 GiB, half of which the overhead covers."""
    sampling = 256 * 151_936 * 28
    found = estimate(from_config(p.QWEN3_06B, p.QWEN3_06B_BYTES), model(max_model_len=4096))
    assert found.least[1] == mib(p.QWEN3_06B_BYTES, 4096 * 112 * KIB, sampling)
    assert found.least[1] - mib(p.QWEN3_06B_BYTES, 4096 * 112 * KIB) == 527
    assert found.least[2] == mib(p.QWEN3_06B_BYTES / 2, 4096 * 56 * KIB, sampling)
    assert found.why.endswith("a tenth more, and 1.5 GiB on each card")
    few = estimate(from_config(p.QWEN3_06B, p.QWEN3_06B_BYTES), model(max_model_len=4096, max_num_seqs=8))
    assert few.least[1] == mib(p.QWEN3_06B_BYTES, 4096 * 112 * KIB)
    many = estimate(
        from_config(p.QWEN3_06B, p.QWEN3_06B_BYTES), model(max_model_len=4096, max_concurrent=512)
    )
    assert many.least[1] == mib(p.QWEN3_06B_BYTES, 4096 * 112 * KIB, 2 * sampling)


def test_a_model_without_any_setting_gets_its_own_length_and_no_card_of_its_own() -> None:
    """One sequence of the native maximum, or 32,768 tokens: not the 256 sequences of vLLM's default."""
    qwen = estimate(from_config(p.QWEN3_8B, p.QWEN3_8B_BYTES), model())
    assert qwen.mib == qwen.least
    assert qwen.mib[1] == mib(p.QWEN3_8B_BYTES, 40_960 * 144 * KIB, 256 * 151_936 * 28)
    assert "1 sequence of 40,960 tokens, the model's own maximum" in qwen.why
    llama = estimate(from_config(p.LLAMA_3_8B, p.LLAMA_3_8B_BYTES), model())
    assert llama.mib[1] == mib(p.LLAMA_3_8B_BYTES, 4 * 8192 * 128 * KIB, 256 * 128_256 * 28)
    assert llama.least[1] == mib(p.LLAMA_3_8B_BYTES, 8192 * 128 * KIB, 256 * 128_256 * 28)


@pytest.mark.parametrize(
    ("keys", "seqs"),
    [
        ({}, 4),
        ({"max_num_seqs": 16}, 16),
        ({"max_num_seqs": 16, "kv_reservation_seqs": 3}, 3),
        ({"max_num_seqs": 2, "kv_reservation_seqs": 3}, 2),
        ({"kv_reservation_seqs": 300}, 300),
    ],
)
def test_for_how_many_sequences_cache_is_reserved(keys: dict[str, int], seqs: int) -> None:
    """What the user says, no more than the server works on; else as many as hold 32,768 tokens."""
    assert reserved_seqs(model(**keys), 8192) == seqs


def test_the_reservation_shrinks_to_the_card_before_a_model_is_refused() -> None:
    """256 full-length sequences fit no card; one fits: it gets all of the card's budget."""
    found = estimate(from_config(p.LLAMA_3_8B, p.LLAMA_3_8B_BYTES), model(max_num_seqs=256))
    need = need_of(model(max_num_seqs=256), found)

    class Card:
        kind, total_mib, budget_mib, usable_mib = "", 24_576, 22_528, 22_528

    assert found.mib[1] > 200_000
    assert found.least[1] < need.on(Card(), 1) == 22_528


def test_a_smaller_type_makes_the_cache_smaller() -> None:
    """fp8 halves it; float32 weights have a cache of four bytes."""
    shape = from_config(p.LLAMA_3_8B, 0)
    keys = {"max_model_len": 8192, "max_num_seqs": 8}
    assert estimate(shape, model(**keys)).mib[1] == mib(0, 8 * GIB)
    assert estimate(shape, model(**keys, kv_cache_dtype="fp8")).mib[1] == mib(0, 4 * GIB)
    wide = from_config(p.LLAMA_3_8B, 0, dtype="float32")
    assert estimate(wide, model(**keys)).mib[1] == mib(0, 16 * GIB)


def test_extra_args_that_change_memory_are_reckoned_or_said() -> None:
    """What stays in the host's memory isn't on the card; what isn't known is no guess."""
    shape = from_config(p.LLAMA_3_8B, p.LLAMA_3_8B_BYTES)
    keys = {"max_model_len": 8192, "max_num_seqs": 1}
    offloaded = estimate(shape, model(**keys, extra_args=("--cpu-offload-gb", "10")))
    assert offloaded.mib[1] == mib(p.LLAMA_3_8B_BYTES - 10 * GIB, GIB)
    assert offloaded.mib[2] == mib(0, GIB / 2)
    harmless = estimate(shape, model(**keys, extra_args=("--enable-auto-tool-choice", "--seed=-3")))
    assert harmless == estimate(shape, model(**keys))
    for arguments in (("--enable-lora",), ("--speculative_config", "{}"), ("--speculative-config.model=x",)):
        found = estimate(shape, model(**keys, extra_args=arguments))
        assert not found.mib
        assert "in extra_args costs isn't known; set vram" in found.why
    nonsense = estimate(shape, model(**keys, extra_args=("--cpu-offload-gb", "much")))
    assert nonsense.why == "the value of --cpu-offload-gb in extra_args isn't understood; set vram"
    assert not estimate(shape, model(**keys, kv_cache_dtype="fp3")).mib


def test_a_declared_number_of_cards_is_the_only_one() -> None:
    """Nothing else is of use; whether vLLM can divide it, it says itself."""
    shape = from_config(p.QWEN25_7B, 15 * GIB)
    assert list(estimate(shape, model(tensor_parallel_size=2)).mib) == [2]
    assert list(estimate(shape, model()).mib) == [1, 2, 4]


LLAMA_CPP = {"engine": "llamacpp", "source": "/m.gguf"}


def test_llama_cpp_takes_the_cache_of_all_its_slots_at_once() -> None:
    """A context per slot when one is set, else the model's own, shared; nothing of it shrinks."""
    shape = Shape(5 * GIB, (Cache(32, 8, 256),), native_length=131_072, layers=32, parts=32, kv_heads=8)
    found = estimate(shape, model(**LLAMA_CPP, max_model_len=8192, max_num_seqs=4))
    assert found.mib[1] == found.least[1] == mib(5 * GIB, 4 * GIB)
    assert found.mib[3] == mib(5 * GIB * 11 / 32, 4 * GIB * 11 / 32)  # 11 of 32 layers on the fullest
    shared = estimate(shape, model(**LLAMA_CPP, max_num_seqs=4))
    assert shared.mib[1] == mib(5 * GIB, 16 * GIB)
    small = estimate(shape, model(**LLAMA_CPP, max_model_len=8192, kv_cache_dtype="q8_0"))
    assert small.mib[1] == mib(5 * GIB, GIB * 17 / 32)
    mixed = ("-ctk", "q8_0", "--cache-type-v", "f32")
    assert estimate(shape, model(**LLAMA_CPP, max_model_len=8192, extra_args=mixed)).mib[1] == mib(
        5 * GIB, GIB * (17 / 32 + 2) / 2
    )


def test_llama_cpp_with_layers_in_host_memory() -> None:
    """-ngl 11 of 32 layers and the output: a third of everything; -nkvo: the cache stays away too."""
    shape = Shape(33 * GIB, (Cache(32, 8, 256),), native_length=8192, layers=32, parts=32, kv_heads=8)
    third = estimate(shape, model(**LLAMA_CPP, extra_args=("-ngl", "11")))
    assert third.mib[1] == mib(11 * GIB, GIB / 3)
    assert "33 GiB weights (11 of 33 layers on cards)" in third.why
    assert estimate(shape, model(**LLAMA_CPP, extra_args=("-ngl", "-1"))).mib[1] == mib(33 * GIB, GIB)
    assert estimate(shape, model(**LLAMA_CPP, extra_args=("-nkvo",))).mib[1] == mib(33 * GIB, 0)
    assert not estimate(shape, model(**LLAMA_CPP, extra_args=("--mmproj", "x"))).mib


def test_a_model_that_doesnt_tell_its_length_needs_the_setting() -> None:
    """Said, not guessed."""
    shape = Shape(GIB, (Cache(1, 1, 2),))
    assert (
        estimate(shape, model()).why
        == "the model doesn't tell its longest sequence; set max_model_len; set vram"
    )
    assert estimate(shape, model(max_model_len=10)).mib


shapes = st.builds(
    Shape,
    weights=st.integers(0, 10**12),
    caches=st.lists(
        st.builds(
            Cache,
            layers=st.integers(1, 100),
            heads=st.integers(1, 64),
            size=st.integers(2, 1152),
            window=st.none() | st.integers(1, 10_000),
            divided=st.booleans(),
        ),
        max_size=3,
    ).map(tuple),
    state=st.integers(0, 10**9),
    native_length=st.integers(1, 10**6),
    layers=st.integers(1, 100),
    parts=st.integers(1, 64),
    kv_heads=st.integers(1, 64),
)
models = st.builds(
    Model,
    name=st.just("m"),
    engine=st.sampled_from(["vllm", "llamacpp"]),
    max_model_len=st.none() | st.integers(1, 10**6),
    max_num_seqs=st.none() | st.integers(1, 1024),
    kv_reservation_seqs=st.none() | st.integers(1, 1024),
    tensor_parallel_size=st.none() | st.integers(1, 8),
)


@given(shapes, models)
def test_each_card_needs_less_the_more_there_are_and_never_less_than_one_sequence(
    shape: Shape, settings: Model
) -> None:
    """Never more with a further card; the least is never more than the whole; every number is above 1 GiB."""
    found = estimate(shape, settings)
    needs = [found.mib[count] for count in sorted(found.mib)]
    assert needs == sorted(needs, reverse=True)
    assert found.mib.keys() == found.least.keys() != set()
    assert all(1024 <= found.least[count] <= found.mib[count] for count in found.mib)


@given(shapes, models, st.integers(1, 10**6), st.integers(1, 512), st.integers(0, 10**11))
def test_longer_more_and_heavier_never_need_less(
    shape: Shape, settings: Model, longer: int, more: int, heavier: int
) -> None:
    """Monotone in the length, in the sequences and in the weights, on any number of cards."""
    settings = dataclasses.replace(settings, max_model_len=settings.max_model_len or 1000, max_num_seqs=8)
    base = estimate(shape, settings)
    assert settings.max_model_len is not None
    bigger = [
        estimate(shape, dataclasses.replace(settings, max_model_len=settings.max_model_len + longer)),
        estimate(shape, dataclasses.replace(settings, max_num_seqs=8 + more)),
        estimate(dataclasses.replace(shape, weights=shape.weights + heavier), settings),
    ]
    for other in bigger:
        assert all(base.mib[count] <= other.mib[count] for count in base.mib)
        assert all(base.least[count] <= other.least[count] for count in base.mib)
