"""What a model's `extra_args` change about its memory. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.estimate.shape import UnknownError
from tidegate_lifecycle.estimate.values import words

_VLLM_UNKNOWN = words(
    """--speculative-config -sc --speculative-model --spec-model --spec-method --hf-overrides --rope-scaling
    --enable-lora --kv-transfer-config --kv-sharing-fast-prefill --offload-backend
    --cpu-offload-params --offload-group-size --decode-context-parallel-size -dcp
    --prefill-context-parallel-size -pcp --disable-hybrid-kv-cache-manager --hf-config-path
    --max-num-active-seqs --revision --additional-config --model-class-overrides"""
)
_LLAMA_UNKNOWN = words(
    """-md --model-draft -hfd --hf-repo-draft --mmproj -mm --mmproj-url -ot --override-tensor -cmoe --cpu-moe
    -ncmoe --n-cpu-moe --swa-full -ts --tensor-split -sm --split-mode --lora --lora-scaled --override-kv
    -b --batch-size -ub --ubatch-size -kvu --kv-unified -cb --fit"""
)
_LAYERS_ON_CARDS = ("-ngl", "--gpu-layers", "--n-gpu-layers")
_CHUNK = 8192
"""Tokens that vLLM works on in one step by default on the larger cards."""
_BATCH = 512
"""The same of llama.cpp (its micro-batch)."""


@dataclass(frozen=True)
class Changes:
    """What differs from a server without them."""

    chunk: int = _CHUNK
    """Tokens of one step: sliding windows hold them beside the window."""
    offload: int = 0
    """Bytes of the weights on each card that stay in the host's memory."""
    layers: int | None = None
    """Layers that go to the cards; None = all."""
    cache_on_host: bool = False
    key_type: str = ""
    value_type: str = ""


def changes(model: Model) -> Changes:
    """Read from `extra_args`. UnknownError for one whose cost in memory isn't reckoned here."""
    given = flags(model.extra_args)
    unknown = _VLLM_UNKNOWN if model.engine == "vllm" else _LLAMA_UNKNOWN
    strange = next((flag for flag in given if flag.partition(".")[0] in unknown), None)
    if strange is not None:
        raise UnknownError(f"what {strange} in extra_args costs isn't known")
    if model.engine == "vllm":
        offload = _number(given, "--cpu-offload-gb") or 0.0
        chunk = _number(given, "--max-num-batched-tokens")
        return Changes(chunk=int(chunk) if chunk else _CHUNK, offload=int(offload * 2**30))
    on_cards = next((flag for flag in _LAYERS_ON_CARDS if flag in given), None)
    layers = _number(given, on_cards) if on_cards else None
    return Changes(
        chunk=_BATCH,
        layers=None if layers is None or layers < 0 else int(layers),
        cache_on_host="-nkvo" in given or "--no-kv-offload" in given,
        key_type=given.get("-ctk", given.get("--cache-type-k", "")),
        value_type=given.get("-ctv", given.get("--cache-type-v", "")),
    )


def flags(arguments: Iterable[str]) -> dict[str, str]:
    """Flags with their values, or with nothing: `--flag value`, `--flag=value`; the last one counts."""
    found: dict[str, str] = {}
    flag = ""
    for argument in arguments:
        if argument.startswith("-") and not argument.lstrip("-")[:1].isdigit():
            flag, _, value = argument.partition("=")
            flag = flag.replace("_", "-") if flag.startswith("--") else flag
            found[flag] = value
        elif flag:
            found[flag], flag = argument, ""
    return found


def _number(given: Mapping[str, str], flag: str) -> float | None:
    if flag not in given:
        return None
    try:
        number = float(given[flag])
    except ValueError:
        raise UnknownError(f"the value of {flag} in extra_args isn't understood") from None
    if not abs(number) < 1e9:
        raise UnknownError(f"the value of {flag} in extra_args makes no sense")
    return number
