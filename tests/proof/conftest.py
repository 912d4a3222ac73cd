"""What all proofs share: log lines go nowhere, and no logger remembers what another test had configured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Log calls do all their work but the writing."""
    before = structlog.get_config()
    structlog.configure(
        processors=[structlog.processors.format_exc_info, _drop],
        wrapper_class=structlog.make_filtering_bound_logger(0),
        cache_logger_on_first_use=False,
    )
    for name, module in list(sys.modules.items()):
        if name.startswith("tidegate"):
            getattr(module, "log", module).__dict__.pop("bind", None)
    yield
    structlog.configure(**before)


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent
