"""The scenarios: each measures all gateways in turn, several rounds of it, so that noise meets all alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from bench.peers import load
from bench.peers.gateways import SLOW, Cores, Target, Upstreams, children, tidegate
from bench.peers.load import Figures
from tests.support.collector import Collector
from tests.support.gateway import wait_for

LEVELS = (1, 32, 256)
"""Connections."""
WAITING = 5000
SAMPLE = 0.01
"""Share of requests that are traced."""
_MANY_CORES = 4
"""What two workers, upstream, load and admission need."""


@dataclass
class Bench:
    """What a run has: gateways that are up, and how long it looks at each."""

    stack: ExitStack
    cores: Cores
    upstreams: Upstreams
    targets: list[Target]
    rounds: int
    seconds: int
    """Of one measurement."""
    found: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    """By scenario and gateway: figures of each round."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why something wasn't measured, by what it is."""

    def keep(self, scenario: str, name: str, figures: Figures) -> None:
        """Adds a round's figures."""
        self.found.setdefault(scenario, {}).setdefault(name, []).append(figures)

    @property
    def streaming(self) -> list[Target]:
        """Those that are measured with streams."""
        return [target for target in self.targets if target.streams]

    def turns(self, targets: list[Target] | None = None) -> Iterator[tuple[int, Target]]:
        """Every gateway once in each round; who comes first changes."""
        some = self.targets if targets is None else targets
        for number in range(self.rounds):
            shift = number * 3 % len(some)
            for target in some[shift:] + some[:shift]:
                yield number, target

    def measure(self, scenario: str, target: Target, what: Callable[[], Figures]) -> None:
        """One measurement; a gateway that fails it is named, and the others are measured all the same."""
        try:
            self.keep(scenario, target.name, what())
        except (AssertionError, OSError, ValueError) as error:
            self.failed[f"{target.name}, {scenario}"] = str(error).splitlines()[0][:200]
        load.settle(target)


def requests(bench: Bench) -> None:
    """Requests a second and latency at each level of load."""
    for target in bench.targets:
        load.requests(target, 8, 1, bench.cores)  # what is new to it isn't looked at
        load.settle(target)
    for connections in LEVELS:
        print(f"requests, {connections} connections", flush=True)
        for number, target in bench.turns():
            if not (target.slow and number and connections != 32):
                bench.measure(
                    f"requests {connections}",
                    target,
                    lambda: load.requests(target, connections, bench.seconds, bench.cores),  # noqa: B023
                )


def first(bench: Bench) -> None:
    """Time to the first token."""
    print("time to the first token", flush=True)
    for _, target in bench.turns(bench.streaming):
        bench.measure("first", target, lambda: load.first(target, bench.seconds, bench.cores))  # noqa: B023


def streams(bench: Bench) -> None:
    """Streams at once: processor time, delay and memory."""
    print("streams", flush=True)
    leader = bench.upstreams.emitter
    emitter = Target("emitter", "", {}, {"emitter": lambda: children(leader)})
    for number, target in bench.turns(bench.streaming):
        if not (target.slow and number):
            bench.measure(
                "streams",
                target,
                lambda: load.streams(target, emitter, bench.seconds * 1.5, bench.cores),  # noqa: B023
            )


def waiting(bench: Bench) -> None:
    """Memory of requests that wait for a slot; a gateway of its own, that has served little before."""
    print("waiting connections", flush=True)
    with ExitStack() as stack:
        target, one = tidegate(stack, bench.upstreams, bench.cores)
        load.requests(target, 32, 1, bench.cores)
        with load.held(target, SLOW, 1, bench.cores):
            wait_for(lambda: one.queue(SLOW)["active"] == 1, "the slot is taken")
            before = target.rss()
            with load.held(target, SLOW, WAITING, bench.cores):
                wait_for(lambda: one.queue(SLOW)["waiting"] == WAITING, "all wait", 60)
                grown = {part: size - before[part] for part, size in target.rss().items()}
                bench.keep("waiting", "tidegate", {"memory": grown, "count": WAITING})
            wait_for(lambda: one.queue(SLOW)["waiting"] == 0, "none waits any more", 60)


def tracing(bench: Bench) -> None:
    """Processor time of a request with tracing of one in a hundred, and with none, in turn."""
    print("tracing", flush=True)
    with ExitStack() as stack:
        collector = Collector()
        stack.callback(collector.close)
        traced = {"log_level": "warning", "otlp_endpoint": collector.endpoint, "sample": SAMPLE}
        pair = [
            tidegate(stack, bench.upstreams, bench.cores)[0],
            tidegate(stack, bench.upstreams, bench.cores, telemetry=traced)[0],
        ]
        for one, name in zip(pair, ("off", "on"), strict=True):
            one.name = name
            load.requests(one, 32, 1, bench.cores)
        for _ in range(2):
            for _, one in bench.turns(pair):
                bench.measure("tracing", one, lambda: load.requests(one, 32, bench.seconds, bench.cores))  # noqa: B023
        if not collector.spans():
            bench.failed["tracing"] = "no span came"


def workers(bench: Bench) -> None:
    """Requests a second with one worker and with two, on two cores."""
    cores = sorted(bench.cores.gateway | bench.cores.rest)
    if len(cores) < _MANY_CORES:
        bench.failed["workers"] = f"needs {_MANY_CORES} cores, there are {len(cores)}"
        return
    print("workers", flush=True)
    two = Cores(frozenset(cores[:2]), frozenset(cores[2:]))
    with ExitStack() as stack:
        pair = []
        for count in (1, 2):
            target, _ = tidegate(stack, bench.upstreams, two, edge={"workers": count})
            target.name = str(count)
            load.requests(target, 64, 1, two)
            pair.append(target)
        for _, one in bench.turns(pair):
            bench.measure("workers", one, lambda: load.requests(one, 256, bench.seconds, two, threads=2))  # noqa: B023


SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "streams": streams,  # first: memory that other loads have left would be used again
    "first": first,
    "requests": requests,
    "waiting": waiting,
    "tracing": tracing,
    "workers": workers,
}
