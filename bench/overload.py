"""Ten times what the slots can serve, through the whole gateway, in an open loop.

What must hold: the slots stay busy, who isn't served hears it at once, and nothing grows.
"""

from __future__ import annotations

import threading
from collections import Counter

from bench.client import quantile
from bench.machine import address, cpu, gateway, model, peak, rss
from bench.offered import Answer, Load, Offer
from bench.table import Table, mib, ms

SLOTS = 8
SERVICE = 0.1
"""Seconds of a completion."""
TIMES = 10
WARM = 2.0
"""Seconds until the queue is full and answers come evenly; not looked at."""

GOODPUT = 0.95
REFUSED = 0.05
"""Seconds until a refusal, p99."""
GROWTH = 1.03
"""Memory at the end, of that after a third."""
_REFUSALS = (429, 503)


def run(seconds: float) -> None:
    """Prints the table."""
    capacity = SLOTS / SERVICE
    models = {"bench": model("--token-time", str(SERVICE / 10), max_concurrent=SLOTS, max_queue=200)}
    with gateway(models) as one:
        server = address(one, "bench")
        pids = {name: one.pid(name) for name in ("edge", "admission")}
        used = {name: cpu(pid) for name, pid in pids.items()}
        load = Load(one.url, [Offer("", TIMES * capacity, 0, seconds)], SLOTS + 250)
        third: dict[str, int] = {}
        timer = threading.Timer(
            seconds / 3 + 1, lambda: third.update({name: rss(pid) for name, pid in pids.items()})
        )
        timer.start()
        answers = load.answers()
        timer.join()
        last = {name: rss(pid) for name, pid in pids.items()}
        used = {name: cpu(pid) - used[name] for name, pid in pids.items()}
        most = peak(server)
    table = Table(
        f"Overload: {SLOTS} slots × {SERVICE} s, {TIMES * capacity:.0f} requests/s for {seconds:.0f} s",
        "what",
        "measured",
        "",
    )
    _judge(table, answers, capacity, seconds)
    table.row("at once on the model server", most, f"{SLOTS} slots", target=f"≤ {SLOTS}", met=most <= SLOTS)
    for name in pids:
        growth = last[name] / third[name]
        table.row(
            f"memory of {name}",
            f"{growth:.3f} of that after a third",
            f"{mib(third[name])} → {mib(last[name])}",
            target=f"≤ {GROWTH}",
            met=growth <= GROWTH,
        )
    for name, busy in used.items():
        table.row(f"processor, {name}", f"{busy / len(answers) * 10_000:.2f} s per 10,000", "")


def _judge(table: Table, answers: list[Answer], capacity: float, seconds: float) -> None:
    """What became of the requests."""
    served = [answer for answer in answers if answer.status == 200]
    refused = [answer.seconds for answer in answers if answer.status in _REFUSALS]
    within = [answer for answer in served if WARM <= answer.due + answer.seconds < seconds]
    goodput = len(within) / (seconds - WARM)
    statuses = Counter(answer.status for answer in answers)
    said = ", ".join(f"{count} × {status or 'nothing'}" for status, count in sorted(statuses.items()))
    table.row("asked", len(answers), said)
    good = goodput / capacity
    table.row(
        "goodput",
        f"{good:.1%} of {capacity:.0f}/s",
        f"{goodput:.1f}/s",
        target=f"≥ {GOODPUT:.0%}",
        met=good >= GOODPUT,
    )
    table.row(
        "refusal, p99",
        ms(quantile(refused, 0.99)),
        f"p50 {ms(quantile(refused, 0.5))}",
        target=f"≤ {ms(REFUSED)}",
        met=quantile(refused, 0.99) <= REFUSED,
    )
    table.row("served, p99", ms(quantile([answer.seconds for answer in served], 0.99)), "in a full queue")
    table.row(
        "other answers",
        len(answers) - len(served) - len(refused),
        target="0",
        met=len(answers) == len(served) + len(refused),
    )
