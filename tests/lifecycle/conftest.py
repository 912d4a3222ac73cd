"""The lifecycle service for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lifecycle.harness import Service


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Callable[..., Service]]:
    """Makes services; at the end of the test they and their model servers are gone."""
    made: list[Service] = []

    def create(models: dict[str, Any], **lifecycle: Any) -> Service:
        made.append(Service(tmp_path, models, **lifecycle))
        return made[-1]

    yield create
    killed = [service for service in made if service.process is not None and service.process.returncode != 0]
    for service in killed:
        await service.kill()
    if killed:
        status, said = await killed[-1].run("--sweep")
        assert status == 0, said
