"""What the fleet makes of the driver's readings."""

from __future__ import annotations

from pathlib import Path

from tidegate_lifecycle.catalog import Catalog
from tidegate_lifecycle.devices import Device
from tidegate_lifecycle.fleet import SETTLE, Fleet
from tidegate_lifecycle.instance import Instance, InstanceState
from tidegate_lifecycle.link import Link
from tidegate_lifecycle.store import Store
from tidegate_lifecycle.world import Policy


def device(used: int) -> Device:
    return Device("gpu0", "default", 24000, 22000, 0, "GPU-1", "card", used)


def fleet(tmp_path: Path) -> Fleet:
    link = Link(1, None)
    return Fleet(Catalog({}), Policy(), tmp_path, 1, link, Store(tmp_path), [device(0)], {})


def test_foreign_use(tmp_path: Path) -> None:
    """What the driver shows beyond our own reservations is others' use."""
    one = fleet(tmp_path)
    one.instances["i"] = Instance("i", "m", ("gpu0",), 10000, 0.0, InstanceState.READY)
    one.read_devices([device(13000)], 100.0)
    assert one.cards()[0].foreign_mib == 3000
    one.read_devices([device(9000)], 110.0)
    assert one.cards()[0].foreign_mib == 0


def test_memory_that_comes_back_late_is_not_foreign(tmp_path: Path) -> None:
    """A reading from around the end of a server of ours says nothing about others."""
    one = fleet(tmp_path)
    one.freed["gpu0"] = 100.0
    for began in (99.0, 100.0 + SETTLE / 2):
        one.read_devices([device(10000)], began)
        assert one.cards()[0].foreign_mib == 0
    one.read_devices([device(10000)], 100.0 + SETTLE)
    assert one.cards()[0].foreign_mib == 10000
