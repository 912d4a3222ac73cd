"""From a model's shape and its settings to what one server needs of each of its cards. Pure.

    need per card = (weights ÷ cards + KV cache per card) × 1.1 + 1 GiB

The tenth is for what grows with the model: activations, graphs, blocks that aren't full. The GiB is for what
each process on a card costs: the CUDA context, libraries' workspaces, activations. vLLM also samples for
all its sequences at once when it measures itself, on each card over the whole vocabulary: for small models
with large vocabularies that is most of what they need beside weights and cache. What exceeds half of the
GiB is added.
"""

from __future__ import annotations

import math

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.estimate.arguments import Changes, changes
from tidegate_lifecycle.estimate.reservation import reserved_seqs
from tidegate_lifecycle.estimate.shape import MAX_CARDS, Cache, Shape, UnknownError
from tidegate_lifecycle.needs import Estimate

MARGIN = 1.1
OVERHEAD = 2**30
"""Bytes per card."""
SAMPLING = 28
"""Bytes per sequence and token of the vocabulary: logits (2 + 4), sorted with their indices (4 + 8),
probabilities and their sums (4 + 4), masks (2)."""
LLAMA_CARDS = 8
"""The most cards over which llama.cpp's layers are spread unasked."""
_CACHE_BYTES = {
    "f32": 4.0,
    "float32": 4.0,
    "f16": 2.0,
    "float16": 2.0,
    "bf16": 2.0,
    "bfloat16": 2.0,
    "fp8": 1.0,
    "fp8_e4m3": 1.0,
    "fp8_e5m2": 1.0,
    "fp8_inc": 1.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}
"""Bytes of an element of the KV cache by its type; llama.cpp's have a scale for each 32 (ggml-common.h)."""


def estimate(shape: Shape, model: Model) -> Estimate:
    """What a server needs, by the number of its cards; at least: KV cache for one sequence of full length.

    vLLM refuses to start with less than that, and lets requests wait when there isn't more: so only the least
    decides whether the model fits at all. llama.cpp takes the KV cache of all its slots when it starts: its
    least is all. Empty, with the reason, when the settings change something that isn't reckoned here.
    """
    try:
        changed = changes(model)
        length = model.max_model_len or shape.native_length
        if length is None and (shape.caches or shape.state):
            raise UnknownError("the model doesn't tell its longest sequence; set max_model_len")
        reckon = _llama if model.engine == "llamacpp" else _vllm
        return reckon(shape, model, changed, length or 0)
    except UnknownError as error:
        return Estimate(why=f"{error}; set vram")


def _vllm(shape: Shape, model: Model, changed: Changes, length: int) -> Estimate:
    element = cache_bytes(model.kv_cache_dtype, shape.element)
    seqs = reserved_seqs(model, length) if shape.caches or shape.state else 1

    sampling = max(0, model.seqs_at_once * shape.vocabulary * SAMPLING - OVERHEAD // 2)

    def need(cards: int, number: int) -> int:
        weights = max(0.0, shape.weights / cards - changed.offload)
        return _mib(weights, _cache(shape, length, number, changed.chunk, element, cards), sampling)

    counts = _counts(shape, model)
    if not counts:
        raise UnknownError("no number of cards divides its attention heads")
    cache = _cache(shape, length, seqs, changed.chunk, element)
    why = _why(shape, model, changed, length, seqs, cache, sampling)
    return Estimate({one: need(one, seqs) for one in counts}, {one: need(one, 1) for one in counts}, why)


def _llama(shape: Shape, model: Model, changed: Changes, length: int) -> Estimate:
    """Layers are spread, so that a card holds whole ones; a context that isn't set is shared by all slots."""
    types = (changed.key_type or model.kv_cache_dtype, changed.value_type or model.kv_cache_dtype)
    element = sum(cache_bytes(name, 2) for name in types) / 2
    slots = model.max_num_seqs or 1
    seqs = slots if model.max_model_len else 1
    cache = _cache(shape, length, seqs, changed.chunk, element) + (slots - seqs) * shape.state
    there = shape.layers + 1  # the last one is the output
    on_cards = there if changed.layers is None else min(changed.layers, there)

    def need(cards: int) -> int:
        part = math.ceil(shape.layers / cards) / shape.layers * on_cards / there
        return _mib(shape.weights * part, 0.0 if changed.cache_on_host else cache * part)

    asked = model.tensor_parallel_size
    counts = [asked] if asked else range(1, min(LLAMA_CARDS, shape.layers) + 1)
    full = {one: need(one) for one in counts}
    return Estimate(full, full, _why(shape, model, changed, length, seqs, cache, 0))


def _cache(shape: Shape, length: int, seqs: int, chunk: int, element: float, cards: int = 1) -> float:
    """Bytes that one card holds for so many sequences, beside the weights."""
    kept = sum(one.elements(cards) * _tokens(one, length, seqs, chunk) for one in shape.caches)
    return kept * element + seqs * shape.state / cards


def cache_bytes(name: str, otherwise: float) -> float:
    """Bytes of an element of a KV cache of that type; UnknownError for one that isn't known."""
    if name in ("", "auto"):
        return otherwise
    if name not in _CACHE_BYTES:
        raise UnknownError(f"how large a KV cache of type {name} is isn't known")
    return _CACHE_BYTES[name]


def cache_per_token(shape: Shape, cards: int = 1) -> int:
    """Bytes that a further token of a long sequence costs on each card: windows are full by then."""
    return sum(one.elements(cards) for one in shape.caches if one.window is None) * shape.element


def _counts(shape: Shape, model: Model) -> list[int]:
    """As vLLM can divide it; what the settings ask for is taken as it is."""
    if model.tensor_parallel_size:
        return [model.tensor_parallel_size]
    return [cards for cards in range(1, MAX_CARDS + 1) if shape.divides(cards)]


def _tokens(cache: Cache, length: int, seqs: int, chunk: int) -> int:
    """Tokens that a layer keeps: windows of all sequences, and one step's beside them."""
    if cache.window is None:
        return length * seqs
    return min(length * seqs, cache.window * seqs + chunk)


def _mib(weights: float, cache: float, sampling: int = 0) -> int:
    return math.ceil(((weights + cache) * MARGIN + OVERHEAD + sampling) / 2**20)


def _why(
    shape: Shape, model: Model, changed: Changes, length: int, seqs: int, cache: float, sampling: int
) -> str:
    """The numbers behind the need, all cards together."""
    weights = f"{_size(shape.weights)} weights"
    if changed.offload:
        weights += f" less {_size(changed.offload)} per card in the host's memory"
    if changed.layers is not None:
        weights += f" ({min(changed.layers, shape.layers + 1)} of {shape.layers + 1} layers on cards)"
    kept = "no KV cache"
    if shape.caches or shape.state:
        sequences = "1 sequence" if seqs == 1 else f"{seqs} sequences"
        own = "" if model.max_model_len else ", the model's own maximum"
        kept = f"{_size(cache)} KV cache for {sequences} of {length:,} tokens{own}"
    spread = "" if model.tensor_parallel_size == 1 else " divided by the number of cards,"
    return f"{weights} and {kept};{spread} a tenth more, and {_size(OVERHEAD + sampling)} on each card"


def _size(size: float) -> str:
    """Bytes as a short number with its unit."""
    if size < 2**30:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / 2**30:.1f}".removesuffix(".0") + " GiB"
