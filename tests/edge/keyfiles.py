"""Key files for tests, and an edge that a file's tests share."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tests.edge.conftest import Bench
from tests.edge.fakes import Admission, EdgeProcess, Lifecycle, ModelServer, Script, control
from tidegate_chassis.keyfile import Key, digest, render


def secret(name: str) -> str:
    """The key of a name."""
    return f"tg-{name}-{'x' * 40}"


def bearer(name: str) -> str:
    """The value of Authorization for it."""
    return f"Bearer {secret(name)}"


def key(name: str, **fields: Any) -> Key:
    """What the file says of the key of a name."""
    return Key(id=name, hash=digest(secret(name).encode()).hex(), prefix=f"tg-{name}"[:9], **fields)


def put(path: Path, *keys: Key) -> None:
    """Writes a file with these keys, in one step."""
    fresh = path.with_suffix(".new")
    fresh.touch(0o600)
    fresh.write_bytes(render(keys))
    fresh.replace(path)


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    script: Script,
    kinds: tuple[Any, Any] = (Admission, Lifecycle),
    **edge: Any,
) -> AsyncIterator[Bench]:
    """An edge, a fake control plane (of these classes) and a model server, for all tests of a file."""
    async with contextlib.AsyncExitStack() as stack:
        admission, lifecycle, address = await stack.enter_async_context(control(kinds))
        server = await stack.enter_async_context(ModelServer(script).running())
        admission.address = server.url
        process = EdgeProcess(folder, address, **edge)
        stack.push_async_callback(process.kill)
        await process.start()
        yield Bench(admission, lifecycle, server, process, stack)
        assert not [line for line in process.lines() if "exception" in line]
