"""Slow and idle clients in a process of their own: `python -m tests.edge.wire.attackers PORT`, until killed.

250 drip heads and 250 bodies, a byte a second, and come again when they are cut; 6,000 say nothing.
"""

from __future__ import annotations

import asyncio
import sys

from tests.edge.wire.kernel import many
from tests.edge.wire.raw import Wire, post

DRIPPING = 500
IDLE = 6000


async def drip(port: int, number: int) -> None:
    """One after the other, for ever."""
    head = post(*[b"x: y"] * 100)
    body = post(b"content-length: 1000", length=False, body=b" " * 900)
    while True:
        wire = await Wire.to(port)
        data = head if number % 2 else body
        begun = 0 if number % 2 else body.index(b"\r\n\r\n") + 4
        await wire.say(data[:begun])
        for byte in data[begun:]:
            await wire.say(bytes([byte]))
            await asyncio.sleep(1)
            if wire.reader.at_eof():
                break
        await wire.closed()


async def attack(port: int) -> None:
    """All of them."""
    idle = await asyncio.to_thread(many, port, IDLE)
    async with asyncio.TaskGroup() as group:
        for number in range(DRIPPING):
            group.create_task(drip(port, number))
        print(f"{len(idle)} idle, {DRIPPING} dripping", flush=True)  # noqa: T201 - its parent waits for it


if __name__ == "__main__":
    asyncio.run(attack(int(sys.argv[1])))
