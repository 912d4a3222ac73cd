"""The engines by their names in the configuration."""

from __future__ import annotations

from tidegate_lifecycle.catalog import Model, digest
from tidegate_lifecycle.engines.base import Engine
from tidegate_lifecycle.engines.command import CommandEngine
from tidegate_lifecycle.engines.external import ExternalEngine
from tidegate_lifecycle.engines.llamacpp import LlamaCppEngine
from tidegate_lifecycle.engines.vllm import VllmEngine

ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (CommandEngine(), VllmEngine(), LlamaCppEngine(), ExternalEngine())
}


def shape(model: Model) -> str:
    """The same for two forms of a model exactly when a server of the one may go on as a server of the other:
    what reaches the server, and where and how large it is. Which URLs an external model has is no part of it:
    each is a server of its own."""
    if model.external:
        return model.engine
    size = [model.vram_mib, model.vram_share, model.tensor_parallel_size, model.kv_reservation_seqs]
    signature = ENGINES[model.engine].signature(model)
    return digest({"engine": model.engine, "signature": signature, "pool": model.pool, "size": size})
