"""A model's files, read for its shape: on this machine, in the hub's cache, on the hub, at an address.

Everything here may be slow, missing or damaged: each reading has a deadline, and its failures are words.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.estimate import gguf_shape, hf_config
from tidegate_lifecycle.estimate.gguf import Values, read_header
from tidegate_lifecycle.estimate.shape import Shape, UnknownError
from tidegate_lifecycle.estimate.weights import INDEXES, stored_bytes, weight_bytes, weight_files
from tidegate_lifecycle.hub import addresses
from tidegate_lifecycle.hub.cache import Cache, Listing, RepoFile
from tidegate_lifecycle.hub.client import Hub
from tidegate_lifecycle.hub.pick import pick
from tidegate_lifecycle.hub.source import InRepo, Local, Repo, Url, is_gguf, parse
from tidegate_lifecycle.hub.threads import within
from tidegate_lifecycle.hub.words import HubFailed, Unreachable

DEADLINE = 30.0
"""Seconds that reading from this machine, or one header over the network, may take."""
_REQUEST = 10.0
_SMALL = 64 << 20
"""Bytes of the largest JSON file or header that is read."""
_CHUNK = 1 << 16


class LaterError(UnknownError):
    """It can't be told now, and perhaps later: nobody answered."""


class ModelFiles:
    """Reads the shapes of models."""

    def __init__(self, cache: Cache, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
        self._cache, self._folder, self._environ = cache, folder, dict(environ)

    async def shape(self, model: Model) -> Shape:
        """What its files tell. UnknownError with the reason; LaterError when it is worth another try."""
        source = parse(model.source)
        try:
            if isinstance(source, Local):
                path = self._path(source.path, model)
                return await within(DEADLINE, lambda: _local(path, model), "tidegate-files")
            if isinstance(source, Url):
                return await self._by_url(source.url, model)
            return await self._by_repo(source, model)
        except Unreachable as error:
            raise LaterError(str(error)) from None
        except HubFailed as error:
            raise UnknownError(str(error)) from None
        except TimeoutError:
            raise LaterError(f"reading the model's files took more than {DEADLINE:g} s") from None

    # -- on this machine ---------------------------------------------------------------------------

    def _path(self, text: str, model: Model) -> Path:
        """Where a path of the configuration lies on this machine: containers see it through `volumes`."""
        if not model.image:
            return self._folder / os.path.expanduser(text)
        wanted = Path(os.path.normpath(text))
        mounts = [(Path(target), source) for source, target, *_ in (one.split(":") for one in model.volumes)]
        under = [(target, source) for target, source in mounts if wanted.is_relative_to(target)]
        if not under:
            raise UnknownError(f"{text} lies in no folder of `volumes`: only the container sees it")
        target, source = max(under, key=lambda mount: len(mount[0].parts))
        if "/" not in source and not source.startswith((".", "~")):
            raise UnknownError(f"{text} lies in the Docker volume {source}: only the container sees it")
        return self._folder / os.path.expanduser(source) / wanted.relative_to(target)

    # -- on the hub --------------------------------------------------------------------------------

    async def _by_repo(self, source: InRepo | Repo, model: Model) -> Shape:
        hub = Hub(self._cache, self._environ | dict(model.env))
        listing = await hub.listing(source.repo)
        if model.engine == "llamacpp" or is_gguf(source):
            picked = pick(source, listing)
            beside = (picked.projector,) if picked.projector and model.engine == "llamacpp" else ()
            return await self._gguf_of(hub, listing, (*picked.files, *beside))
        names = {file.path for file in listing.files}
        if "config.json" not in names:
            raise UnknownError(f"{source.repo} has no config.json")
        config = await hub.read(source.repo, "config.json")
        index = next((name for name in INDEXES if name in names), None)
        table = _json(await hub.read(source.repo, index), index) if index else {}
        files = weight_files(listing, table)
        return _hf(_json(config, "config.json"), weight_bytes(files, table), model)

    async def _gguf_of(self, hub: Hub, listing: Listing, files: tuple[RepoFile, ...]) -> Shape:
        sizes = [await hub.size(listing, file.path) for file in files]
        total = _total(sizes)
        there = self._cache.file(listing, files[0].path)
        if await within(DEADLINE, there.exists, "tidegate-files"):
            values = await within(DEADLINE, lambda: _header_of(there), "tidegate-files")
        else:
            remote = await hub.remote(listing, files[0].path)
            values = await self._header_at(remote.url, remote.headers)
        return gguf_shape.shape(values, total)

    async def _by_url(self, url: str, model: Model) -> Shape:
        headers = Hub(self._cache, self._environ | dict(model.env)).headers_for(url)
        parts = addresses.parts(url)
        jobs = [await addresses.job(part, Path(), headers) for part in parts]
        return gguf_shape.shape(await self._header_at(parts[0], headers), _total([job.size for job in jobs]))

    async def _header_at(self, url: str, headers: Mapping[str, str]) -> Values:
        return await within(DEADLINE, lambda: _fetch_header(url, headers), "tidegate-url")


def _total(sizes: list[int | None]) -> int:
    if None in sizes:
        raise UnknownError("the server doesn't tell how large the model's file is")
    return sum(size or 0 for size in sizes)


def _local(path: Path, model: Model) -> Shape:
    """Blocks. A GGUF file with its other parts, or a folder as the hub has it."""
    try:
        if path.is_dir():
            return _folder(path, model)
        parts = [Path(part) for part in addresses.parts(str(path))]
        total = sum(part.stat().st_size for part in parts)
        return gguf_shape.shape(_header_of(parts[0]), total)
    except FileNotFoundError as error:
        raise UnknownError(f"{error.filename} isn't there") from None
    except OSError as error:
        raise UnknownError(f"{path} can't be read: {error.strerror or error}") from None


def _folder(path: Path, model: Model) -> Shape:
    files = [
        RepoFile(one.name, one.stat().st_size)
        for one in sorted(path.iterdir())
        if one.is_file()  # also of what is linked
    ]
    if model.engine == "llamacpp":
        raise UnknownError(f"{path} is a folder; llama.cpp wants a GGUF file")
    config = _json(_small(path / "config.json"), "config.json")
    index = next((name for name in INDEXES if (path / name).is_file()), None)
    table = _json(_small(path / index), index) if index else {}
    chosen = weight_files(Listing("", "", tuple(files)), table)
    stored = _stored(path / chosen[0].path) if chosen[0].path.endswith(".safetensors") else 0
    return _hf(config, weight_bytes(chosen, table), model, stored)


def _hf(config: Mapping[str, Any], weights: int, model: Model, stored: int = 0) -> Shape:
    return hf_config.shape(config, weights, model.dtype, model.quantization, stored)


def _small(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(_SMALL + 1)
    if len(content) > _SMALL:
        raise UnknownError(f"{path.name} is larger than {_SMALL >> 20} MiB")
    return content


def _stored(path: Path) -> int:
    """From the header of a safetensors file: its length in 8 bytes, then JSON."""
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= _SMALL:
            return 0
        try:
            return stored_bytes(_json(file.read(length), path.name))
        except UnknownError:
            return 0


def _json(content: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise UnknownError(f"{name} is no JSON") from None
    if not isinstance(value, dict):
        raise UnknownError(f"{name} is no JSON object")
    return value


def _header_of(path: Path) -> Values:
    with path.open("rb") as file:
        return read_header(file.read)


def _fetch_header(url: str, headers: Mapping[str, str]) -> Values:
    """Blocks. Reads a file from its start as far as its header goes, and no further."""
    import httpx2

    try:
        with (
            httpx2.Client(follow_redirects=True, timeout=_REQUEST) as client,
            client.stream("GET", url, headers={**headers, "Accept-Encoding": "identity"}) as answer,
        ):
            if answer.status_code != 200:
                raise UnknownError(f"the model's server answers {answer.status_code}")
            chunks = answer.iter_raw(_CHUNK)
            return read_header(_reader(lambda: next(chunks, b"")))
    except (httpx2.HTTPError, httpx2.InvalidURL):
        raise LaterError("the model's server can't be reached") from None


def _reader(more: Callable[[], bytes]) -> Callable[[int], bytes]:
    """Reads as a file does, from pieces of any size; an empty one is the end."""
    kept = bytearray()

    def read(size: int) -> bytes:
        while len(kept) < size and (piece := more()):
            kept.extend(piece)
        taken = bytes(kept[:size])
        del kept[:size]
        return taken

    return read
