"""The engines by their names in the configuration."""

from __future__ import annotations

from tidegate_lifecycle.engines.base import Engine
from tidegate_lifecycle.engines.command import CommandEngine
from tidegate_lifecycle.engines.external import ExternalEngine
from tidegate_lifecycle.engines.llamacpp import LlamaCppEngine
from tidegate_lifecycle.engines.vllm import VllmEngine

ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (CommandEngine(), VllmEngine(), LlamaCppEngine(), ExternalEngine())
}
