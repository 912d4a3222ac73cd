"""Clients: tenants of different weights and bands, for models that don't all fit, now many and now few."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tests.simulation.edge import Client
from tests.simulation.world import World
from tidegate_edge.ticket import Band

MOOD = (20.0, 120.0)
"""Seconds for which the rates stay the same."""


@dataclass(frozen=True)
class Habit:
    """How one tenant asks."""

    tenant: str
    band: Band = Band.NORMAL
    rate: float = 0.5
    """Requests per second while it is active."""
    length: tuple[float, float] = (0.2, 6.0)
    """Seconds that a request takes on the model server."""


@dataclass
class Traffic:
    """Sends clients until it is told to stop."""

    world: World
    habits: tuple[Habit, ...]
    vanishing: float = 0.0
    """Share of the relays that vanish without a word."""
    on: bool = True

    def begin(self) -> None:
        """Begins."""
        for habit in self.habits:
            self._next(habit, 0.0, "")

    def _next(self, habit: Habit, mood_ends: float, model: str) -> None:
        world, dice = self.world, self.world.random
        if not self.on:
            return
        if world.now >= mood_ends:
            mood_ends = world.now + dice.uniform(*MOOD)
            model = dice.choice([*world.models, ""])  # now and then it asks for nothing
        if model:
            name = dice.choice(list(world.models)) if dice.random() < 0.1 else model
            self.send(habit, name)
            pause = dice.expovariate(habit.rate)
        else:
            pause = mood_ends - world.now
        world.after(pause, functools.partial(self._next, habit, mood_ends, model))

    def send(self, habit: Habit, model: str) -> Client | None:
        """One client comes to one of the edges; None when there is none."""
        world, dice = self.world, self.world.random
        edges = world.living_edges()
        if not edges:
            return None
        client = Client(
            world.count(),
            "unheard-of" if dice.random() < 0.01 else model,
            habit.tenant,
            habit.band,
            deadline=dice.uniform(0.5, 30.0) if dice.random() < 0.3 else 0.0,
            length=dice.uniform(*habit.length) * (10.0 if dice.random() < 0.03 else 1.0),
            backpressure=dice.random() < 0.02,
            vanishes=dice.random() < self.vanishing,
            patience=dice.uniform(0.0, 40.0) if dice.random() < 0.3 else 0.0,
            came=world.now,
        )
        world.clients.append(client)
        edge = dice.choice(edges)
        edge.arrive(client)
        return client
