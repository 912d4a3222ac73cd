"""What of a model decides how much memory its server needs. Pure; made by `hf_config` and `gguf_shape`."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CARDS = 64
"""The most cards that one server may be spread over."""


class UnknownError(Exception):
    """Why nothing can be said of a model's memory, in words for users: never a guess."""


@dataclass(frozen=True)
class Cache:
    """A number of layers that keep the same for each token."""

    layers: int
    heads: int
    """Key/value heads of one layer; each of several cards holds its part of them, one at least."""
    size: int
    """Elements per token and head: key and value together."""
    window: int | None = None
    """Only the last so many tokens are kept; None = all."""
    divided: bool = True
    """Tensor parallel divides it. A latent (MLA) is held whole by each card."""

    def elements(self, cards: int = 1) -> int:
        """Elements per token that one of so many cards holds, over all these layers."""
        heads = max(1, -(-self.heads // cards)) if self.divided else self.heads
        return self.layers * heads * self.size


@dataclass(frozen=True)
class Shape:
    """A model as far as its memory goes."""

    weights: int = 0
    """Bytes on the cards, all together."""
    caches: tuple[Cache, ...] = ()
    """Empty = nothing is kept per token: encoders, pure state-space models."""
    state: int = 0
    """Bytes that each sequence keeps whatever its length: linear-attention and state-space layers."""
    native_length: int | None = None
    """The longest sequence that it was made for, in tokens; None = not told."""
    element: int = 2
    """Bytes of an element of the KV cache, when no other type is asked for."""
    layers: int = 1
    vocabulary: int = 0
    """Tokens that there are; 0 = nothing is sampled."""
    parts: int = 1
    """What a number of cards has to divide: attention heads, and the widths that are split."""
    kv_heads: int = 1
    """Such a number divides these, or is a multiple of them."""

    def divides(self, cards: int) -> bool:
        """It can be spread over so many cards by tensor parallel."""
        heads = self.kv_heads % cards == 0 or cards % self.kv_heads == 0
        return self.parts % cards == 0 and heads
