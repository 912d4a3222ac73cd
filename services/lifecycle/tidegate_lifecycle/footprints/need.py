"""From what a server took to what it needs. Pure; MiB per card."""

from __future__ import annotations

from collections.abc import Iterable

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.engines.vllm_log import memory_report, needed_mib
from tidegate_lifecycle.estimate.reservation import reserved_seqs
from tidegate_lifecycle.footprints.record import FILLS
from tidegate_lifecycle.footprints.verdict import Discarded


def needed(model: Model, taken: int, log: Iterable[str], asked: bool) -> int:
    """What a server that took so much really needs; `log` are its lines.

    1. An engine that takes what it needs: that.
    2. One that fills its share with KV cache: without the cache that nobody asked for, by what its log tells.
    3. Its log doesn't tell: what it took, if an amount was asked for. Where it was given a whole card, that
       says nothing about the model: Discarded.
    """
    if model.engine not in FILLS:  # 1
        return taken
    report = memory_report(log)
    if report.one_sequence_mib is not None:  # 2
        length = report.request_tokens or model.max_model_len or 1
        return needed_mib(taken, report, reserved_seqs(model, length))
    if not asked:  # 3
        text = (
            "it fills the whole card that it was given, and its log doesn't tell how much of that is KV cache"
        )
        raise Discarded("fills", text, again=False)
    return taken
