"""What a model's server needs on disk before it is launched: found, downloaded, and told as it sees it."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import structlog

from tidegate_lifecycle.catalog import Model
from tidegate_lifecycle.engines.base import Files
from tidegate_lifecycle.hub import addresses, words
from tidegate_lifecycle.hub.cache import Cache, Listing, RepoFile
from tidegate_lifecycle.hub.client import Hub
from tidegate_lifecycle.hub.downloads import Downloads
from tidegate_lifecycle.hub.pick import pick, weights
from tidegate_lifecycle.hub.source import InRepo, Local, Repo, Url, downloadable, file_name, is_gguf, parse
from tidegate_lifecycle.hub.threads import within
from tidegate_lifecycle.hub.transfer import Job, Transfer
from tidegate_lifecycle.hub.words import HubFailed, Missing, Refused, Unreachable

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
_Found = tuple[Files, tuple[Path, ...]]
"""What a server is given, and the files that must be there for it to hold."""
_OTHER_CACHE = {"HF_HOME", "HF_HUB_CACHE", "VLLM_USE_MODELSCOPE"}
_OTHER_WEIGHTS = {"--revision", "--download-dir", "--load-format", "--hf-token"}
"""Variables and flags with which vLLM loads something else, or from elsewhere: all of it is left to vLLM."""


class Preparer:
    """Downloads what models need: GGUF files, and the weights that vLLM then finds in the cache.

    A source is looked up once while this process lives: later starts don't ask the hub as long as the files
    are there.
    """

    def __init__(self, cache: Cache, seen_at: str = "", environ: Mapping[str, str] = os.environ) -> None:
        self._cache, self._seen_at, self._environ = cache, seen_at, dict(environ)
        self._downloads = Downloads()
        self._found: dict[tuple[str, ...], _Found] = {}

    async def prepare(self, model: Model, report: Report) -> Files:
        """The model's files, there when it returns; none where its server is to see to them. HubFailed.

        `report` is called while something is downloaded, and not at all when nothing is.
        """
        try:
            return await self._prepare(model, report)
        except OSError as error:
            raise words.unwritable(error) from error

    async def _prepare(self, model: Model, report: Report) -> Files:
        source = parse(model.source)
        if model.engine not in ("vllm", "llamacpp") or isinstance(source, Local):
            return Files()
        if not downloadable(source):
            return Files()
        key = (model.source, model.engine, *model.extra_args, *sorted(map("=".join, model.env.items())))
        found = self._found.get(key)
        if found is None or not await within(_DISK, partial(_there, found[1]), _LOOKING):
            if isinstance(source, Url):
                found = await self._by_url(source, model, report)
            elif model.engine == "llamacpp" or is_gguf(source):
                found = await self._by_repo(source, model, report)
            else:
                found = await self._weights(source.repo, model, report)
            if found is None:
                return Files()
            self._found[key] = found
        return self._seen(found[0])

    def _seen(self, files: Files) -> Files:
        """As the server sees them: in a container the cache lies elsewhere."""
        if not self._seen_at:
            return files
        paths = (files.model, files.projector, files.hub_cache)
        return Files(*(path and self._seen_at + path.removeprefix(str(self._cache.root)) for path in paths))

    async def _weights(self, repo: str, model: Model, report: Report) -> _Found | None:
        """Those of a repository that vLLM loads by its name. None = all is left to vLLM: also where the hub
        doesn't help, for vLLM may know better, and says why it can't."""
        flags = {argument.partition("=")[0].replace("_", "-") for argument in model.extra_args}
        if flags & _OTHER_WEIGHTS or model.env.keys() & _OTHER_CACHE:
            return None
        hub = Hub(self._cache, self._environ | dict(model.env))
        try:
            listing = await hub.listing(repo, patient=False)
            wanted = [] if listing.cached else weights(listing)
            missing = await within(_DISK, lambda: self._missing(listing, wanted), _LOOKING)
            if missing:
                sizes = [file.size for file in missing]
                await self._reporting(report, sizes, self._fetch_all(hub, listing, missing))
        except (Refused, Missing, Unreachable) as error:
            log.warning("download.left_to_the_server", model=model.name, why=str(error))
            return None
        there = tuple(self._cache.file(listing, file.path) for file in wanted)
        return Files(hub_cache=str(self._cache.hub)), there

    async def _by_repo(self, source: InRepo | Repo, model: Model, report: Report) -> _Found:
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
            sizes = [file.size for file in missing]
            await self._reporting(report, sizes, self._fetch_all(hub, listing, missing))
        there = tuple(self._cache.file(listing, file.path) for file in wanted)
        return Files(str(there[0]), str(there[-1]) if projector else ""), there

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
            repo = self._cache.repo(listing.repo)
            await self._share(repo, self._cache.hub / ".locks" / repo.name)

        return fetch

    async def _share(self, *folders: Path) -> None:
        if self._seen_at:
            for folder in folders:
                await within(_DISK, partial(self._cache.share, folder), _LOOKING)

    async def _by_url(self, source: Url, model: Model, report: Report) -> _Found:
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
                await self._share(folder)

            await self._reporting(report, [job.size for job in jobs], fetch)
        targets = tuple(target for _, target in wanted)
        return Files(str(targets[0])), targets

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


def _there(paths: Sequence[Path]) -> bool:
    return all(path.exists() for path in paths)


def _wants_projector(model: Model) -> bool:
    """llama-server fetches it too, unless it is told otherwise."""
    given = {argument.partition("=")[0] for argument in model.extra_args}
    return model.engine == "llamacpp" and not given & _OWN_PROJECTOR
