"""What is configured for all gates."""

from __future__ import annotations

from dataclasses import dataclass, field

from tidegate_admission.fairness import Tenants


@dataclass(frozen=True, slots=True)
class Limits:
    """Admission's own limits, for models that bring none; times in seconds."""

    max_concurrent: int = 50
    max_queue: int = 200
    queue_timeout: float = 300.0
    aging: float = 60.0
    """After so long a waiting ticket rises one band."""
    tenants: Tenants = field(default_factory=Tenants)
