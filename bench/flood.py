"""One tenant's flood beside nine that keep to their share; and tenants of unlike weight that all want more.

The slots are the bottleneck here: a request holds one for half a second, so the processor is nearly idle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from bench.client import quantile
from bench.machine import address, gateway, model, peak
from bench.offered import Answer, Load, Offer
from bench.table import Table, ms

SLOTS = 8
SERVICE = 0.5
"""Seconds of a completion, on average."""
TOKENS = 100
SPREAD = 0.5
"""Completions take from half to one and a half of `SERVICE`, as requests of unlike length do."""
CAPACITY = SLOTS / SERVICE
QUEUE = 500
FLOOD = 1000
NINE = [f"tenant-{i}" for i in range(1, 10)]
WEIGHTS = {"one": 1, "another": 1, "two": 2, "four": 4}

SLOWER = 2.0
"""p99 of the nine beside the flood, of that without it."""
FAIR = 0.95
"""Jain's index of slot-seconds by weight."""


def jain(values: Iterable[float]) -> float:
    """Jain's index of fairness (Jain, Chiu, Hawe, DEC-TR-301, 1984): 1 = all have the same, 1/n = one has
    all."""
    shares = list(values)
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares)) if any(shares) else 0.0


def run(seconds: float) -> None:
    """Prints the table: `seconds` without the flood, then as long beside it."""
    table = Table(
        f"A flood of {FLOOD} at once beside nine tenants with half of {CAPACITY:.0f} requests/s",
        "what",
        "measured",
        "without the flood",
        "beside it",
    )
    for spread in (SPREAD, 0.0):
        length = f"{SERVICE * (1 - spread):g}–{SERVICE * (1 + spread):g} s" if spread else f"{SERVICE:g} s"
        nine = [
            Offer(name, CAPACITY / 2 / len(NINE), 0.5, seconds, tokens=TOKENS, spread=spread) for name in NINE
        ]
        flood = Offer("flood", 0, 0.5, 0, FLOOD, TOKENS, spread)
        alone, _ = _answers(nine, {})
        beside, most = _answers([*nine, flood], {})
        _compare(table, f"requests of {length}", alone, beside, most, judged=bool(spread))


def run_shares(seconds: float) -> None:
    """Prints the table: tenants with more demand than they can have, looked at for `seconds`."""
    table = Table(
        "Slot-seconds by weight, each tenant asking for all slots",
        "tenant",
        "weight",
        "length of its requests",
        "share of slot-seconds",
        "by weight",
    )
    lengths = {"one": 0.5, "another": 0.1, "two": 0.5, "four": 0.25}
    offers = [
        Offer(name, SLOTS / length, 0.5, seconds + 5, 40, round(length / SERVICE * TOKENS), 0.5)
        for name, length in lengths.items()
    ]
    answers, _ = _answers(offers, {name: {"weight": weight} for name, weight in WEIGHTS.items()})
    begin, end = 5.0, seconds + 5.0
    had = dict.fromkeys(WEIGHTS, 0.0)
    for answer in answers:
        ended = answer.due + answer.seconds
        if answer.status == 200:
            length = answer.tokens * SERVICE / TOKENS
            had[answer.tenant] += max(0.0, min(ended, end) - max(ended - length, begin))
    due, total = sum(WEIGHTS.values()), sum(had.values())
    for name, weight in WEIGHTS.items():
        share = had[name] / total
        table.row(name, weight, f"{lengths[name]:g} s", f"{share:.3f}", f"{weight / due:.3f}")
    index = jain(had[name] / weight for name, weight in WEIGHTS.items())
    table.row(
        "all",
        due,
        "",
        f"Jain's index {index:.3f}",
        f"{total / (SLOTS * seconds):.1%} of the slots' time",
        target=f"Jain ≥ {FAIR}",
        met=index >= FAIR,
    )


def _answers(offers: list[Offer], tenants: dict[str, dict[str, int]]) -> tuple[list[Answer], int]:
    """What became of all requests, and the most that were ever at once on the model server."""
    models = {"bench": model("--token-time", str(SERVICE / TOKENS), max_concurrent=SLOTS, max_queue=QUEUE)}
    with gateway(models, edge={"auth": "none"}, tenants=tenants) as one:
        server = address(one, "bench")
        connections = sum(offer.count for offer in offers) + 50
        return Load(one.url, offers, connections).answers(), peak(server)


def _compare(
    table: Table, words: str, alone: list[Answer], beside: list[Answer], most: int, judged: bool
) -> None:
    """Without and beside the flood. Not judged: requests that all take equally long, for then the flood's
    first ones end together again and again, and who comes in between waits for up to a whole request."""
    flood = [answer for answer in beside if answer.tenant == "flood"]
    served = [answer for answer in flood if answer.status == 200]
    lasted = max(answer.due + answer.seconds for answer in served)
    during = [answer for answer in beside if answer.tenant != "flood" and answer.due < lasted]
    statuses = Counter(answer.status for answer in during)
    table.row(
        words,
        f"flood: {len(served)} served in {lasted:.0f} s, {len(flood) - len(served)} refused; "
        f"at most {most} at once on {SLOTS} slots",
        f"{len(alone)} requests of the nine",
        f"{len(during)} while it lasted",
    )
    table.row(
        "of the nine's requests not served",
        "",
        sum(answer.status != 200 for answer in alone),
        sum(count for status, count in statuses.items() if status != 200),
        target="0",
        met=set(statuses) == {200},
    )
    without, with_it = ([answer.seconds for answer in answers] for answers in (alone, during))
    for share in (0.5, 0.99):
        ratio = quantile(with_it, share) / quantile(without, share)
        table.row(
            f"p{share * 100:.0f} of the nine",
            f"ratio {ratio:.2f}",
            ms(quantile(without, share)),
            ms(quantile(with_it, share)),
            target=f"≤ {SLOWER}" if share > 0.5 and judged else "",
            met=ratio <= SLOWER if share > 0.5 and judged else None,
        )
    means = [[_mean(answers, name) for name in NINE] for answers in (alone, during)]
    table.row("Jain's index of the nine's mean latencies", "", *(f"{jain(values):.3f}" for values in means))


def _mean(answers: list[Answer], tenant: str) -> float:
    own = [answer.seconds for answer in answers if answer.tenant == tenant]
    return sum(own) / len(own) if own else 0.0
