"""What the fleet makes of the driver's readings."""

from __future__ import annotations

import dataclasses

from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.devices.memory import FALL, SETTLE
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.inventory import Inventory

CARD = Device("0", "default", 24000, 22000, 0, "GPU-1", "card", 0)


def device(used: int, **changes: object) -> Device:
    return dataclasses.replace(CARD, used_mib=used, **changes)  # type: ignore[arg-type]


def server(reserved: int, state: InstanceState = InstanceState.READY) -> Instance:
    return Instance("i", "m", ("0",), reserved, 0.0, state)


def test_foreign_use() -> None:
    """What the driver shows beyond our own reservations is others' use."""
    inventory = Inventory([device(0)])
    inventory.read([device(13000)], 100.0, [server(10000)])
    assert inventory.cards()[0].foreign_mib == 3000
    for at in (110.0, 110.0 + FALL):
        inventory.read([device(9000)], at, [server(10000)])
    assert inventory.cards()[0].foreign_mib == 0


def test_memory_that_comes_back_late_is_neither_foreign_nor_free() -> None:
    """It settles until a reading from after the server's end shows it free, or the bound has passed."""
    inventory = Inventory([device(0)])
    inventory.gone(server(10000), 100.0)
    assert (inventory.settling, inventory.bound) == (True, 100.0 + SETTLE)
    for began in (99.0, 101.0):
        inventory.read([device(10000)], began, [])
        (card,) = inventory.cards()
        assert (card.foreign_mib, card.settling_mib) == (0, 10000)
    ((kind, words),) = inventory.settle([], 100.0 + SETTLE)
    assert kind == "unsettled"
    assert "10000 MiB of servers that ended on 0 are still in use after 15 s" in words
    (card,) = inventory.cards()
    assert (card.foreign_mib, card.settling_mib, inventory.settling) == (10000, 0, False)


def test_a_declared_card_needs_no_word_of_the_driver() -> None:
    """Nobody could verify it: what is freed there is free."""
    declared = Device("0", "default", 24000, 22000, None, "", "", None)
    inventory = Inventory([declared])
    inventory.gone(server(10000), 100.0)
    assert not inventory.settling


def test_a_reading_that_failed_says_nothing_of_memory() -> None:
    """The old number that such a device still shows isn't taken for a new one; that it failed is an event."""
    inventory = Inventory([device(0)])
    inventory.gone(server(10000), 100.0)
    stale = device(0, problem="nvidia-smi was not found", since=101.0)
    assert inventory.read([stale], 101.0, []) == [("device_problem", "0: nvidia-smi was not found")]
    assert inventory.read([stale], 102.0, []) == []
    assert inventory.cards()[0].settling_mib == 10000
    assert inventory.read([device(0)], 103.0, []) == [("device_readable", "0: it can be read again")]
    assert inventory.cards()[0].settling_mib == 0


def test_what_was_taken_back_is_known_by_uuid() -> None:
    """An index may be another card's after a restart; a device that isn't there now stays taken back."""
    inventory = Inventory([device(0)], {"GPU-9", "GPU-1"})
    (card,) = inventory.cards()
    assert card.draining
    assert inventory.find("GPU-1") is inventory.find("0") is not None
    assert inventory.find("1") is inventory.find("") is None
    assert inventory.take_back(device(0), True) == []
    assert inventory.take_back(device(0), False) == [("device_given", "0 was given back by an operator")]
    assert inventory.taken == {"GPU-9"}
