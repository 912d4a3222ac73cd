"""What services tell about themselves: their metrics, and what the kernel knows of their processes."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families


class Figures:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self._samples = [one for family in text_string_to_metric_families(text) for one in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric over all series with these labels; 0 when there is none."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """A metric by one of its labels."""
        values = {sample.labels.get(label, "") for sample in self._samples if sample.name == name}
        return {value: self.total(name, **{label: value}) for value in sorted(values)}


def scrape(address: str) -> Figures:
    """The metrics behind `host:port`."""
    answer = httpx.get(f"http://{address}/metrics", timeout=10, trust_env=False)
    assert answer.status_code == 200, answer.text
    return Figures(answer.text)


def resident(pid: int) -> float:
    """Memory of a process, in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors(pid: int) -> int:
    """Open files and sockets of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def say(*lines: str) -> None:
    """Figures of a run, for who reads its output (`pytest -s`, or when it fails)."""
    print("\n".join(lines))  # noqa: T201 - that is what it is for
