"""Reading the cards through stub programs called nvidia-smi."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tidegate_chassis.config import ConfigError
from tidegate_lifecycle.catalog import DeviceSpec
from tidegate_lifecycle.devices import Devices, HostSmi, Unreadable

from .conftest import eventually

TWO = (
    "0, GPU-aaa, NVIDIA H200, 143771, 500, 143271, Disabled\n"
    "1, GPU-bbb, NVIDIA H200, SXM, 143771, 0, 143771, Disabled\n"
)

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
    return Devices(specs, deadline=deadline, backoff=(0.01, 0.01))


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
        (
            shows("0, GPU-a, NVIDIA GB10, [N/A], [N/A], [N/A], [N/A]"),
            "the driver doesn't tell the memory of card 0 (NVIDIA GB10: [N/A])",
        ),
        (
            shows("0, GPU-a, A100, [Insufficient Permissions], 5, 5, Disabled"),
            "card 0 (A100: [Insufficient Permissions])",
        ),
        (
            shows("0, [N/A], Lost, [GPU is lost], [GPU is lost], [GPU is lost], [N/A]"),
            "card 0 (Lost: [GPU is lost])",
        ),
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


async def test_a_card_that_shares_the_machines_memory_is_to_be_declared(smi: Smi) -> None:
    """How, and how much memory the machine has; declared by its UUID its servers find it."""
    smi(shows("0, GPU-a, NVIDIA GB10, [N/A], [N/A], [N/A], [N/A]"))
    with pytest.raises(
        ConfigError, match=r"shares the machine's memory \(\d{3,} MiB\) is declared with a part"
    ):
        await devices().open()
    with pytest.raises(ConfigError, match=r"NVIDIA GB10: \[N/A\]\); give its memory"):
        await devices(DeviceSpec("GPU-a")).open()
    specs = DeviceSpec("GPU-a", 100000), DeviceSpec("1", 100), DeviceSpec("gpu0", 100)
    assert [device.visible_as for device in await devices(*specs).open()] == ["GPU-a", "", ""]


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
        "the driver doesn't tell the use of card 1 (2000)",
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
    since = first.since
    assert since is not None
    first, second = await cards.read()
    assert first.since == since
    smi(shows("0, GPU-aaa, NVIDIA H200, 143771, 600, 143171"))
    first, second = await cards.read()
    assert (first.used_mib, first.problem, first.since, first.missing) == (600, "", None, False)
    assert ("any more" in second.problem, second.missing, second.since) == (True, True, since)
    smi(shows(TWO))
    assert [(one.problem, one.missing, one.since) for one in await cards.read()] == [("", False, None)] * 2


async def test_a_card_is_known_by_its_uuid(smi: Smi) -> None:
    """Indexes change when another one vanishes, or with the order; ids and memory stay with their cards."""
    smi(shows("0, GPU-a, A, 1000, 1, 999\n1, GPU-b, B, 2000, 2, 1998\n2, GPU-c, C, 3000, 3, 2997"))
    cards = devices()
    await cards.open()
    smi(shows("0, GPU-c, C, 3000, 30, 2970\n1, GPU-b, B, 2000, 20, 1980"))
    first, second, third = await cards.read()
    assert (first.id, first.uuid, first.missing) == ("0", "GPU-a", True)
    assert (second.id, second.used_mib, second.index, second.problem) == ("1", 20, 1, "")
    assert (third.id, third.used_mib, third.index, third.visible_as) == ("2", 30, 0, "GPU-c")


async def test_a_total_that_changes_is_taken_in(smi: Smi) -> None:
    """With the card's own share of it as budget."""
    smi(shows("0, GPU-a, A, 1000, 0, 1000"))
    cards = devices(DeviceSpec("GPU-a", budget=0.5))
    await cards.open()
    smi(shows("0, GPU-a, A, 900, 0, 900"))
    (device,) = await cards.read()
    assert (device.total_mib, device.budget_mib) == (900, 450)


async def test_a_program_that_hangs_in_the_driver_gets_none_beside_it(
    smi: Smi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that can't even be killed is waited for: each reading fails at once until it has ended."""
    smi("exec sleep 600")
    stuck: list[subprocess.Popen[str]] = []

    def unkillable(process: subprocess.Popen[str]) -> None:
        stuck.append(process)

    monkeypatch.setattr(subprocess.Popen, "kill", unkillable)
    program = HostSmi()
    try:
        with pytest.raises(Unreadable, match="gave no answer"):
            await program.ask("-L", deadline=0.1)
        smi(shows(TWO))
        with pytest.raises(Unreadable, match=rf"an earlier nvidia-smi \(process {stuck[0].pid}\) hangs"):
            await program.ask("-L")
    finally:
        monkeypatch.undo()
        monkeypatch.setenv("PATH", f"{smi(shows(TWO)).parent}:{os.environ['PATH']}")
        for process in stuck:
            process.kill()
            process.communicate()
    assert await program.ask("-L") == TWO


async def test_nothing_is_left_running(smi: Smi, tmp_path: Path) -> None:
    """A program that hangs when the service ends is killed, and its caller is told at once."""
    smi(f"echo $$ > {tmp_path}/pid\nexec sleep 600")
    program = HostSmi()
    asking = asyncio.ensure_future(program.ask("-L", deadline=60))
    await eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    await program.close()
    with pytest.raises(Unreadable, match="failed with status -9"):
        await asking


async def test_a_driver_from_before_mig_is_asked_without_it(smi: Smi) -> None:
    """It refuses the field by its name."""
    refusal = "echo 'Field \"mig.mode.current\" is not a valid field to query.'; exit 2"
    smi(f'case "$1" in *mig.mode*) {refusal};; esac\n{shows("0, GPU-a, K80, 1000, 0, 1000")}')
    cards = devices()
    (device,) = await cards.open()
    assert (device.name, device.total_mib) == ("K80", 1000)


LISTING = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-a)
  MIG 3g.20gb     Device  0: (UUID: MIG-a0)
  MIG 1c.2g.10gb  Device  1: (UUID: MIG-a1)
  MIG 1c.2g.10gb  Device  2: (UUID: MIG-a2)
  MIG 1g.5gb      Device  3: (UUID: MIG-a3)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-b)
GPU 2: NVIDIA A100-SXM4-40GB (UUID: GPU-c)
"""


def part(index: int, owner: int, total: str, used: str) -> str:
    memory = f"<fb_memory_usage><total>{total}</total><used>{used}</used></fb_memory_usage>"
    return (
        f"<mig_device><index>{index}</index><gpu_instance_id>{owner}</gpu_instance_id>{memory}</mig_device>"
    )


REPORT = f"""<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
<gpu id="00000000:07:00.0"><mig_devices>
{part(0, 1, "20096 MiB", "25 MiB")}
{part(1, 3, "9984 MiB", "13 MiB")}
{part(2, 3, "9984 MiB", "13 MiB")}
{part(3, 9, "N/A", "N/A")}
</mig_devices><uuid>GPU-a</uuid></gpu>
<gpu id="00000000:08:00.0"><mig_devices>None</mig_devices><uuid>GPU-b</uuid></gpu>
</nvidia_smi_log>"""
PARTED = (
    "0, GPU-a, NVIDIA A100-SXM4-40GB, 40960, 87, 40873, Enabled\n"
    "1, GPU-b, NVIDIA A100-SXM4-40GB, 40960, 0, 40960, Disabled\n"
    "2, GPU-c, NVIDIA A100-SXM4-40GB, [N/A], [N/A], [N/A], Enabled\n"
)


def mig(query: str = PARTED, listing: str = LISTING, report: str = REPORT) -> str:
    """A script for all three questions."""
    return f'case "$1" in\n-L)\n{shows(listing)}\n;;\n-q)\n{shows(report)}\n;;\n*)\n{shows(query)}\n;;\nesac'


async def test_the_parts_of_a_card_in_mig_mode_are_devices(smi: Smi) -> None:
    """Each has its UUID and its own memory; one whose memory can't be told is to be declared."""
    smi(mig())
    first, second, third, fourth, whole, empty = await devices().open()
    assert (first.id, first.uuid, first.total_mib, first.used_mib) == ("0:0", "MIG-a0", 20096, 25)
    assert (first.name, first.visible_as) == ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "MIG-a0")
    for shared in (second, third):
        assert (shared.total_mib, "shares its memory with another one" in shared.problem) == (0, True)
    assert fourth.problem == (
        "the driver doesn't tell the memory of the MIG instance 0:3; declare it: {id: MIG-a3, memory: ...}"
    )
    assert (whole.id, whole.total_mib, whole.problem) == ("1", 40960, "")
    assert (empty.id, "has no instances" in empty.problem, empty.total_mib) == ("2", True, 0)


async def test_a_part_of_a_card_is_named_by_its_uuid(smi: Smi) -> None:
    """Or by the card's index and its own; a part that is gone is missing."""
    smi(mig())
    cards = devices(DeviceSpec("mig-A0", pool="p"), DeviceSpec("1"), DeviceSpec("MIG-a1", 4000))
    first, whole, declared = await cards.open()
    assert (first.total_mib, first.pool, whole.uuid, declared.visible_as) == (20096, "p", "GPU-b", "MIG-a1")
    smi(mig(listing=LISTING.replace("MIG-a0", "MIG-new")))
    first, whole, declared = await cards.read()
    assert (first.missing, whole.missing, declared.missing) == (True, False, False)


async def test_a_report_that_is_no_xml_is_a_reason(smi: Smi) -> None:
    """As any other garbled output."""
    smi(mig(report="Unable to determine"))
    with pytest.raises(ConfigError, match="nvidia-smi -q -x prints no XML"):
        await devices().open()
