"""The cards of this machine, as its own nvidia-smi shows them."""

from __future__ import annotations

import pytest

from tidegate_lifecycle.devices import Devices, HostSmi
from tidegate_lifecycle.devices.parsing import QUERY, parse

pytestmark = pytest.mark.gpu


async def test_every_card_that_is_listed_is_read() -> None:
    """Each has a UUID, a name, and memory of which no more is used than there is; or a reason."""
    listed = [line for line in (await HostSmi().ask("-L")).splitlines() if line.startswith("GPU ")]
    cards = parse(await HostSmi().ask(*QUERY))
    assert len(cards) == len(listed) > 0
    for card, line in zip(cards, listed, strict=True):
        assert line.startswith(f"GPU {card.number}: {card.name} (UUID: {card.uuid})")
        if not card.parted:
            assert card.problem or (card.total and card.used is not None and 0 <= card.used <= card.total)


async def test_devices_are_read_again() -> None:
    """The same cards, none of them missing, each with its memory or a reason."""
    devices = Devices(())
    first = await devices.open()
    again = await devices.read()
    assert [(one.id, one.uuid, one.total_mib) for one in again] == [
        (one.id, one.uuid, one.total_mib) for one in first
    ]
    for device in again:
        assert not device.missing
        assert (device.used_mib is None) == bool(device.problem)
        assert device.visible_as == device.uuid
