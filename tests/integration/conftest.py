"""Fixtures for tests through the whole gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gateway import Gateway


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Makes gateways; each is stopped at the end, and nothing of it may be left."""
    made: list[Gateway] = []

    def make(models: dict[str, Any], environ: dict[str, str] | None = None, **sections: Any) -> Gateway:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Gateway(folder, {"models": models, **sections}, environ))
        return made[-1]

    yield make
    for one in made:
        one.close()
