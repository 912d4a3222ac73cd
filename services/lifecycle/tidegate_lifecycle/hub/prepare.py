"""What a model's server needs on disk before it is launched: found, downloaded, and told as it sees it."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath

import structlog

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.engines.base import Files
from tidegate_lifecycle.hub import addresses
from tidegate_lifecycle.hub.cache import Cache, Listing, RepoFile
from tidegate_lifecycle.hub.client import Hub
from tidegate_lifecycle.hub.downloads import Downloads
from tidegate_lifecycle.hub.pick import Picked, pick
from tidegate_lifecycle.hub.source import InRepo, Local, Repo, Url, downloadable, file_name, is_gguf, parse
from tidegate_lifecycle.hub.threads import within
from tidegate_lifecycle.hub.transfer import Job, Transfer
from tidegate_lifecycle.hub.words import HubFailed, Missing

log = structlog.get_logger("tidegate.hub")

REPORT = 0.5
"""Seconds between two reports of progress."""
_LOOKING = "tidegate-disk"
_DISK = 60.0
"""Seconds that looking at the disk may take."""


@dataclass(frozen=True)
class Progress:
    """How far a model's download is, in bytes."""

    done: int
    total: int | None
    """None = unknown."""


Report = Callable[[Progress], None]


class _Tally:
    """The transfers of one model, as one progress."""

    def __init__(self, sizes: Sequence[int | None]) -> None:
        self._total = None if None in sizes else sum(size or 0 for size in sizes)
        self._transfers: list[Transfer] = []

    def watch(self, transfer: Transfer) -> None:
        self._transfers.append(transfer)

    @property
    def progress(self) -> Progress:
        done = sum(transfer.done for transfer in self._transfers)
        only = self._transfers[0] if len(self._transfers) == 1 else None
        return Progress(done, self._total if self._total is not None or only is None else only.total)


_Fetch = Callable[[_Tally], Coroutine[None, None, None]]
_OWN_PROJECTOR = {"--mmproj", "-mm", "--mmproj-url", "-mmu", "--no-mmproj", "--no-mmproj-auto"}


class Preparer:
    """Downloads what models need: GGUF files, which servers fetch badly or not at all.

    Other repositories are left to vLLM, which loads them itself into the same cache. A source is looked up
    once while this process lives: later starts don't ask the hub as long as the files are there.
    """

    def __init__(self, cache: Cache, seen_at: str = "", environ: Mapping[str, str] = os.environ) -> None:
        self._cache, self._seen_at, self._environ = cache, seen_at, dict(environ)
        self._downloads = Downloads()
        self._found: dict[tuple[str, ...], Files] = {}

    async def prepare(self, model: Model, report: Report) -> Files:
        """The model's files, there when it returns; none where its server is to see to them. HubFailed.

        `report` is called while something is downloaded, and not at all when nothing is.
        """
        source = parse(model.source)
        if model.engine not in ("vllm", "llamacpp") or isinstance(source, Local):
            return Files()
        if not downloadable(source) or (model.engine == "vllm" and not is_gguf(source)):
            return Files()
        key = (model.source, model.engine, *sorted(f"{name}={text}" for name, text in model.env.items()))
        found = self._found.get(key)
        if found is None or not await within(_DISK, partial(_there, found), _LOOKING):
            if isinstance(source, Url):
                found = await self._by_url(source, model, report)
            else:
                found = await self._by_repo(source, model, report)
            self._found[key] = found
        return self._seen(found)

    def _seen(self, files: Files) -> Files:
        """As the server sees them: in a container the cache lies elsewhere."""
        if not self._seen_at:
            return files
        paths = (files.model, files.projector)
        return Files(*(path and self._seen_at + path.removeprefix(str(self._cache.root)) for path in paths))

    async def _by_repo(self, source: InRepo | Repo, model: Model, report: Report) -> Files:
        hub = Hub(self._cache, self._environ | dict(model.env))
        listing = await hub.listing(source.repo)
        try:
            picked = pick(source, listing)
        except Missing:
            if listing.cached:
                raise HubFailed(listing.why) from None
            raise
        projector = picked.projector if _wants_projector(model) else None
        wanted = [*picked.files, *([projector] if projector else [])]
        missing = await within(_DISK, lambda: self._missing(listing, wanted), _LOOKING)
        if missing and listing.cached:
            raise HubFailed(listing.why)
        if missing:
            await self._reporting(
                report, [file.size for file in missing], self._fetch_all(hub, listing, missing)
            )
        return self._files(listing, picked, projector)

    def _missing(self, listing: Listing, wanted: Sequence[RepoFile]) -> list[RepoFile]:
        """Blocks."""
        return [file for file in wanted if not self._cache.file(listing, file.path).exists()]

    def _fetch_all(self, hub: Hub, listing: Listing, files: Sequence[RepoFile]) -> _Fetch:
        async def fetch(tally: _Tally) -> None:
            for file in files:
                remote = await hub.remote(listing, file.path)
                job = Job(
                    what=f"{PurePosixPath(file.path).name} of {listing.repo}",
                    url=remote.url,
                    target=self._cache.blob(listing.repo, remote.etag),
                    headers=remote.headers,
                    size=remote.size if remote.size is not None else file.size,
                    sha256=file.sha256,
                )
                await self._downloads.fetch(job, tally.watch)
                await hub.place(listing, file.path)

        return fetch

    def _files(self, listing: Listing, picked: Picked, projector: RepoFile | None) -> Files:
        first = str(self._cache.file(listing, picked.files[0].path))
        return Files(first, str(self._cache.file(listing, projector.path)) if projector else "")

    async def _by_url(self, source: Url, model: Model, report: Report) -> Files:
        folder = self._cache.root / "tidegate" / hashlib.sha256(source.url.encode()).hexdigest()[:16]
        wanted = [(url, folder / file_name(url)) for url in addresses.parts(source.url)]
        there = await within(_DISK, lambda: {target for _, target in wanted if target.exists()}, _LOOKING)
        missing = [(url, target) for url, target in wanted if target not in there]
        if missing:
            headers = Hub(self._cache, self._environ | dict(model.env)).headers_for(source.url)
            jobs = [await addresses.job(url, target, headers) for url, target in missing]

            async def fetch(tally: _Tally) -> None:
                for job in jobs:
                    await self._downloads.fetch(job, tally.watch)

            await self._reporting(report, [job.size for job in jobs], fetch)
        return Files(str(wanted[0][1]))

    async def _reporting(self, report: Report, sizes: Sequence[int | None], fetch: _Fetch) -> None:
        """Reports at once, every `REPORT` seconds, and at the end."""
        tally = _Tally(sizes)
        report(tally.progress)
        work = asyncio.ensure_future(fetch(tally))
        try:
            while not work.done():
                await asyncio.wait({work}, timeout=REPORT)
                report(tally.progress)
            await work
        finally:
            work.cancel()
            await asyncio.wait({work})


async def nothing(model: Model, report: Report) -> Files:
    """In the place of `Preparer.prepare` where servers have no folder in common with this process."""
    return Files()


def _there(files: Files) -> bool:
    return all(os.path.exists(path) for path in (files.model, files.projector) if path)


def _wants_projector(model: Model) -> bool:
    """llama-server fetches it too, unless it is told otherwise."""
    given = {argument.partition("=")[0] for argument in model.extra_args}
    return model.engine == "llamacpp" and not given & _OWN_PROJECTOR
