"""Section `lifecycle.footprints`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tidegate_chassis.config import Settings
from tidegate_chassis.kinds import Duration, Flag, Number, Whole


class FootprintSettings(Settings):
    """How what model servers really take of their cards is measured."""

    measure: Annotated[bool, Flag()] = Field(
        True,
        description="Servers are measured when they are ready, if there is no footprint of their "
        "configuration; "
        "false = only by `tidegate footprints measure`.",
    )
    settle: Annotated[float, Duration("0s", "10m")] = Field(
        5.0, description="From ready to the first sample: what a server allocates late is to be in it."
    )
    samples: Annotated[int, Whole(3, 100)] = Field(
        5, description="Samples of each card; their median counts."
    )
    spacing: Annotated[float, Duration("50ms", "5m")] = Field(1.0, description="Between two samples.")
    min_confidence: Annotated[float, Number(0, 1)] = Field(
        0.9,
        description="1 less the samples' range as a share of their median: below this nothing is kept, and "
        "it is tried again later.",
    )
