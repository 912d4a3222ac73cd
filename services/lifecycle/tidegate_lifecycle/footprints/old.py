"""`memory_footprints.json` of vllm_gateway, the gateway that this one replaces: read, and judged. Pure.

Its newer form has, by the hub's name of a model, `per_gpu_mib`, `effective_tp`, `measured_at` (seconds since
1970) and a `signature` with `mode`, `max_model_len` (0 = the model's own) and `max_num_seqs`; the first form
is a number of MiB by that name. (github.com/TKontu/vllm_gateway: gateway/app.py, gateway/placement.py.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.footprints.record import FILLS

LARGEST_MIB = 10 * 2**20
"""Of a card, for what is imported."""


@dataclass(frozen=True)
class Old:
    """One of its records."""

    source: str
    """The hub's name of the model."""
    mib: int
    """Per card."""
    count: int
    """Over how many cards."""
    at: float
    """Seconds since 1970; 0 = unknown."""
    signature: Mapping[str, Any] | None
    """None = the first form, or one that was never stamped."""


def read(text: str) -> tuple[list[Old], list[str]]:
    """The records, and what is none. ValueError when the text is no such file at all."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error})") from None
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object with a record per model")
    found, odd = [], []
    for source, value in document.items():
        record = _record(source, value)
        if isinstance(record, str):
            odd.append(f"{source[:200]}: {record}")
        else:
            found.append(record)
    return found, odd


def _record(source: str, value: object) -> Old | str:
    record = value if isinstance(value, dict) else {"per_gpu_mib": value}
    mib, count = _number(record.get("per_gpu_mib")), _number(record.get("effective_tp", 1))
    if mib is None or not 1 <= mib <= LARGEST_MIB:
        return f"{record.get('per_gpu_mib')!r} MiB is no footprint"
    if count is None or not 1 <= count <= 64 or count != int(count):
        return f"effective_tp {record.get('effective_tp')!r} is no number of cards"
    signature = record.get("signature")
    stamped = signature if isinstance(signature, dict) and signature else None
    return Old(source, math.ceil(mib), int(count), _number(record.get("measured_at")) or 0.0, stamped)


def mismatch(old: Old, model: Model) -> str:
    """Why it says nothing about the model as it is configured now; empty = it does.

    1. Another number of cards. 2. For an engine that fills its share: without a stamp, or by whole cards, it
    is what that share was; by amounts, it holds for the same context and sequences alone.
    """
    wanted = model.tensor_parallel_size
    if wanted is not None and wanted != old.count:  # 1
        return f"it was spread over {old.count} cards, {model.name} is over {wanted}"
    if model.engine not in FILLS:
        return ""
    if old.signature is None:
        return "it has no signature: it may be all of the share that the server was given"
    if old.signature.get("mode") != "budget":  # 2
        mode = old.signature.get("mode")
        return f"it was measured in the mode {mode!r}: that is the share that it was given"
    for theirs, ours in (("max_model_len", model.max_model_len), ("max_num_seqs", model.seqs_at_once)):
        if old.signature.get(theirs) != (ours or 0):
            was, now = old.signature.get(theirs), ours or "its own"
            return f"it was measured with {theirs} {was!r}, {model.name} has {now}"
    return ""


def _number(value: object) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]
