"""One edge for each module of attacks."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.edge.wire.attacked import Attacked, attacked


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def edge(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[Attacked]:
    """The module's edge; `EDGE` of the module adds to its settings."""
    settings = getattr(request.module, "EDGE", {})
    async with attacked(tmp_path_factory.mktemp("edge"), **settings) as one:
        yield one
