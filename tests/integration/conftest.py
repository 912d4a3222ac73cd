"""Fixtures for tests through the whole gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.apart import Apart
from tests.support.contained import Fleet
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


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    """A fleet of containers of which nothing is left."""
    made = Fleet(tmp_path)
    yield made
    made.clean()


@pytest.fixture
def one(running: Apart) -> Apart:
    """The services that a file's tests share (its own `running`), with counts that begin at nothing."""
    running.mark()
    return running


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Callable[..., Apart]]:
    """Makes the services apart, with proxies between them; each is stopped at the end."""
    made: list[Apart] = []

    def make(models: dict[str, Any], **options: Any) -> Apart:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Apart(folder, models, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
