"""What the driver says of each process: `nvidia-smi --query-compute-apps`. Where this process doesn't share
the host's PID namespace the list is empty, or its numbers are those of strangers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tidegate_lifecycle.devices import Smi

QUERY = ("--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader,nounits")
DEADLINE = 5.0


@dataclass(frozen=True)
class App:
    """A process that uses a card."""

    uuid: str
    """Of the card."""
    pid: int
    mib: int | None
    """What it uses there; None = the driver doesn't tell."""


async def apps(smi: Smi) -> list[App]:
    """All of them, as they are now. Unreadable as `Smi.ask`."""
    return parse(await smi.ask(*QUERY, deadline=DEADLINE))


def parse(output: str) -> list[App]:
    """The lines of the right form; others are no processes ("No running processes found")."""
    found = []
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and cells[0] and cells[1].isascii() and cells[1].isdecimal():
            used = cells[2].removesuffix(" MiB")
            mib = int(used) if used.isascii() and used.isdecimal() else None
            found.append(App(cells[0], int(cells[1]), mib))
    return found


def own_use(found: Iterable[App], uuid: str, pids: Collection[int]) -> int | None:
    """What these processes use of a card together; None when the driver doesn't tell it of them."""
    mine = [app.mib for app in found if app.uuid == uuid and app.pid in pids]
    known = [mib for mib in mine if mib is not None]
    return sum(known) if known and len(known) == len(mine) else None
