"""`tidegate-simulator`: a vLLM look-alike."""

from __future__ import annotations

import asyncio
import sys

from tidegate_simulator.options import parse
from tidegate_simulator.server import Server


def main() -> None:
    """Runs a simulator until it is told to stop."""
    sys.exit(asyncio.run(_run()))


async def _run() -> int:
    return await Server(parse(sys.argv[1:])).run()


if __name__ == "__main__":
    main()
