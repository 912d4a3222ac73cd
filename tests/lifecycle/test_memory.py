"""Others' use and memory that comes back late: never is more promised than the driver shows as free."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.depth import examples
from tidegate_lifecycle.devices.memory import FALL, SETTLE, CardMemory, Ours, Overdue


def test_others_use_is_counted_at_once_and_forgotten_slowly() -> None:
    """It rises with one reading, and falls after it has been lower for a while, to the most of that while."""
    memory, ours = CardMemory(), Ours(resting=10)
    memory.read(13, 0.0, ours)
    assert memory.foreign == 3
    for at, used in ((1.0, 11), (6.0, 12)):
        memory.read(used, at, ours)
        assert memory.foreign == 3
    memory.read(10, 1.0 + FALL, ours)
    assert memory.foreign == 2
    for at in (20.0, 20.0 + FALL):
        memory.read(10, at, ours)
    assert memory.foreign == 0


def test_a_use_that_comes_back_in_time_was_never_gone() -> None:
    """One lower reading changes nothing: the while begins anew with the next one."""
    memory = CardMemory()
    for at, used in enumerate((5, 1, 5, 1, 5), start=0):
        memory.read(used, at * (FALL - 1), Ours())
        assert memory.foreign == 5


def test_a_loading_server_is_not_counted_twice_nor_as_others() -> None:
    """Others' use stays known while a server takes its memory step by step."""
    memory = CardMemory()
    memory.read(5, 0.0, Ours())
    for at, used in enumerate((5, 5, 9, 15), start=1):
        memory.read(used, at * FALL, Ours(loading=10))
        assert (memory.foreign, memory.settling) == (5, 0)
    memory.read(15, 100.0, Ours(resting=10))
    assert memory.foreign == 5


def test_freed_memory_is_promised_when_the_driver_shows_it() -> None:
    """All of it waits for the first reading that was begun after the end; then what is still shown."""
    memory = CardMemory()
    memory.read(15, 0.0, Ours(resting=10))
    memory.gone(10, 10.0)
    assert memory.settling == 10
    memory.read(15, 9.9, Ours())
    assert (memory.settling, memory.foreign) == (10, 5)
    memory.read(8, 10.3, Ours())
    assert (memory.settling, memory.foreign) == (3, 5)
    memory.read(5, 10.5, Ours())
    assert (memory.settling, memory.foreign) == (0, 5)


def test_what_never_comes_back_counts_as_others() -> None:
    """After the bound, with what was missing; if it does come back later, the reserve falls."""
    memory = CardMemory()
    memory.read(10, 0.0, Ours(resting=10))
    memory.gone(10, 10.0)
    memory.read(7, 11.0, Ours())
    assert memory.settle(Ours(), 10.0 + SETTLE - 0.1) is None
    assert memory.bound == 10.0 + SETTLE
    assert memory.settle(Ours(), memory.bound) == Overdue(7, seen=True)
    assert (memory.settling, memory.foreign) == (0, 7)
    for at in (100.0, 100.0 + FALL):
        memory.read(0, at, Ours())
    assert memory.foreign == 0


def test_without_readings_memory_is_free_after_the_bound() -> None:
    """A driver that has hung must not make cards look full for ever; that it wasn't verified is said."""
    memory = CardMemory()
    memory.read(10, 0.0, Ours(resting=10))
    memory.gone(10, 10.0)
    assert memory.settle(Ours(), 10.0 + SETTLE) == Overdue(10, seen=False)
    assert (memory.settling, memory.foreign) == (0, 0)


def test_a_loading_neighbour_hides_nothing() -> None:
    """What it shows can't be told from what doesn't come back: the bound begins with its end."""
    memory = CardMemory()
    memory.read(10, 0.0, Ours(resting=10))
    memory.gone(10, 10.0)
    memory.read(10, 11.0, Ours(loading=10))
    for at in (11.0, 50.0):
        assert memory.settle(Ours(loading=10), at) is None
    assert memory.settling == 10
    memory.read(10, 51.0, Ours(resting=10))
    assert (memory.settling, memory.foreign) == (0, 0)


@dataclass
class Machine:
    """A card with others on it and servers that come, take what they reserve or less, and go late."""

    random: random.Random
    now: float = 0.0
    others: int = 0
    ours: dict[int, tuple[int, int, bool]] = field(default_factory=dict)
    """Reserved, taken, loading."""
    leaving: list[int] = field(default_factory=list)
    """MiB of servers that have ended, not free yet."""
    n: int = 0

    @property
    def used(self) -> int:
        return self.others + sum(taken for _, taken, _ in self.ours.values()) + sum(self.leaving)

    def held(self) -> Ours:
        return Ours(
            sum(reserved for reserved, _, loading in self.ours.values() if not loading),
            sum(reserved for reserved, _, loading in self.ours.values() if loading),
        )

    def step(self, memory: CardMemory) -> None:
        self.now += self.random.choice([0.25, 1.0, 5.0])
        match self.random.choice(["start", "take", "ready", "end", "free", "others"]):
            case "start":
                self.n += 1
                self.ours[self.n] = (self.random.randint(1, 40), 0, True)
            case "take" if self.ours:
                key = self.random.choice(list(self.ours))
                reserved, taken, loading = self.ours[key]
                self.ours[key] = reserved, self.random.randint(taken, reserved), loading
            case "ready" if self.ours:
                key = self.random.choice(list(self.ours))
                self.ours[key] = *self.ours[key][:2], False
            case "end" if self.ours:
                reserved, taken, _ = self.ours.pop(self.random.choice(list(self.ours)))
                self.leaving.append(taken)
                memory.gone(reserved, self.now)
            case "free" if self.leaving:
                self.leaving.pop(self.random.randrange(len(self.leaving)))
            case "others":
                self.others = self.random.randint(0, 40)


@settings(max_examples=examples(100), deadline=None)
@given(seed=st.integers(0, 10**9))
def test_no_more_is_promised_than_the_driver_shows_as_free(seed: int) -> None:
    """At every fresh reading, and after the bound, others + ours + settling cover what is used; and when all
    is at rest the reserve ends up at just what others use beyond our reservations."""
    machine, memory = Machine(random.Random(seed)), CardMemory()
    for _ in range(200):
        machine.step(memory)
        memory.settle(machine.held(), machine.now)
        if machine.random.random() < 0.7:
            memory.read(machine.used, machine.now, machine.held())
            assert memory.foreign + machine.held().all + memory.settling >= machine.used
            assert memory.foreign >= 0
            assert memory.settling >= 0
    machine.leaving.clear()
    machine.ours = {key: (reserved, taken, False) for key, (reserved, taken, _) in machine.ours.items()}
    for _ in range(40):
        machine.now += 1.0
        memory.read(machine.used, machine.now, machine.held())
        memory.settle(machine.held(), machine.now)
    assert memory.foreign == max(0, machine.used - machine.held().all)
    assert memory.settling == 0
