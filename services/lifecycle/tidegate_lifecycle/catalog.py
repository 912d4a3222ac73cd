"""The catalogue: what each model is, as plain values. Pure; made from the configuration by `settings.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VLLM_SEQS = 256
"""vLLM's own default, but for large cards in late releases."""


@dataclass(frozen=True)
class DeviceSpec:
    """A device as the configuration gives it."""

    id: str
    """Its name; without declared memory: the index or the UUID of a card that nvidia-smi shows."""
    memory_mib: int | None = None
    """Total memory in MiB; None = what the driver says."""
    pool: str = "default"
    """The pool it belongs to; a model is placed in its own pool alone."""
    budget: float = 0.92
    """Share of the total that may be used, above 0 to 1."""


@dataclass(frozen=True)
class Model:
    """One entry of the catalogue, `defaults` already merged in. Times in seconds, memory in MiB."""

    name: str
    engine: str = "command"
    """command, vllm, llamacpp or external."""
    aliases: tuple[str, ...] = ()
    upstream_model: str = ""
    """The name that the server knows; empty = the model's own."""
    request_defaults: Mapping[str, Any] = field(default_factory=dict)
    pool: str = "default"
    vram_mib: int | None = None
    """Memory per card, given as an amount; None = not given so."""
    vram_share: float | None = None
    """Memory per card, given as a share of its total (0 to 1); None = not given so."""
    tensor_parallel_size: int | None = None
    """How many equal cards; None = the fewest on which it fits."""
    max_concurrent: int | None = None
    max_queue: int | None = None
    idle_timeout: float = 1800.0
    """From the last release to the stop; 0 = never."""
    always_on: bool = False
    instances: int = 1
    start_timeout: float = 600.0
    health_path: str = "/health"
    env: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    """Engine command: the argument vector with {port}, {name} and {devices} still in it."""
    source: str = ""
    """Engines vllm and llamacpp: what `hub.source` reads."""
    executable: str = ""
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    """Sequences that its server works on at once; None = see `seqs_at_once`."""
    kv_reservation_seqs: int | None = None
    """Sequences whose KV cache a vLLM server is to have; None = see `reserved_seqs`."""
    kv_cache_dtype: str = ""
    """Type of the KV cache's elements; empty = the server's default."""
    quantization: str = ""
    dtype: str = "auto"
    tokenizer: str = ""
    extra_args: tuple[str, ...] = ()
    image: str = ""
    """The image of its container; empty = it is a process, or runs elsewhere."""
    volumes: tuple[str, ...] = ()
    """Mounts of its container, each `SOURCE:TARGET[:ro|rw]`."""
    urls: tuple[str, ...] = ()
    """Engine external: base URLs, one instance each."""

    @property
    def external(self) -> bool:
        """Runs elsewhere: never started, never stopped, needs no card here."""
        return self.engine == "external"

    @property
    def seqs_at_once(self) -> int:
        """What a vLLM server is told: its memory depends on it, and its own default on release and card."""
        return self.max_num_seqs or max(VLLM_SEQS, self.max_concurrent or 0)

    @property
    def served_name(self) -> str:
        """The name that the server knows."""
        return self.upstream_model or self.name


@dataclass(frozen=True)
class Catalog:
    """All models, by name and by alias."""

    models: Mapping[str, Model]

    def find(self, name: str) -> Model | None:
        """The model of that name or alias."""
        if name in self.models:
            return self.models[name]
        return next((model for model in self.models.values() if name in model.aliases), None)


def digest(values: Mapping[str, Any]) -> str:
    """A short stable hash of plain values: the signature under which a running server may be adopted."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
