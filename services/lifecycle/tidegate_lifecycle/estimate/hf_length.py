"""How long a sequence may be by `config.json`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate_lifecycle.estimate.values import maybe

_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_ALREADY_SCALED = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "default", "mrope"})
_DEFAULT = 2048
"""What vLLM assumes when the file names none."""


def native_length(text: Mapping[str, Any], model_type: str = "") -> int:
    """Tokens of the longest sequence, as vLLM derives them (`_get_and_verify_max_len`).

    1. The smallest of the keys that name one; `model_max_length` before all others.
    2. longrope: the length before scaling, as vLLM does to keep short sequences good.
    3. yarn: some files give the scaled length, in some it is original × factor; the longer one counts.
    4. Other kinds of scaling multiply it; Gemma 3 has done so already.
    """
    found = [length for key in _KEYS if (length := maybe(text, key))]
    length = maybe(text, "model_max_length") or min(found, default=_DEFAULT)  # 1
    for rope in _ropes(text):
        kind = str(rope.get("rope_type") or rope.get("type") or "default")
        factor = rope.get("factor")
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < 10_000:
            factor = 1.0
        original = maybe(text, "original_max_position_embeddings")
        original = original or maybe(rope, "original_max_position_embeddings")
        if kind in ("longrope", "su"):  # 2
            return original or length
        if kind == "yarn" and original:  # 3
            return max(length, int(original * factor))
        if kind not in _ALREADY_SCALED and "gemma3" not in model_type:  # 4
            return int(length * factor)
    return length


def _ropes(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The scalings of the file, under the old key and the new one, maybe one for each kind of layer."""
    given = [text[key] for key in ("rope_scaling", "rope_parameters") if isinstance(text.get(key), Mapping)]
    nested = [one for part in given for one in part.values() if isinstance(one, Mapping)]
    return [one for one in (*given, *nested) if one.get("rope_type") or one.get("type")]
