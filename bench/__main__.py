"""`make bench`: figures with their targets, as ratios within one run where that is possible.

`make bench ARGS="--only overload,flood --seconds 10"` runs some of them, and shorter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from bench import flood, grants, hop, overload, plans, reading, reconcile, swaps, waiting

SCENARIOS: dict[str, tuple[Callable[[float], None], float]] = {
    "hop": (hop.run, 5.0),
    "cost": (hop.run_cost, 5.0),
    "grants": (grants.run, 3.0),
    "waiting": (waiting.run, 5.0),
    "overload": (overload.run, 60.0),
    "flood": (flood.run, 40.0),
    "shares": (flood.run_shares, 20.0),
    "swaps": (swaps.run, 60.0),
    "plans": (plans.run, 10.0),
    "reading": (reading.run, 15.0),
    "reconcile": (reconcile.run, 0.0),
}
"""By name: what runs, and the seconds that each of its measurements takes unless told otherwise."""


def main() -> None:
    """Runs what was asked for; each scenario prints a Markdown table."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="some of: %(default)s")
    parser.add_argument("--seconds", type=float, help="length of each measurement")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted(set(names) - set(SCENARIOS)):
        parser.error(f"--only: {', '.join(unknown)} is unknown; there are {', '.join(SCENARIOS)}")
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, load before {load:.1f}")
    for name in names:
        run, seconds = SCENARIOS[name]
        run(arguments.seconds or seconds)


if __name__ == "__main__":
    main()
