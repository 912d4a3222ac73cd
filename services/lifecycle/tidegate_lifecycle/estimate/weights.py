"""How much a model weighs, from the list of its files. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate_lifecycle.estimate.shape import UnknownError
from tidegate_lifecycle.estimate.values import maybe
from tidegate_lifecycle.hub.cache import Listing, RepoFile
from tidegate_lifecycle.hub.pick import weights

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def weight_files(listing: Listing, index: Mapping[str, Any]) -> tuple[RepoFile, ...]:
    """The files that vLLM loads: those of the index, where there is one. UnknownError when there are none."""
    chosen = [file for file in weights(listing) if file.path.endswith((".safetensors", ".bin"))]
    shards = index.get("weight_map")
    if isinstance(shards, Mapping):
        named = set(shards.values())
        chosen = [file for file in listing.files if file.path in named] or chosen
    if not chosen:
        raise UnknownError("it has no weights in safetensors or .bin files")
    return tuple(chosen)


def weight_bytes(files: tuple[RepoFile, ...], index: Mapping[str, Any]) -> int:
    """Their sizes together; where one isn't told, what the index says. UnknownError when neither is."""
    sizes = [file.size for file in files]
    if None not in sizes:
        return sum(size or 0 for size in sizes)
    told = index.get("metadata")
    total = maybe(told, "total_size") if isinstance(told, Mapping) else None
    if not total:
        raise UnknownError("the sizes of its weights aren't told")
    return total


def stored_bytes(header: Mapping[str, Any]) -> int:
    """Bytes of an element of most of the weights, by the header of a safetensors file; 0 = not told."""
    taken: dict[int, int] = {}
    for name, tensor in header.items():
        if name == "__metadata__" or not isinstance(tensor, Mapping):
            continue
        span, size = tensor.get("data_offsets"), _BYTES.get(str(tensor.get("dtype")), 0)
        if isinstance(span, list) and len(span) == 2 and all(isinstance(end, int) for end in span):
            taken[size] = taken.get(size, 0) + span[1] - span[0]
    return max(taken, key=lambda size: taken[size], default=0)
