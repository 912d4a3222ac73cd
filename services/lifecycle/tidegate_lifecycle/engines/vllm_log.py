"""What a vLLM server says of its memory while it starts. Pure.

The wording moves between releases: every figure is a hint, None when no line tells it, and never required.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_NUMBER = r"([\d,]+(?:\.\d+)?)"
_WEIGHTS = re.compile(rf"Model loading took {_NUMBER} ?Gi?B")
_KV = re.compile(rf"Available KV cache memory: {_NUMBER} ?Gi?B")
_TOKENS = re.compile(rf"KV cache size: {_NUMBER} tokens")
_CONCURRENCY = re.compile(rf"Maximum concurrency for {_NUMBER} tokens per request: {_NUMBER}x")

KV_MARGIN = 1.1
SPARE_MIB = 256
"""By so much two starts of the same server may differ; a share without it would fail every other one."""


@dataclass(frozen=True)
class MemoryReport:
    """What its log told, per card; None = nothing."""

    weights_mib: int | None = None
    """What loading the model took; of several cards the most."""
    kv_mib: int | None = None
    """Room for KV cache: all that its share leaves. Of several cards the least."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds."""
    request_tokens: int | None = None
    """Tokens of the longest request: max_model_len in effect."""
    concurrency: float | None = None
    """Requests of that length that the KV cache holds at once."""

    @property
    def one_sequence_mib(self) -> int | None:
        """KV cache of one request of full length, in MiB; true for hybrid models as well."""
        if self.kv_mib is None or self.concurrency is None or self.concurrency < 0.01:
            return None
        return math.ceil(self.kv_mib / self.concurrency)


def memory_report(lines: Iterable[str]) -> MemoryReport:
    """Reads the log of one start; with tensor parallel each worker says its own."""
    text = "\n".join(lines)
    concurrency = [(_number(tokens), _number(times)) for tokens, times in _CONCURRENCY.findall(text)]
    return MemoryReport(
        weights_mib=_mib(_WEIGHTS.findall(text), max),
        kv_mib=_mib(_KV.findall(text), min),
        kv_tokens=min((int(_number(found)) for found in _TOKENS.findall(text)), default=None),
        request_tokens=int(concurrency[-1][0]) if concurrency else None,
        concurrency=min((times for _, times in concurrency), default=None),
    )


def needed_mib(taken_mib: int, report: MemoryReport, sequences: int) -> int:
    """What a server really needs of a card on which it took `taken_mib`, with KV cache for `sequences`.

    vLLM fills its share with KV cache, so what it took says little. Needed = taken − room for KV cache +
    KV cache of the sequences with a margin; never more than it took, because with that it ran. Without
    the log's figures: what it took.
    """
    one = report.one_sequence_mib
    if one is None or report.kv_mib is None or report.kv_mib >= taken_mib:
        return taken_mib
    wanted = math.ceil(one * sequences * KV_MARGIN) + SPARE_MIB
    return taken_mib - report.kv_mib + min(report.kv_mib, wanted)


def _number(text: str) -> float:
    return float(text.replace(",", "") or "nan")


def _mib(found: list[str], which: Callable[[Iterable[float]], float]) -> int | None:
    return math.ceil(which([_number(one) * 1024 for one in found])) if found else None
