"""What lifecycle remembers over crashes, damage and a second service."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tidegate_chassis.config import ConfigError
from tidegate_lifecycle.store import NAME, Store


async def opened(data_dir: Path) -> tuple[Store, int]:
    """An open store and its boot number."""
    store = Store(data_dir)
    return store, await store.open()


async def test_what_was_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    """The boot number rises; roster and load times stay; where nothing was started, nobody is rostered."""
    store, boot = await opened(tmp_path / "a" / "data")
    assert boot == 1
    assert (tmp_path / "a" / "data").stat().st_mode & 0o777 == 0o700
    assert await store.roster() == []
    assert await store.no_admission()
    await store.set_roster([])
    assert await store.roster() == []
    await store.set_roster(["s1", "s2"])
    await store.set_admission()
    assert not await store.no_admission()
    assert await store.record_load("m", 10.0) == 10.0
    assert await store.record_load("m", 20.0) == pytest.approx(13.0)
    await store.close()
    store, boot = await opened(tmp_path / "a" / "data")
    assert boot == 2
    assert await store.roster() == ["s1", "s2"]
    assert not await store.no_admission()
    assert await store.load_times() == {"m": pytest.approx(13.0)}
    await store.close()


CRASHER = """
import asyncio, os, sys
from pathlib import Path
from tidegate_lifecycle.store import Store
async def main():
    store = Store(Path(sys.argv[1]))
    boot = await store.open()
    n = 0
    while True:
        n += 1
        await store.set_roster([str(boot), str(n)])
        print(boot, n, flush=True)
asyncio.run(main())
"""


async def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Killed while it writes, again and again: the lock is free, the boot rises, the last roster is there."""

    def crash(lines: int) -> list[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CRASHER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        seen = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        seen += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        return [line for line in seen if line.endswith("\n")][-1].split()

    for expected in (1, 3, 5):
        boot, n = await asyncio.to_thread(crash, 5 * expected)
        assert int(boot) == expected
        store, now = await opened(tmp_path)
        roster = await store.roster()
        assert now == expected + 1
        assert roster is not None
        assert roster[0] == boot
        assert int(roster[1]) >= int(n)
        await store.close()


@pytest.mark.parametrize("damage", ["garbage", "torn", "empty header", "foreign"])
async def test_a_damaged_file_is_kept_aside_and_the_boot_number_still_rises(
    tmp_path: Path, damage: str
) -> None:
    """A fresh file is begun, with a boot number above every earlier one."""
    store, first = await opened(tmp_path)
    for i in range(500):
        await store.record_load(f"model-{i}", 1.0)
    await store.close()
    path = tmp_path / NAME
    data = path.read_bytes()
    broken = {
        "garbage": os.urandom(5000),
        "torn": data[: len(data) // 2],
        "empty header": b"\0" * 200 + data[200:],
        "foreign": b"SQLite format 3\0" + b"\xff" * 4096,
    }
    path.write_bytes(broken[damage])
    begun = int(time.time())
    store, boot = await opened(tmp_path)
    assert boot >= begun > first
    (kept,) = [
        path for path in os.listdir(tmp_path) if path.startswith(f"{NAME}.damaged-") and path[-1] == "Z"
    ]
    assert (tmp_path / kept).read_bytes()[:100] == broken[damage][:100]
    assert await store.roster() is None
    await store.set_roster(["x"])
    await store.close()
    store, again = await opened(tmp_path)
    assert again == boot + 1
    assert await store.roster() == ["x"]
    await store.close()


async def test_a_second_service_on_the_same_directory_is_refused_by_the_pid_of_the_first(
    tmp_path: Path,
) -> None:
    """The lock names its holder; when that is gone the directory is free."""
    store, _ = await opened(tmp_path)
    second = Store(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"lifecycle.data_dir: .*in use.*process {os.getpid()}\)"
    ) as refusal:
        await second.open()
    assert refusal.value.problems[0].path == "lifecycle.data_dir"
    await store.close()
    assert await second.open() == 2
    await second.close()


async def test_a_directory_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    """The error names the key and what the system said."""
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "data")
    with pytest.raises(ConfigError, match=r"lifecycle.data_dir: .*can't be written: Not a directory"):
        await store.lock()
    await store.close()


async def test_a_store_file_that_cannot_be_opened_is_a_configuration_error(tmp_path: Path) -> None:
    """What isn't damage isn't put aside: the file may be fine."""
    (tmp_path / NAME).mkdir()
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match=r"lifecycle.data_dir: .*can't be used: unable to open"):
        await store.open()
    await store.close()


async def test_a_full_disk_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails is said; the service goes on with what it knows."""
    store, _ = await opened(tmp_path)
    await store.set_roster(["a"])
    database = store.database
    await database.do(lambda: database.connection.execute("PRAGMA query_only = 1"))
    await store.set_roster(["b"])
    assert await store.record_load("m", 3.0) == 3.0
    assert await store.roster() == ["a"]
    await store.close()
