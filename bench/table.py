"""What a scenario prints: one Markdown table, with the target beside what was measured."""

from __future__ import annotations


class Table:
    """Prints its rows as they come. Every row has its columns, then the target and whether it was met."""

    def __init__(self, title: str, *columns: str) -> None:
        self._columns = columns
        print(f"\n### {title}\n")
        _line([*columns, "target", ""])
        _line(["---"] * (len(columns) + 2))

    def row(self, *values: object, target: str = "", met: bool | None = None) -> None:
        """One row; missing columns stay empty. `met` = None: there is no target."""
        cells = [str(value) for value in values] + [""] * (len(self._columns) - len(values))
        _line([*cells, target, "" if met is None else "met" if met else "**missed**"])


def _line(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def ms(seconds: float) -> str:
    """A time in milliseconds."""
    return f"{seconds * 1000:.2f} ms"


def mib(size: float) -> str:
    """A size in MiB."""
    return f"{size / 2**20:.1f} MiB"
