"""Reading the cards through stub programs called nvidia-smi."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tidegate_chassis.config import ConfigError
from tidegate_lifecycle.catalog import DeviceSpec
from tidegate_lifecycle.devices import Devices

TWO = "0, GPU-aaa, NVIDIA H200, 143771, 500, 143271\n1, GPU-bbb, NVIDIA H200, SXM, 143771, 0, 143771\n"

Smi = Callable[[str], Path]


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smi:
    """Puts a shell script called nvidia-smi first on the PATH; may be called again to change it."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(script: str) -> Path:
        path = tmp_path / "nvidia-smi"
        new = tmp_path / "new"
        new.write_text(f"#!/bin/sh\n{script}\n")
        new.chmod(0o755)
        new.replace(path)
        return path

    return write


def shows(text: str) -> str:
    """A script that prints the text."""
    return f"cat <<'END'\n{text.rstrip()}\nEND"


def devices(*specs: DeviceSpec, deadline: float = 5.0) -> Devices:
    """Without long pauses."""
    return Devices(specs, deadline, (0.01, 0.01))


async def test_without_specs_every_card_is_taken(smi: Smi) -> None:
    """Each card has its index as id, a budget, and what is in use now."""
    smi(shows(TWO))
    first, second = await devices().open()
    assert (first.id, first.uuid, first.index, first.name) == ("0", "GPU-aaa", 0, "NVIDIA H200")
    assert (first.total_mib, first.used_mib, first.budget_mib) == (143771, 500, int(143771 * 0.92))
    assert (second.name, second.used_mib, second.problem) == ("NVIDIA H200, SXM", 0, "")
    assert second.visible_as == "GPU-bbb"


async def test_declared_memory_needs_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With memory given nvidia-smi isn't even looked for."""
    monkeypatch.setenv("PATH", str(tmp_path))
    cards = devices(DeviceSpec("gpu0", 24576, "fast", 0.5))
    (device,) = await cards.open()
    assert (device.total_mib, device.budget_mib, device.pool, device.used_mib) == (24576, 12288, "fast", None)
    assert device.visible_as == ""
    assert await cards.read() == [device]


async def test_a_card_is_named_by_index_or_uuid_beside_declared_ones(smi: Smi) -> None:
    """Without memory the id says which card; its memory is read."""
    smi(shows(TWO))
    found = await devices(DeviceSpec("gpu-BBB"), DeviceSpec("0", pool="p"), DeviceSpec("d", 100)).open()
    assert [(device.index, device.total_mib, device.pool) for device in found] == [
        (1, 143771, "default"),
        (0, 143771, "p"),
        (None, 100, "default"),
    ]


async def test_cards_that_are_not_there_are_all_named(smi: Smi) -> None:
    """Every wrong entry is a problem of its own, with what there is."""
    smi(shows(TWO))
    with pytest.raises(ConfigError) as refusal:
        await devices(DeviceSpec("7"), DeviceSpec("0"), DeviceSpec("GPU-aaa")).open()
    missing, twice = refusal.value.problems
    assert missing.path == "lifecycle.devices.0"
    assert "'7'" in missing.message
    assert "0 (GPU-aaa), 1 (GPU-bbb)" in missing.message
    assert (twice.path, "listed twice" in twice.message) == ("lifecycle.devices.2", True)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("printf '\\000\\177ELF not, what, you expected\\n,,,\\n'", "nvidia-smi shows no card, but"),
        ("", "nvidia-smi shows no card"),
        ("echo 'No devices were found'", "but 'No devices were found'"),
        (
            'echo "couldn\'t communicate with the driver"; exit 9',
            "failed with status 9: couldn't communicate",
        ),
        ("exec sleep 600", "gave no answer within 0.3 s"),
        (shows(TWO + TWO), "shows an index twice"),
        (shows("0, GPU-a, GB10, [N/A], [N/A], [N/A]"), "the driver doesn't tell the memory of card 0"),
        (shows("0, GPU-a, Broken, 0, 0, 0"), "the driver doesn't tell the memory of card 0"),
        (shows("0, GPU-a, Broken, -5, 0, 0"), "the driver doesn't tell the memory of card 0"),
    ],
)
async def test_no_readable_card_refuses_to_start_and_says_what_to_do(
    smi: Smi, script: str, words: str
) -> None:
    """The reason, and the way out: declare the cards, or make nvidia-smi work."""
    smi(script)
    begun = time.monotonic()
    with pytest.raises(ConfigError) as refusal:
        await devices(deadline=0.3).open()
    assert time.monotonic() - begun < 10
    (problem,) = refusal.value.problems
    assert problem.path == "lifecycle.devices"
    assert words in problem.message
    assert "declare the cards under lifecycle.devices" in problem.message


async def test_a_missing_nvidia_smi_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No driver installed: the same way out."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"nvidia-smi was not found; declare the cards"):
        await devices().open()


async def test_a_try_that_fails_is_repeated(smi: Smi, tmp_path: Path) -> None:
    """Two failures are forgiven: a driver that is just being loaded."""
    smi(f"echo x >> {tmp_path}/tries\n[ $(wc -l < {tmp_path}/tries) -ge 3 ] || exit 1\n{shows(TWO)}")
    assert len(await devices().open()) == 2
    assert len((tmp_path / "tries").read_text().split()) == 3


async def test_unreadable_fields_are_a_reason_and_no_zero(smi: Smi) -> None:
    """A card without a total is shown with its problem; a use beyond the total is unknown."""
    smi(shows("0, GPU-a, Good, 1000, 10, 990\n1, GPU-b, Odd, 1000, 2000, 0\n2, GPU-c, Dark, [N/A], 5, 5"))
    good, odd, dark = await devices().open()
    assert (good.used_mib, good.problem) == (10, "")
    assert (odd.total_mib, odd.used_mib, odd.problem) == (
        1000,
        None,
        "the driver doesn't tell the use of card 1",
    )
    assert (dark.total_mib, dark.budget_mib, bool(dark.problem)) == (0, 0, True)
    smi(shows("0, GPU-a, Good, 1000, [N/A], 400"))
    (device,) = await devices().open()
    assert device.used_mib == 600


async def test_reading_never_raises_and_keeps_the_last_values(smi: Smi) -> None:
    """A driver that fails later leaves the cards known, with a problem that goes when it comes back."""
    smi(shows(TWO))
    cards = devices(deadline=0.3)
    await cards.open()
    smi("exec sleep 600")
    first, second = await cards.read()
    assert (first.used_mib, first.problem) == (500, "nvidia-smi gave no answer within 0.3 s")
    assert second.total_mib == 143771
    smi(shows("0, GPU-aaa, NVIDIA H200, 143771, 600, 143171"))
    first, second = await cards.read()
    assert (first.used_mib, first.problem) == (600, "")
    assert "any more" in second.problem
    smi(shows(TWO))
    assert [device.problem for device in await cards.read()] == ["", ""]
