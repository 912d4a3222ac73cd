"""`make bench-peers`: tidegate and its peers in one run, with the same upstream and one core each.

A whole run takes about eight minutes once the peers are installed, and writes its tables to `bench/peers.md`;
`ARGS="--quick"` looks at everything for a shorter time, `ARGS="--only streams --gateways direct,tidegate"` at
some of it. Those write to `bench/out/peers/peers.md`. All figures are in `bench/out/peers/results.json`.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import time
from contextlib import ExitStack

from bench.peers import gateways, install, report
from bench.peers.gateways import Cores, Target, Upstreams
from bench.peers.measure import SCENARIOS, Bench

_FILES = 16_000
"""Open files that 5,000 connections need on both sides."""


def main() -> int:
    """Runs what was asked for."""
    arguments = _arguments()
    names, scenarios = arguments.gateways.split(","), arguments.only.split(",")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("two cores are needed: one for the gateway, one for upstream and load", file=sys.stderr)
        return 1
    _raise_files()
    shutil.rmtree(gateways.RUN, ignore_errors=True)
    gateways.RUN.mkdir(parents=True)
    began, before = time.monotonic(), os.getloadavg()[0]
    ours = Cores(frozenset(cores[:1]), frozenset(cores[1:]))
    os.sched_setaffinity(0, ours.rest)
    with ExitStack() as stack:
        try:
            install.install("wrk")
            upstreams = Upstreams(stack, ours)
        except install.Missing as error:
            print(f"nothing can be measured: {error}", file=sys.stderr)
            return 1
        rounds, seconds = (1, 1) if arguments.quick else (3, 2)
        bench = Bench(stack, ours, upstreams, [], arguments.rounds or rounds, seconds)
        bench.targets = _start(names, bench)
        for name in SCENARIOS:
            if name in scenarios:
                SCENARIOS[name](bench)
        taken = time.monotonic() - began
        whole = not arguments.quick and set(names) == set(gateways.NAMES) and set(scenarios) == set(SCENARIOS)
        report.write(bench, whole, taken, before)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench-peers", description=__doc__)
    parser.add_argument("--only", default=",".join(SCENARIOS), help="some of: %(default)s")
    parser.add_argument("--gateways", default=",".join(gateways.NAMES), help="some of: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one round of a second each")
    parser.add_argument("--rounds", type=int, help="rounds of each measurement; 3 unless --quick")
    arguments = parser.parse_args()
    for value, known in ((arguments.only, set(SCENARIOS)), (arguments.gateways, set(gateways.NAMES))):
        if unknown := sorted(set(value.split(",")) - known):
            parser.error(f"{', '.join(unknown)} is unknown; there are {', '.join(sorted(known))}")
    return arguments


def _start(names: list[str], bench: Bench) -> list[Target]:
    """Those of the gateways that can be had; why not the others is noted."""
    targets = []
    for name in gateways.NAMES:
        if name not in names:
            continue
        try:
            targets.append(gateways.start(name, bench.stack, bench.upstreams, bench.cores))
        except install.Missing as error:
            bench.failed[name] = str(error).splitlines()[0][:200]
            print(f"skipped: {error}", flush=True)
    return targets


def _raise_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
