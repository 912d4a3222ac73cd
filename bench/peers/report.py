"""The tables of a run, as Markdown: medians over its rounds, targets, and what wasn't measured and why."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable

from bench.peers.install import OUT, ROOT
from bench.peers.load import Figures
from bench.peers.measure import LEVELS, SAMPLE, WAITING, Bench

PAGE = ROOT / "bench" / "peers.md"
RIVAL = "vllm-router"
KIB = 40
"""KiB that a stream, or a waiting connection, may take."""
_HEAD = """# tidegate beside its peers

Made by `make bench-peers` on {day} at {commit}, in {minutes:.0f} minutes. {cores} cores, {processor},
Python {python}, load average before {load:.1f}; {rounds} rounds of {seconds} s, of {longer:g} s for
streams. {versions}.

One run, one machine, one upstream. Each gateway is pinned to one core (`taskset`); all that isn't a gateway
shares the other: nginx, which gives everybody the same completion of 300 bytes; for streams a server that
writes its time into every chunk, 50 chunks a second for each stream; the load (`wrk`, for streams a client
of our own); and of tidegate admission and lifecycle. **Admission is on**: each of tidegate's requests is a
ticket and a lease. All gateways are up the whole time and measured in turn, round by round; a cell is the
median of its rounds, ± half of the way from the least to the most. Nobody logs single requests, and nobody
traces but where it says so.
"""
_REQUESTS = """
Columns are by connections. Latency is what a gateway adds to the direct call of the same run, whose own
stands in its row. Requests per second of processor time count what the gateway's processes used, in the
kernel too; of tidegate the edge's alone, and in the row below it that of all three services. The Rust
routers choose by prompt unless told otherwise (`cache_aware`); `-rr` is the same with `--policy
round_robin`, which reads no prompt.
"""
_STREAMS = """
Delay is from the upstream's write of a chunk to its arrival at the client. Time to the first token is at
one connection: what a gateway adds to the direct call. Memory is the growth of the gateway's resident
memory in the first round. The upstream took {emitter:.2f} of the other core for the direct streams, the
client {client:.2f}. Who can't carry 500 streams got fewer.
"""
_OTHERS = ("admission", "lifecycle")


class Found:
    """A run's figures by gateway, as medians over its rounds."""

    def __init__(self, bench: Bench) -> None:
        self._found = bench.found

    def rounds(self, scenario: str, name: str) -> list[Figures]:
        """All that was measured; empty = nothing."""
        return self._found.get(scenario, {}).get(name, [])

    def has(self, scenario: str, *names: str) -> bool:
        """Whether it was measured for all of them."""
        return all(self.rounds(scenario, name) for name in names)

    def median(self, scenario: str, name: str, of: Callable[[Figures], float]) -> float:
        """NaN = not measured."""
        values = [of(figures) for figures in self.rounds(scenario, name)]
        return statistics.median(values) if values else float("nan")

    def spread(self, scenario: str, name: str, of: Callable[[Figures], float]) -> float:
        """Half of the way from the least to the most, of the median: the noise."""
        values = [of(figures) for figures in self.rounds(scenario, name)]
        middle = statistics.median(values) if values else 0.0
        return (max(values) - min(values)) / 2 / middle if middle else 0.0

    def added(self, scenario: str, name: str, quantile: str) -> float:
        """Seconds more than the direct call took."""

        return self.median(scenario, name, _of(quantile)) - self.median(scenario, "direct", _of(quantile))


def _of(key: str) -> Callable[[Figures], float]:
    return lambda figures: float(figures[key])


def rate(figures: Figures) -> float:
    """Requests a second."""
    return float(figures["rate"])


def _proper(figures: Figures) -> float:
    """Processor seconds of the gateway proper: of tidegate, its edge."""
    return float(sum(used for part, used in figures["cpu"].items() if part not in _OTHERS))


def _all(figures: Figures) -> float:
    """Processor seconds with admission's and lifecycle's."""
    return float(sum(figures["cpu"].values()))


def per_core(of: Callable[[Figures], float] = _proper) -> Callable[[Figures], float]:
    """Requests by second of processor time."""
    return lambda figures: float(figures["requests"] / max(0.01, of(figures)))


def per_chunks(of: Callable[[Figures], float] = _proper) -> Callable[[Figures], float]:
    """Processor seconds per 10,000 chunks."""
    return lambda figures: of(figures) / max(1, figures["chunks"]) * 10_000


def _memory(figures: Figures) -> float:
    """KiB of the gateway proper, by stream or waiting connection."""
    parts = figures["memory"].items()
    return float(sum(size for part, size in parts if part not in _OTHERS) / figures["count"] / 1024)


def first_memory(found: Found, scenario: str, name: str) -> float:
    """Memory grows in the first round; later ones use it again."""
    rounds = found.rounds(scenario, name)
    return _memory(rounds[0]) if rounds else float("nan")


# The tables.


def write(bench: Bench, whole: bool, taken: float, load: float) -> None:
    """Prints the page and writes it: a whole run's to `bench/peers.md`. `load`: average before the run."""
    found = Found(bench)
    (OUT / "results.json").write_text(json.dumps({"found": bench.found, "failed": bench.failed}, indent=1))
    parts = [
        _head(bench, taken, load), _targets(found), _requests(bench, found), _streams(bench, found),
        _tidegate(bench, found), _missing(bench),
    ]  # fmt: skip
    page = "\n".join(part for part in parts if part)
    path = PAGE if whole else OUT / PAGE.name
    path.write_text(page)
    print(f"\n{page}\nwritten: {path.relative_to(ROOT)}")


def _head(bench: Bench, taken: float, load: float) -> str:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    versions = ", ".join(f"{one.name} {one.version}" for one in bench.targets if one.version)
    return _HEAD.format(
        day=time.strftime("%Y-%m-%d", time.gmtime()),
        commit=commit or "an unknown commit",
        minutes=taken / 60,
        cores=os.cpu_count(),
        processor=_processor(),
        python=platform.python_version(),
        load=load,
        rounds=bench.rounds,
        seconds=bench.seconds,
        longer=bench.seconds * 1.5,
        versions=versions,
    )


def _requests(bench: Bench, found: Found) -> str:
    if not any(found.has(f"requests {level}", one.name) for level in LEVELS for one in bench.targets):
        return ""
    head = ["gateway", *(f"requests/s, {level}" for level in LEVELS), "added p50, 1", "added p99, 1",
            "added p50, 32", "added p99, 32", "requests per second of processor, 32", "failed"]  # fmt: skip
    rows = []
    for one in bench.targets:
        name = one.name
        cells = [_number(found, f"requests {level}", name, rate) for level in LEVELS]
        if one.processes:
            cells += [_ms(found.added(f"requests {n}", name, q)) for n in (1, 32) for q in ("p50", "p99")]
            cells.append(_number(found, "requests 32", name, per_core()))
        else:
            cells += [
                _ms(found.median(f"requests {n}", name, _of(q))) for n in (1, 32) for q in ("p50", "p99")
            ]
            cells.append("")
        cells.append(
            str(sum(figures["failed"] for n in LEVELS for figures in found.rounds(f"requests {n}", name)))
        )
        rows.append([_bold(name), *cells])
        if name == "tidegate":
            both = _number(found, "requests 32", name, per_core(_all))
            rows.append(["tidegate, with admission's and lifecycle's processor time", *[""] * 7, both, ""])
    return _table("Whole answers", head, rows) + _REQUESTS


def _streams(bench: Bench, found: Found) -> str:
    if not any(found.has("streams", one.name) or found.has("first", one.name) for one in bench.targets):
        return ""
    head = ["gateway", "streams", "chunks/s", "processor s per 10,000 chunks", "chunk delay p50", "p99",
            "memory of a stream", "first token added, p50", "p99", "broken"]  # fmt: skip
    rows = []
    for one in bench.streaming:
        name = one.name
        cells = [
            str(one.streams),
            _number(found, "streams", name, lambda figures: figures["chunks"] / figures["seconds"]),
            _number(found, "streams", name, per_chunks(), 2) if one.processes else "",
            *(_ms(found.median("streams", name, _of(q))) for q in ("p50", "p99")),
            _kib(first_memory(found, "streams", name)) if one.processes else "",
        ]
        if one.processes:
            cells += [_ms(found.added("first", name, q)) for q in ("p50", "p99")]
        else:
            cells += [_ms(found.median("first", name, _of(q))) for q in ("p50", "p99")]
        cells.append(str(sum(figures["failed"] for figures in found.rounds("streams", name))))
        rows.append([_bold(name), *cells])
        if name == "tidegate":
            both = _number(found, "streams", name, per_chunks(_all), 2)
            rows.append(
                ["tidegate, with admission's and lifecycle's processor time", "", "", both, *[""] * 6]
            )
    emitter = found.median("streams", "direct", _of("emitter"))
    client = found.median("streams", "direct", _of("client"))
    return _table("Streams", head, rows) + _STREAMS.format(emitter=emitter, client=client)


def _tidegate(bench: Bench, found: Found) -> str:
    rows = []
    if found.has("waiting", "tidegate"):
        figures = found.rounds("waiting", "tidegate")[0]
        others = sum(figures["memory"][part] for part in _OTHERS) / figures["count"] / 1024
        rows.append([f"memory of a waiting connection, {WAITING:,} of them",
                     f"{_kib(_memory(figures))}, and {_kib(others)} in admission and lifecycle"])  # fmt: skip
    if found.has("tracing", "off", "on"):
        off, on = (found.median("tracing", name, per_core(_all)) for name in ("off", "on"))
        noise = max(found.spread("tracing", name, per_core(_all)) for name in ("off", "on"))
        rows.append([f"processor time that tracing at {SAMPLE:.0%} adds, 32 connections",
                     f"{off / on - 1:+.1%} (± {noise:.1%})"])  # fmt: skip
    if found.has("workers", "1", "2"):
        one, two = (found.median("workers", name, rate) for name in ("1", "2"))
        rows.append(
            ["requests/s with two workers, of one's; 256 connections", f"{two / one:.2f} × ({one:,.0f}/s)"]
        )
    return _table("tidegate alone", ["what", "measured"], rows) if rows else ""


def _targets(found: Found) -> str:
    rows = [row for row in _judged(found) if row]
    return _table("Targets", ["target", "measured", ""], rows) if rows else ""


def _judged(found: Found) -> Iterable[list[str]]:
    """Each target that can be judged by what was measured."""
    level = "requests 32"
    if found.has(level, "tidegate", RIVAL):
        ours, theirs = (found.median(level, name, per_core()) for name in ("tidegate", RIVAL))
        both = found.median(level, "tidegate", per_core(_all))
        text = f"{ours:,.0f} ({both:,.0f} with admission's and lifecycle's) to {theirs:,.0f}"
        if found.has(level, f"{RIVAL}-rr"):
            text += f" ({found.median(level, RIVAL + '-rr', per_core()):,.0f} with round robin)"
        yield _row(f"requests per second of one core at 32 connections ≥ {RIVAL}'s", text, ours >= theirs)
    if found.has(level, "tidegate", "litellm"):
        ours, theirs = (found.median(level, name, per_core()) for name in ("tidegate", "litellm"))
        yield _row("the same ≥ 50 × LiteLLM's", f"{ours / theirs:.0f} ×", ours >= 50 * theirs)
    if found.has("requests 1", "tidegate", "direct"):
        added = found.added("requests 1", "tidegate", "p50")
        yield _row("p50 added at one connection ≤ 2 ms", _ms(added), added <= 0.002)
    if found.has("streams", "tidegate", RIVAL):
        ours, theirs = (found.median("streams", name, per_chunks()) for name in ("tidegate", RIVAL))
        text = f"{ours:.2f} s to {theirs:.2f} s, {ours / theirs:.2f} ×"
        yield _row(f"processor time per 10,000 chunks ≤ 1.15 × {RIVAL}'s", text, ours <= 1.15 * theirs)
        ours, theirs = (found.median("streams", name, _of("p99")) for name in ("tidegate", RIVAL))
        yield _row(f"chunk delay p99 ≤ {RIVAL}'s", f"{_ms(ours)} to {_ms(theirs)}", ours <= theirs)
    if found.has("streams", "tidegate"):
        delay = found.median("streams", "tidegate", _of("p99"))
        yield _row("chunk delay p99 ≤ 20 ms, 500 streams of 50 chunks/s", _ms(delay), delay <= 0.02)
        memory = first_memory(found, "streams", "tidegate")
        yield _row(f"memory of a stream ≤ {KIB} KiB", _kib(memory), memory <= KIB)
    if found.has("waiting", "tidegate"):
        memory = first_memory(found, "waiting", "tidegate")
        yield _row(f"memory of a waiting connection ≤ {KIB} KiB", _kib(memory), memory <= KIB)
    if found.has("tracing", "off", "on"):
        off, on = (found.median("tracing", name, per_core(_all)) for name in ("off", "on"))
        yield _row(f"tracing at {SAMPLE:.0%} costs ≤ 5 %", f"{off / on - 1:+.1%}", off <= 1.05 * on)
    if found.has("workers", "1", "2"):
        one, two = (found.median("workers", name, rate) for name in ("1", "2"))
        yield _row("requests/s with two workers ≥ 1.7 × one's", f"{two / one:.2f} ×", two >= 1.7 * one)


def _missing(bench: Bench) -> str:
    rows = [[what, why.replace("|", "/")] for what, why in bench.failed.items()]
    return _table("Not measured", ["what", "why"], rows) if rows else ""


# Cells.


def _row(target: str, measured: str, met: bool) -> list[str]:
    return [target, measured, "met" if met else "**missed**"]


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"\n## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _number(found: Found, scenario: str, name: str, of: Callable[[Figures], float], digits: int = 0) -> str:
    if not found.has(scenario, name):
        return "–"
    noise = found.spread(scenario, name, of)
    said = f"{found.median(scenario, name, of):,.{digits}f}"
    return f"{said} ± {noise:.0%}" if len(found.rounds(scenario, name)) > 1 else said


def _ms(seconds: float) -> str:
    return "–" if seconds != seconds else f"{seconds * 1000:.2f} ms"


def _kib(size: float) -> str:
    return "–" if size != size else f"{size:.1f} KiB"


def _bold(name: str) -> str:
    return f"**{name}**" if name == "tidegate" else name


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
