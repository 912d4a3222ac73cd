"""Servers that run elsewhere: checked and admitted like the others, never started or stopped."""

from __future__ import annotations

from tidegate_lifecycle.catalog import Model, digest
from tidegate_lifecycle.engines import flags
from tidegate_lifecycle.engines.base import Command, Placement
from tidegate_lifecycle.probes import Health, Probe

TIMEOUT = 5.0
"""Seconds that it may take to answer a health check: it may be far away."""


class ExternalEngine:
    """Health checks alone. What it reports of its load is told, though others may use it too."""

    name = "external"
    flags = flags.NONE
    stop_grace = 0.0

    def command(self, model: Model, placement: Placement) -> Command:
        """There is none: ValueError."""
        raise ValueError(f"{model.name} runs elsewhere")

    def signature(self, model: Model) -> str:
        """Where it is, and under which name."""
        return digest({"engine": self.name, "urls": list(model.urls), "name": model.served_name})

    def default_slots(self, model: Model) -> int | None:
        """Nothing is known of it."""
        return None

    async def ready(self, probe: Probe, model: Model, address: str) -> Health:
        """Its health route answers."""
        return await probe.get(address, model.health_path, TIMEOUT)
