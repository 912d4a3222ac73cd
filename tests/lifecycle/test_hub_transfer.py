"""One transfer against a hub of our own: cut, resumed, checked, stopped, and no room for it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import hub as support
from tests.support.gateway import wait_for
from tidegate_lifecycle.hub import transfer as module
from tidegate_lifecycle.hub.transfer import Damaged, Job, Stopped, Transfer
from tidegate_lifecycle.hub.words import HubFailed, Unreachable, Unwritable

CONTENT = os.urandom(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/files/m.gguf"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[support.Hub]:
    """A server with one file."""
    monkeypatch.setattr(module, "PAUSES", (0.01, 0.01))
    hub = support.Hub()
    hub.plain[PATH] = CONTENT
    with hub.running():
        yield hub


def job(served: support.Hub, folder: Path, **more: object) -> Job:
    given = {"size": len(CONTENT), "sha256": SHA256, **more}
    return Job("m.gguf", served.url + PATH, folder / "blobs" / "m.gguf", **given)  # type: ignore[arg-type]


def ranges(served: support.Hub) -> list[str]:
    return [asked for method, path, asked in served.requests if method == "GET" and path == PATH]


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "blobs").iterdir())


def test_a_file_arrives_whole(served: support.Hub, tmp_path: Path) -> None:
    """In its place with its bytes, nothing beside it, readable as the process' umask has it."""
    transfer = Transfer(job(served, tmp_path))
    transfer.run()
    assert transfer.job.target.read_bytes() == CONTENT
    assert left(tmp_path) == ["m.gguf"]
    assert (transfer.done, transfer.total) == (len(CONTENT), len(CONTENT))
    Transfer(job(served, tmp_path)).run()
    assert len(ranges(served)) == 1, "what is there isn't asked for again"


def test_a_cut_connection_goes_on_where_it_was(served: support.Hub, tmp_path: Path) -> None:
    """Two cuts, three answers, every byte sent once."""
    served.fault(PATH).cut = [100_000, 50_000]
    Transfer(job(served, tmp_path)).run()
    assert ranges(served) == ["", "bytes=100000-", "bytes=150000-"]
    assert served.served[PATH] == len(CONTENT)


def test_a_new_run_goes_on_from_the_partial_file(served: support.Hub, tmp_path: Path) -> None:
    """As after a kill: what is on the disk isn't sent again, and its hash still counts."""
    served.fault(PATH).cut = [120_000, 0, 0, 0]
    first = Transfer(job(served, tmp_path))
    with pytest.raises(Unreachable, match="the connection breaks; what came so far is kept"):
        first.run()
    assert first.job.partial.stat().st_size == 120_000
    Transfer(job(served, tmp_path)).run()
    assert ranges(served)[-1] == "bytes=120000-"
    assert first.job.target.read_bytes() == CONTENT


def test_wrong_bytes_are_thrown_away(served: support.Hub, tmp_path: Path) -> None:
    """Another hash, or another length: nothing stays, the words say so, the next run gets it right."""
    served.fault(PATH).wrong = 1
    with pytest.raises(Damaged, match=r"m.gguf isn't what was announced \(it has another SHA-256\)"):
        Transfer(job(served, tmp_path)).run()
    assert left(tmp_path) == []
    Transfer(job(served, tmp_path)).run()
    with pytest.raises(Damaged, match="has 300000 bytes instead of 299999"):
        Transfer(job(served, tmp_path / "other", size=len(CONTENT) - 1)).run()


def test_a_partial_file_that_was_damaged_on_disk(served: support.Hub, tmp_path: Path) -> None:
    """The hash is over what lies there, not over what once came."""
    damaged = job(served, tmp_path)
    damaged.partial.parent.mkdir()
    damaged.partial.write_bytes(b"x" * 1000)
    with pytest.raises(Damaged, match="SHA-256"):
        Transfer(damaged).run()
    Transfer(damaged).run()
    assert damaged.target.read_bytes() == CONTENT


def test_a_server_that_cannot_go_on(served: support.Hub, tmp_path: Path) -> None:
    """It answers with the whole file: that begins anew instead of being appended."""
    served.fault(PATH).cut = [100_000]
    served.fault(PATH).no_range = True
    Transfer(job(served, tmp_path)).run()
    assert served.served[PATH] == 100_000 + len(CONTENT)


def test_a_partial_file_beyond_the_end(served: support.Hub, tmp_path: Path) -> None:
    """Without a known size the server says that there is nothing there: it begins anew."""
    odd = job(served, tmp_path, size=None)
    odd.partial.parent.mkdir()
    odd.partial.write_bytes(b"x" * (len(CONTENT) + 5))
    Transfer(odd).run()
    assert odd.target.read_bytes() == CONTENT


def test_a_server_in_trouble_is_asked_again(served: support.Hub, tmp_path: Path) -> None:
    """503 passes; one that stays is told; 404 is final at once."""
    served.fault(PATH).statuses = [503, 502]
    Transfer(job(served, tmp_path)).run()
    served.fault(PATH).statuses = [503] * 3
    with pytest.raises(Unreachable, match="its server answers 503"):
        Transfer(job(served, tmp_path / "b")).run()
    served.fault(PATH).statuses = [404]
    before = len(served.requests)
    with pytest.raises(HubFailed, match="its server answers 404; check the model's source"):
        Transfer(job(served, tmp_path / "c")).run()
    assert len(served.requests) == before + 1


def test_parts_of_different_contents_are_never_joined(served: support.Hub, tmp_path: Path) -> None:
    """The address serves something else after the cut: If-Range makes it begin anew."""
    other = os.urandom(200_000)
    served.fault(PATH).cut = [100_000]
    served.fault(PATH).swap = other
    first = job(served, tmp_path, size=None, sha256="", validator=f'"{SHA256}"')
    transfer = Transfer(first)
    transfer.run()
    assert first.target.read_bytes() == other


def test_it_stops_when_nobody_wants_it(served: support.Hub, tmp_path: Path) -> None:
    """The part that came is kept."""
    fault = served.fault(PATH)
    fault.hold_after = 80_000
    transfer = Transfer(job(served, tmp_path))
    ended: list[Exception] = []

    def run() -> None:
        try:
            transfer.run()
        except Stopped as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: transfer.done == 80_000, "the first part")
    transfer.stop()
    thread.join(5)  # though its server says nothing
    assert ended
    assert transfer.job.partial.stat().st_size >= 80_000


def test_two_processes_do_not_write_one_file(served: support.Hub, tmp_path: Path) -> None:
    """The second waits for the first, and finds the file."""
    fault = served.fault(PATH)
    fault.hold_after = 80_000
    transfers = [Transfer(job(served, tmp_path)) for _ in range(2)]
    threads = [threading.Thread(target=one.run) for one in transfers]
    threads[0].start()
    wait_for(lambda: transfers[0].done == 80_000, "the first part")
    threads[1].start()
    fault.go.set()
    for thread in threads:
        thread.join(10)
    assert served.served[PATH] == len(CONTENT)
    assert left(tmp_path) == ["m.gguf"]


def test_no_room_on_the_disk(served: support.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the first byte, or met on the way: the words name the amount and the setting."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1 << 10))
    with pytest.raises(Unwritable, match=r"needs 3\.0 GiB of disk and the hub's cache has 0\.0 GiB free"):
        Transfer(job(served, tmp_path, size=3 << 30)).run()
    assert not ranges(served)
    monkeypatch.undo()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unwritable, match="the disk of the hub's cache is full") as caught:
        Transfer(job(served, tmp_path / "b")).run()
    assert str(tmp_path) not in str(caught.value)


def test_a_huge_file_comes_in_pieces(
    served: support.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer is asked for that is larger than what the hub's storage gives at once."""
    monkeypatch.setattr(module, "PIECE", 128_000)
    Transfer(job(served, tmp_path)).run()
    assert ranges(served) == ["bytes=0-127999", "bytes=128000-255999", "bytes=256000-"]
    assert served.served[PATH] == len(CONTENT)
