"""Footprints outlast crashes at any instruction, torn and garbled files, and disks that refuse."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from tidegate_lifecycle.footprints.record import Footprint
from tidegate_lifecycle.footprints.store import BACKUP, NAME, FootprintStore, StoreFailed

Files = dict[str, bytes]


def footprint(n: int, model: str = "m") -> Footprint:
    """The n-th; no two are alike."""
    return Footprint(
        f"{model}{n}", f"{n:016x}", "NVIDIA H200", 1, 1000 + n, 1300 + n, 0.95, 5, "measured", 1e9 + n
    )


async def kept(folder: Path) -> list[Footprint]:
    """What a new process finds there."""
    store = FootprintStore(folder)
    try:
        return await store.open()
    finally:
        await store.close()


def files(folder: Path) -> Files:
    """What a crash would leave now."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if "damaged" not in path.name}


async def found_after(folder: Path, left: Files) -> list[Footprint]:
    """What a new process finds when a crash left these files."""
    write(folder, left)
    return await kept(folder)


def write(folder: Path, left: Files) -> None:
    """These files and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in left.items():
        (folder / name).write_bytes(content)


def aside(folder: Path) -> list[str]:
    """What was kept of damaged files."""
    return [path.name for path in folder.iterdir() if "damaged" in path.name]


async def test_what_is_put_is_there_after_a_restart(tmp_path: Path) -> None:
    """Kept, replaced by key, and forgotten."""
    store = FootprintStore(tmp_path)
    assert await store.open() == []
    await store.put([footprint(1), footprint(2)])
    newer = Footprint(**{**vars(footprint(2)), "mib": 7})
    assert await store.put([newer]) == [footprint(1), newer]
    assert await store.remove([footprint(1).key, ("unknown", "")]) == [newer]
    await store.close()
    assert await kept(tmp_path) == [newer]


class Recorder:
    """Takes a copy of the folder at every system call that SQLite, or the copying, makes a change with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[Files, int]] = []
        """Each with how many footprints had been acknowledged by then."""
        self.acknowledged = 0

    def look(self) -> None:
        now = files(self.folder)
        if not self.seen or self.seen[-1] != (now, self.acknowledged):
            self.seen.append((now, self.acknowledged))

    def step(self) -> int:
        """SQLite's progress handler: 0 = go on."""
        self.look()
        return 0


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Looks before and after each step of a copy; SQLite's own steps are seen through its progress
    handler."""
    found = Recorder(tmp_path / "live")
    found.folder.mkdir()
    for name in ("fsync", "replace"):
        real: Callable[..., object] = getattr(os, name)

        def wrapped(*arguments: object, real: Callable[..., object] = real) -> object:
            found.look()
            try:
                return real(*arguments)
            finally:
                found.look()

        monkeypatch.setattr(os, name, wrapped)
    return found


async def recorded(recorder: Recorder, changes: int) -> list[tuple[Files, int]]:
    """The states of the folder in so many changes, each of a footprint more."""
    store = FootprintStore(recorder.folder)
    await store.open()

    def watch() -> None:
        store._database.connection.set_progress_handler(recorder.step, 1)

    await store._database.do(watch)
    for n in range(changes):
        await store.put([footprint(n)])
        recorder.acknowledged = n + 1
        recorder.look()
    await store.close()
    return recorder.seen


def torn(content: bytes, block: int) -> Iterator[bytes]:
    """Cut at each block, and garbage in place of each block."""
    for offset in range(0, len(content), block):
        yield content[:offset]
        yield content[:offset] + os.urandom(min(block, len(content) - offset)) + content[offset + block :]
        yield content[:offset] + bytes(min(block, len(content) - offset)) + content[offset + block :]


def between(states: list[tuple[Files, int]]) -> Iterator[tuple[Files, int]]:
    """Each state, and on the way to the next one each state in which only some blocks of a file were
    written."""
    for (before, acknowledged), (after, _) in pairwise(states):
        yield before, acknowledged
        for name in after:
            old, new = before.get(name, b""), after[name]
            changed = [at for at in range(0, len(new), 1024) if old[at : at + 1024] != new[at : at + 1024]]
            for number in range(1, len(changed)):
                for written in (changed[:number], changed[number:]):  # from the front, from the back
                    yield {**before, name: with_blocks(old, new, written)}, acknowledged
    yield states[-1]


def with_blocks(old: bytes, new: bytes, written: list[int]) -> bytes:
    """The old content with some blocks of the new one."""
    content = bytearray(old.ljust(max(len(old), written[-1] + 1024), b"\0"))
    for at in written:
        content[at : at + 1024] = new[at : at + 1024]
    return bytes(content[: max(len(old), len(new))])


async def test_torn_at_every_write(tmp_path: Path, recorder: Recorder) -> None:
    """Whatever instant a crash leaves: what was acknowledged is there, and nothing that never was put."""
    states = await recorded(recorder, 3)
    left_by_crashes = list(between(states))
    assert len(left_by_crashes) > 100
    for left, acknowledged in left_by_crashes:
        found = await found_after(tmp_path / "after", left)
        assert found == [footprint(n) for n in range(len(found))]
        assert acknowledged <= len(found) <= acknowledged + 1


@pytest.mark.parametrize("name", [NAME, f"{NAME}-wal", f"{NAME}-shm", BACKUP])
async def test_damage_at_every_block_of_each_file(tmp_path: Path, recorder: Recorder, name: str) -> None:
    """One file cut, garbled or zeroed anywhere: the other has all; what was damaged is kept aside."""
    states = await recorded(recorder, 3)
    left = next(
        left for left, acknowledged in reversed(states) if acknowledged == 3 and f"{NAME}-wal" in left
    )
    expected = [footprint(n) for n in range(3)]
    assert await found_after(tmp_path / "after", left) == expected
    put_aside = 0
    for content in torn(left[name], 512):
        assert await found_after(tmp_path / "after", {**left, name: content}) == expected
        put_aside += bool(aside(tmp_path / "after"))
        assert await kept(tmp_path / "after") == expected  # and once more, by what was repaired
    assert put_aside or name.endswith("-shm")


async def test_one_file_gone(tmp_path: Path) -> None:
    """A lost file is made from its copy, a lost copy from the file."""
    store = FootprintStore(tmp_path)
    await store.put([footprint(1)])
    await store.close()
    for name in (NAME, BACKUP):
        (tmp_path / name).unlink()
        assert await kept(tmp_path) == [footprint(1)]
        assert (tmp_path / name).exists()


async def test_both_damaged(tmp_path: Path) -> None:
    """Both are kept aside, and a new store begins: nothing is made up."""
    store = FootprintStore(tmp_path)
    await store.put([footprint(1)])
    await store.close()
    for name in (NAME, BACKUP):
        (tmp_path / name).write_bytes(os.urandom(4096))
    assert await kept(tmp_path) == []
    assert len(aside(tmp_path)) == 2
    store = FootprintStore(tmp_path)
    await store.put([footprint(2)])
    await store.close()
    assert await kept(tmp_path) == [footprint(2)]


WRITER = """
import asyncio, sys
from pathlib import Path
from tidegate_lifecycle.footprints.record import Footprint
from tidegate_lifecycle.footprints.store import FootprintStore
async def main():
    store = FootprintStore(Path(sys.argv[1]))
    n = len(await store.open())
    while True:
        await store.put([Footprint(
            f"m{n}", f"{n:016x}", "NVIDIA H200", 1, 1000 + n, 1300 + n, 0.95, 5, "measured", 1e9 + n)])
        n += 1
        print(n, flush=True)
asyncio.run(main())
"""


async def test_kill_9_of_the_writer_again_and_again(tmp_path: Path) -> None:
    """Killed wherever it is: what it had said to be kept is there, and at most one more."""

    def crash(lines: int) -> int:
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            seen = [process.stdout.readline() for _ in range(lines)]
            process.kill()
            seen += process.stdout.readlines()
        return int([line for line in seen if line.endswith("\n")][-1])

    for lines in (1, 2, 5, 3, 8):
        acknowledged = await asyncio.to_thread(crash, lines)
        found = sorted(await kept(tmp_path), key=lambda item: item.mib)
        assert found == [footprint(n) for n in range(len(found))]
        assert acknowledged <= len(found) <= acknowledged + 1


async def test_a_full_disk_is_said_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change fails with words; what was kept stays; when there is room again, it works."""
    store = FootprintStore(tmp_path)
    await store.put([footprint(1)])
    limit = "PRAGMA max_page_count = 1"
    await store._database.do(lambda: store._database.connection.execute(limit).fetchall())
    with pytest.raises(
        StoreFailed, match=rf"{NAME} in lifecycle.data_dir can't be used: database or disk is full"
    ):
        await store.put([footprint(n) for n in range(2, 200)])
    assert await store.put([footprint(2)]) == [footprint(1), footprint(2)]
    real = os.replace
    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(StoreFailed, match="No space left on device"):
        await store.put([footprint(3)])
    monkeypatch.setattr(os, "replace", real)
    assert len(await store.put([footprint(4)])) == 4
    await store.close()
    assert len(await kept(tmp_path)) == 4


def no_space(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


async def test_a_file_that_cannot_be_used_is_no_damage(tmp_path: Path) -> None:
    """A folder in its place, or a file that may not be read: said, left as it is, and tried again later."""
    (tmp_path / NAME).mkdir()
    store = FootprintStore(tmp_path)
    with pytest.raises(StoreFailed, match="unable to open database file"):
        await store.open()
    assert await store.load() == []
    (tmp_path / NAME).rmdir()
    assert await store.put([footprint(1)]) == [footprint(1)]
    await store.close()


async def test_rows_that_somebody_changed_by_hand(tmp_path: Path) -> None:
    """A number that doesn't match the seal is not believed: the copy counts."""
    import sqlite3

    store = FootprintStore(tmp_path)
    await store.put([footprint(1)])
    await store.close()

    def change() -> None:
        with closing(sqlite3.connect(tmp_path / NAME)) as connection, connection:
            connection.execute("UPDATE footprints SET mib = 1")

    await asyncio.to_thread(change)
    assert await kept(tmp_path) == [footprint(1)]
