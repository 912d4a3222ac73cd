"""A footprint, and under which configuration it holds. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tidegate_lifecycle.catalog import Model, digest
from tidegate_lifecycle.engines.base import HUB_TOKENS

MEASURED, IMPORTED = "measured", "imported"
"""Where a footprint is from."""
FILLS = frozenset({"vllm"})
"""Engines whose servers take all of the share that they were given."""
MARGIN = 0.05
MARGIN_MIB = 256
"""What later starts reserve beyond what was measured: this share of it, and at least so many MiB. Two starts
of one server differ a little, and a server that wasn't busy yet takes more later."""


@dataclass(frozen=True)
class Footprint:
    """What a server of a model needs of each of its cards, under one configuration."""

    model: str
    signature: str
    """See `signature`."""
    kind: str
    """Product name of the cards."""
    count: int
    """Over how many of them it was spread."""
    mib: int
    """Needed of each card, in MiB; of several the most."""
    reserve_mib: int
    """What later starts reserve on each card, in MiB."""
    confidence: float
    """0 to 1: how far the samples agreed."""
    samples: int
    source: str
    """measured or imported."""
    at: float
    """When, in seconds since 1970: for its age alone."""

    @property
    def key(self) -> tuple[str, str]:
        """There is one for each model and signature."""
        return self.model, self.signature


def signature(model: Model, kind: str, count: int) -> str:
    """Hash of everything that shapes the memory of a server of the model on so many cards of that kind.

    Names, addresses and the hub's tokens aside: they take no memory. For an engine that fills its share, what
    decides that share counts too: there a footprint of another basis says little.
    """
    env = {name: value for name, value in model.env.items() if name not in HUB_TOKENS}
    basis = [model.vram_mib, model.vram_share] if model.engine in FILLS else []
    return digest(
        {
            "engine": model.engine,
            "image": model.image,
            "program": model.executable,
            "command": list(model.command),
            "source": model.source,
            "arguments": list(model.extra_args),
            "env": env,
            "context": model.max_model_len,
            "sequences": model.seqs_at_once if model.engine == "vllm" else model.max_num_seqs,
            "kv": [model.kv_reservation_seqs, model.kv_cache_dtype],
            "dtype": model.dtype,
            "quantization": model.quantization,
            "basis": basis,
            "cards": [kind, count],
        }
    )


def reserve(mib: int, limit: int) -> int:
    """What later starts are to reserve for a server that needs `mib`: with a margin, but never above `limit`.

    The limit is what it was given where that binds it (with that it ran), else the card's budget: a footprint
    must not make a model unplaceable that has just run.
    """
    return max(1, min(mib + max(MARGIN_MIB, math.ceil(mib * MARGIN)), limit))
