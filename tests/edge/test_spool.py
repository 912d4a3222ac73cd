"""Large bodies: kept in files without a name, sent from there, and gone when they have been served."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.edge.conftest import CHAT, Bench, Make
from tests.edge.fakes import Answer, Client, Connection, ask, echo
from tests.edge.test_leaks import application
from tests.support.inside import Request
from tests.support.until import until
from tidegate_edge.envelope import Failure
from tidegate_edge.request import splice
from tidegate_edge.spool import Pieces, Spool, Spools, Stored, outgoing

MIB = 2**20
FORM = "multipart/form-data; boundary=B"
TRANSCRIPTIONS = "/v1/audio/transcriptions"


def form(size: int, model: str = "small") -> list[bytes]:
    """A form whose model follows a file of `size` bytes, in pieces."""
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    rest = b'\r\n--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--B--\r\n' % model.encode()
    return [head, *in_mib(size), rest]


def chat(size: int, model: str = "small") -> list[bytes]:
    """A JSON body with an image of `size` bytes, in pieces."""
    return [b'{"messages":[{"image":"', *in_mib(size), b'"}],"model":"%b"}' % model.encode()]


def in_mib(size: int) -> list[bytes]:
    block = bytes(65 + i % 26 for i in range(MIB))
    return [block] * (size // MIB) + [block[: size % MIB]]


Bodies = Callable[[int, str], list[bytes]]
KINDS: tuple[tuple[str, str, Bodies], ...] = (
    (TRANSCRIPTIONS, FORM, form),
    (CHAT, "application/json", chat),
)


async def post(one: Bench, path: str, kind: str, pieces: list[bytes]) -> Client:
    """Sends a request; its answer is still to come."""
    client = await one.client()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n"
    client.writer.write(f"{head}content-length: {sum(map(len, pieces))}\r\n\r\n".encode())
    for piece in pieces:
        client.writer.write(piece)
        await client.writer.drain()
    return client


class Reader:
    """A model server that takes bodies of any size, and tells their digest."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.reads = asyncio.Event()
        """Until then it takes nothing."""
        self.reads.set()
        self.failing = 0
        """Requests that are still to be broken off in the middle of their body."""

    async def __call__(self, connection: Connection) -> None:
        while head := await self.head(connection):
            await self.reads.wait()
            left = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            digest = hashlib.sha256()
            while left:
                piece = await connection.reader.read(min(left, 2**18))
                if not piece:
                    return
                digest.update(piece)
                left -= len(piece)
                if self.failing:
                    self.failing -= 1
                    connection.abort()
                    return
            await connection.answer(digest.hexdigest().encode(), kind="text/plain")

    async def head(self, connection: Connection) -> bytes:
        try:
            head = await connection.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return b""
        self.heads.append(head)
        return head


def digest(pieces: list[bytes], old: bytes = b"", new: bytes = b"") -> bytes:
    """Of a body whose last piece is changed."""
    return hashlib.sha256(b"".join([*pieces[:-1], pieces[-1].replace(old, new)])).hexdigest().encode()


def peak(pid: int, begins: bool = False) -> int:
    """Bytes of memory that a process has had at most, since it was last asked to begin."""
    if begins:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    line = next(one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if "VmHWM" in one)
    return int(line.split()[1]) * 1024


def files(pid: int) -> list[str]:
    """Files that a process holds open although they have no name."""
    found = []
    for one in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(one))
        except FileNotFoundError:
            continue
    return [name for name in found if name.endswith("(deleted)")]


async def figure(one: Bench, name: str) -> float:
    text = (await ask(one.edge.port, "GET", "/metrics")).body.decode()
    line = next(line for line in text.splitlines() if line.startswith(f"tidegate_edge_{name} "))
    return float(line.split()[1])


async def nothing_left(one: Bench) -> None:
    """No file, no bytes, in memory or on disk."""
    pid = process(one)
    await until(lambda: not files(pid), "no file is held")
    assert await figure(one, "spooled_bytes") == await figure(one, "buffered_bytes") == 0


def process(one: Bench) -> int:
    assert one.edge.process is not None
    return one.edge.process.pid


async def test_a_large_body_takes_little_memory(bench: Make, tmp_path: Path) -> None:
    """100 MB wait for their slot in a file, and are sent from there as their server takes them: less than
    50 MB of memory. Byte for byte they arrive, but for the model's name."""
    folder = tmp_path / "spool"
    folder.mkdir()
    server = Reader()
    one = await bench(server, max_body="200MiB", max_buffered="20MiB", spool_dir=str(folder))
    pid = process(one)
    for path, kind, body in KINDS:
        one.admission.holding = True
        one.admission.acquired.clear()
        server.reads.clear()
        server.heads.clear()
        pieces = body(100_000_000, "small")
        before = peak(pid, begins=True)
        client = await post(one, path, kind, pieces)
        await until(lambda: one.admission.acquired, "it waits for its slot", 60)
        assert await figure(one, "spooled_bytes") == sum(map(len, pieces))
        assert await figure(one, "buffered_bytes") == 0
        assert len(files(pid)) == 1
        assert not os.listdir(folder)
        one.admission.grant(one.admission.acquired[0].n)
        await until(lambda: server.heads, "it is on its way")
        assert (await ask(one.edge.port, "GET", "/health")).status == 200
        server.reads.set()
        answer: Answer = await asyncio.wait_for(client.whole(), 60)
        assert (answer.status, answer.body) == (200, digest(pieces, b"small", b"inner/small"))
        assert peak(pid) - before < 50_000_000
        await nothing_left(one)


async def test_a_body_in_a_file_is_sent_again(bench: Make) -> None:
    """From its begin: by `move` when no connection is made, and at once on a new connection when a kept one
    breaks in the middle of it."""
    server = Reader()
    one = await bench(server, retries={"attempts": 10, "delay": "20ms", "factor": 1})
    good = one.admission.address
    for path, kind, body in KINDS:
        pieces = body(3 * MIB, "org/Plain-7B")
        server.heads.clear()
        one.admission.moves.clear()
        one.admission.address = "http://127.0.0.1:9"
        client = await post(one, path, kind, pieces)
        await until(lambda: one.admission.moves, "it was moved")
        one.admission.address = good
        assert (await client.whole()).body == digest(pieces)
        server.failing = 1  # on the connection that is kept now
        client = await post(one, path, kind, pieces)
        assert (await client.whole()).body == digest(pieces)
        assert len(server.heads) >= 3
    await nothing_left(one)


async def test_defaults_go_into_a_body_in_a_file(bench: Make) -> None:
    """As into any other: JSON, and parts of a form."""
    server = Reader()
    one = await bench(server)
    pieces = chat(2 * MIB, "warm")
    answer = await (await post(one, CHAT, "application/json", pieces)).whole()
    merged = [pieces[0].replace(b"{", b'{"temperature":0.5,"top_k":7,', 1), *pieces[1:]]
    assert answer.body == digest(merged)
    pieces = form(2 * MIB, "warm")
    answer = await (await post(one, TRANSCRIPTIONS, FORM, pieces)).whole()
    part = b'--B\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    assert answer.body == digest([part % (b"temperature", b"0.5"), part % (b"top_k", b"7"), *pieces])


async def test_a_client_that_leaves_leaves_no_file(bench: Make) -> None:
    """In the middle of its body, while it waits for a slot, and while its body is being sent."""
    server = Reader()
    one = await bench(server)
    path, kind, body = KINDS[0]
    pieces = body(8 * MIB, "small")
    pid = process(one)

    half = await one.client()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {9 * MIB}\r\n\r\n"
    half.writer.write(head.encode() + b"".join(pieces[:4]))
    await until(lambda: files(pid), "a file")
    half.leave()
    await nothing_left(one)

    one.admission.holding = True
    waits = await post(one, path, kind, pieces)
    await until(lambda: one.admission.acquired, "it waits")
    waits.leave()
    await nothing_left(one)

    one.admission.holding = False
    server.reads.clear()
    goes = await post(one, path, kind, pieces)
    await until(lambda: server.heads, "it is on its way")
    goes.leave()
    await nothing_left(one)
    server.reads.set()


async def test_a_full_disk_is_told(bench: Make) -> None:
    """503 with what is wrong, to the client and in the log; the edge serves on, and nothing is left over."""
    one = await bench(Reader())
    pid = process(one)
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    for path, kind, body in KINDS:
        pieces = body(6 * MIB, "org/Plain-7B")
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (2 * MIB, limits[1]))
        answer = await (await post(one, path, kind, pieces)).whole()
        assert (answer.status, answer.error["code"]) == (503, "server_is_overloaded")
        assert "File too large" in answer.error["message"]
        assert answer.header("retry-after")
        await nothing_left(one)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        assert (await (await post(one, path, kind, pieces)).whole()).body == digest(pieces)
    assert len(one.admission.acquired) == len(KINDS)
    await until(lambda: any("spool_dir" in str(line.get("event")) for line in one.edge.lines()), "a log line")


async def test_files_are_bounded_together(bench: Make) -> None:
    """Beyond max_spooled a new large body gets 503; what waits is kept, and the room comes back."""
    one = await bench(Reader(), max_spooled="5MiB")
    one.admission.holding = True
    first = await post(one, TRANSCRIPTIONS, FORM, form(3 * MIB))
    await until(lambda: one.admission.acquired, "the first one waits")
    second = await post(one, TRANSCRIPTIONS, FORM, form(3 * MIB))
    assert (await second.whole()).status == 503
    one.admission.grant(one.admission.acquired[0].n)
    assert (await first.whole()).status == 200
    one.admission.holding = False
    assert (await (await post(one, TRANSCRIPTIONS, FORM, form(3 * MIB))).whole()).status == 200


BOMBS = {
    "deep": (b"[" * 10_000 + b"]" * 10_000, "invalid_json"),
    "open": (b"[" * 10_000, "invalid_json"),
    "very deep": (b"[" * 500_000, "too_complex"),
    "deep objects": (b'{"a":' * 200_000, "too_complex"),
    "many": (b"[" + b"[]," * 200_000 + b"1]", "too_complex"),
    "no UTF-8": (b'"' + b"x" * MIB + b"\xff" + b'"', "invalid_json"),
    "two models": (b'"' + b"x" * MIB + b'","model":"warm"', "duplicate_model"),
    "a number": (b"1" * MIB, "invalid_json"),
}


async def test_bombs_are_refused_and_others_are_served(bench: Make) -> None:
    """400 for each, without a ticket, while others are answered. A length over the limit is 413 before a byte
    of the body has come."""
    one = await bench(echo())
    client = await one.client()
    client.writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n" % CHAT.encode())
    answer = await client.whole()
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")
    assert answer.header("connection") == "close"
    for what, (value, code) in BOMBS.items():
        raw = b'{"model":"small","a":' + value + b"}"
        bad = asyncio.create_task(ask(one.edge.port, "POST", CHAT, raw))
        assert (await ask(one.edge.port, "GET", "/health")).status == 200
        answer = await bad
        assert (answer.status, answer.error["code"]) == (400, code), what
        assert len(answer.error["message"]) <= 500
    assert not one.admission.acquired


# In this process.


@pytest.fixture
async def spools(tmp_path: Path) -> AsyncIterator[Spools]:
    """Bodies from 1000 bytes on go into files."""
    made = Spools(str(tmp_path), 1000, 10_000, 20_000)
    yield made
    assert made.memory.total == made.disk.total == 0
    assert not os.listdir(tmp_path)


async def put(spools: Spools, raw: bytes, size: int = 300) -> Spool:
    spool = Spool(spools)
    for at in range(0, len(raw), size):
        await spool.put(raw[at : at + size])
    return spool


async def test_small_bodies_stay_in_memory(spools: Spools) -> None:
    """They are counted until they are forgotten."""
    spool = await put(spools, b"x" * 1000)
    assert await spool.whole() == b"x" * 1000
    assert (spools.memory.total, spools.disk.total) == (1000, 0)
    spool.forget()
    assert spools.memory.total == 0
    spool.close()


@given(
    st.binary(min_size=1001, max_size=3000),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 50), st.binary(max_size=20)), max_size=3),
)
def test_splicing_a_file_is_splicing_its_bytes(raw: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    """As often as it is walked; its length is told before."""
    edits, free = [], 0
    for begin, length, new in sorted(changes):
        at = min(max(begin, free), len(raw))
        free = min(at + length, len(raw))
        edits.append((at, free, new))

    async def walk() -> None:
        spool = await put(Spools("", 1000, 10_000, 10_000), raw)
        content = await spool.whole()
        assert isinstance(content, Stored)
        sent = outgoing(content, edits)
        assert isinstance(sent, Pieces)
        for _ in range(2):
            assert b"".join([piece async for piece in sent]) == splice(raw, edits)
        assert len(sent) == len(splice(raw, edits))
        spool.close()

    asyncio.run(walk())


async def test_too_much_together_is_refused(spools: Spools) -> None:
    """And what is given back is free for others."""
    held = [await put(spools, b"x" * 900) for _ in range(11)]
    one_more = Spool(spools)
    with pytest.raises(Failure):
        await one_more.put(b"x" * 900)
    for spool in (*held, one_more):
        spool.close()


async def test_a_file_that_is_closed_is_read_no_more(spools: Spools) -> None:
    """Its number may be another file's by then: whoever still reads gets an error, not another's bytes."""
    spool = await put(spools, b"x" * 5000)
    content = await spool.whole()
    assert isinstance(content, Stored)
    reading = content.between(0, 5000).__aiter__()
    spool.close()
    with pytest.raises(Failure):
        async for _ in reading:
            pass


async def test_a_cancelled_write_leaves_no_file(spools: Spools) -> None:
    """Wherever it is cancelled, also while the file is being made."""
    before = len(os.listdir("/proc/self/fd"))
    for steps in range(12):
        spool = Spool(spools)
        task = asyncio.ensure_future(spool.put(b"x" * 4000))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        spool.close()
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before, "every file is closed")


def test_a_spool_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    """At the start, with what is wrong."""
    from tidegate_edge.settings import load, problems

    path = tmp_path / "tidegate.yaml"
    path.write_text(json.dumps({"edge": {"spool_dir": "./missing"}}))
    assert [problem.path for problem in problems(path)] == ["edge.spool_dir"]
    (tmp_path / "missing").mkdir()
    assert load(path).edge.spool_dir == str(tmp_path / "missing")


async def test_a_disk_that_hangs_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever's body should go there gets 503 after write_timeout; others are served meanwhile."""
    answers = threading.Event()
    monkeypatch.setattr("tidegate_edge.spool._File.append", lambda *_: answers.wait(30))
    async with application(echo(), write_timeout=0.3) as (app, edge, admission, _):
        large = Request(app, b"".join(chat(2 * MIB)))
        small = Request(app, b'{"model":"small"}')
        await asyncio.wait_for(small.task, 10)
        assert small.status == 200
        await asyncio.wait_for(large.task, 10)
        assert large.status == 503
        assert b"disk" in large.said
        assert len(admission.acquired) == 1
        assert edge.spools.memory.total == edge.spools.disk.total == 0
        answers.set()
