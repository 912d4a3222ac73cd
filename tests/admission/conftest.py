"""Fixtures of the admission tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.admission.real import Stage


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """A stage on which nothing runs yet."""
    made = Stage(tmp_path)
    yield made
    await made.end()
