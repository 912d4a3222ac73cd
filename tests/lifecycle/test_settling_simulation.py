"""The planner's promises for hours of virtual time, while freed memory comes back late."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lifecycle.test_simulation import make
from tests.lifecycle.toy import LOAD, POLICY, Simulation
from tests.support.depth import examples
from tidegate_lifecycle.budget import Card
from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.world import STOP_TIME, Start, World

LATEST = 8.0
"""Seconds until the memory of a server that has gone is shown as free, at most."""


@dataclass
class Settling(Simulation):
    """Memory of servers that have gone stays in use for a while."""

    late: list[tuple[str, int, float]] = field(default_factory=list)
    """Card, MiB, and when it is shown as free."""

    def settling(self, card: str) -> int:
        return sum(mib for name, mib, at in self.late if name == card and at > self.now)

    def _runtime(self) -> None:
        before = dict(self.instances)
        super()._runtime()
        for name in sorted(before.keys() - self.instances.keys()):
            at = self.now + self.random.uniform(0, LATEST)
            self.late += [(card, before[name].reserved_mib, at) for card in before[name].devices]

    def _world(self) -> World:
        cards = (
            dataclasses.replace(card, settling_mib=self.settling(card.id), settles=LATEST)
            for card in self.cards
        )
        return dataclasses.replace(super()._world(), cards=tuple(cards))

    def _start(self, action: Start) -> None:
        for card in action.devices:
            assert not self.settling(card), f"{action} while memory settles"
        super()._start(action)


def late(simulation: Simulation) -> Settling:
    return Settling(**{one.name: getattr(simulation, one.name) for one in dataclasses.fields(Simulation)})


@settings(max_examples=examples(25), deadline=None)
@given(seed=st.integers(0, 10**9), outages=st.booleans(), failures=st.sampled_from([0.0, 0.2]))
def test_promises_hold(seed: int, outages: bool, failures: float) -> None:
    """Whatever comes: nothing starts beside memory that settles, and all that is promised elsewhere."""
    late(make(seed, outages, failures)).run(240)


def test_everything_wanted_gets_its_turn() -> None:
    """Settling is a part of each turn, and room that was made isn't lost to others meanwhile."""
    names = "abcd"
    models = {name: Model(name, vram_mib=15) for name in names}
    cards = (Card("gpu0", "default", 24, 24),)
    one = late(make(1, False, 0.0))
    simulation = Settling(one.random, models, cards, dict.fromkeys(names, 0.3), slots=1000, strict=True)
    simulation.run(1800)
    turn = POLICY.max_swap_wait + POLICY.drain_timeout + STOP_TIME + LATEST + LOAD
    assert 0 < simulation.longest_wait <= len(names) * turn + LOAD
    assert simulation.granted > 1800 * 0.3 * len(names) * 0.8
