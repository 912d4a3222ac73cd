"""The hub itself, through its own library: what a repository holds, and its small files.

Each call runs in a thread and has a deadline. When the hub can't be asked, or refuses, the cache answers
if it can: what was downloaded once keeps working.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import structlog

from tidegate_lifecycle.hub import words
from tidegate_lifecycle.hub.cache import Cache, Listing, RepoFile
from tidegate_lifecycle.hub.threads import within
from tidegate_lifecycle.hub.words import HubFailed, Unreachable

_T = TypeVar("_T")
log = structlog.get_logger("tidegate.hub")

REQUEST = 10.0
"""Seconds that one request may take."""
DEADLINE = 30.0
"""Seconds that a call may take in all, with its retries."""
RETRIES = (0.5, 2.0)
"""Seconds before a request is made again to a hub in trouble."""
SMALL = 64 << 20
"""Bytes of the largest file that is read whole."""
_TROUBLE = frozenset({408, 429, 500, 502, 503, 504})
_ETAG = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]*")
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})


@dataclass(frozen=True)
class Remote:
    """A large file as the hub serves it."""

    url: str
    headers: Mapping[str, str]
    """With the token, if there is one: for the hub alone, never for where it redirects to."""
    etag: str
    """Names the content: the SHA-256 of a large file."""
    size: int | None


class Hub:
    """The hub that HF_ENDPOINT names, by default huggingface.co, with the token of HF_TOKEN."""

    def __init__(self, cache: Cache, environ: Mapping[str, str] = os.environ) -> None:
        self.cache = cache
        self._endpoint = (environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self._token = environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN") or None
        self._offline = any(
            environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        )

    async def listing(self, repo: str, patient: bool = True) -> Listing:
        """The repository's files with their sizes; from the cache when the hub doesn't help. HubFailed.

        `patient`: a hub in trouble is asked again, if the cache has nothing.
        """
        try:
            return await self._call(repo, lambda: self._listing(repo, patient))
        except HubFailed as error:
            found = await asyncio.to_thread(self.cache.listing, repo)
            if found is None:
                raise
            return replace(found, why=str(error))

    async def read(self, repo: str, path: str) -> bytes:
        """A small file such as config.json, kept in the cache. HubFailed; `Missing` when it lacks it."""
        return await self._call(repo, lambda: self._read(repo, path))

    async def remote(self, listing: Listing, path: str) -> Remote:
        """Where and how a file of the listing is downloaded. HubFailed."""
        return await self._call(listing.repo, lambda: self._remote(listing, path))

    async def size(self, listing: Listing, path: str) -> int | None:
        """The size in bytes of a file; asked for again where the listing doesn't give it. HubFailed."""
        known = listing.find(path)
        if known is not None and known.size is not None:
            return known.size
        return (await self.remote(listing, path)).size

    async def place(self, listing: Listing, path: str) -> None:
        """Enters a file whose content is among the repository's blobs into its snapshot. HubFailed."""

        def enter() -> None:
            self._ask(listing.repo, path, lambda: self._fetch(listing.repo, path, listing.commit))
            self._ask(listing.repo, path, lambda: self.cache.remember(listing))

        await self._call(listing.repo, enter)

    def headers_for(self, url: str) -> dict[str, str]:
        """The token, if it is an address of this hub."""
        ours = urlsplit(url)[:2] == urlsplit(self._endpoint)[:2]
        return {"Authorization": f"Bearer {self._token}"} if ours and self._token else {}

    async def _call(self, repo: str, function: Callable[[], _T]) -> _T:
        try:
            return await within(DEADLINE, function, "tidegate-hub")
        except TimeoutError:
            raise words.unreachable(repo) from None

    def _listing(self, repo: str, patient: bool) -> Listing:
        api = _library().HfApi(endpoint=self._endpoint, token=self._token)

        def ask() -> Any:
            return api.model_info(repo, revision="main", files_metadata=True, timeout=REQUEST)

        again = patient and self.cache.listing(repo) is None  # else what there is will do
        info = self._ask(repo, "", ask, RETRIES if again else ())
        files = (
            RepoFile(one.rfilename, one.size, one.lfs.sha256 if one.lfs else "")
            for one in info.siblings or ()
        )
        return Listing(repo, info.sha or "main", tuple(files))

    def _read(self, repo: str, path: str) -> bytes:
        file = self._ask(repo, path, lambda: self._fetch(repo, path, "main"))
        with open(file, "rb") as opened:
            content = opened.read(SMALL + 1)
        if len(content) > SMALL:
            raise HubFailed(f"{path} of {repo} is larger than {SMALL >> 20} MiB: it isn't what it should be")
        return content

    def _fetch(self, repo: str, path: str, revision: str) -> str:
        file: str = _library().hf_hub_download(
            repo,
            path,
            revision=revision,
            cache_dir=self.cache.hub,
            endpoint=self._endpoint,
            token=self._token,
            etag_timeout=REQUEST,
            local_files_only=self._offline,
        )
        return file

    def _remote(self, listing: Listing, path: str) -> Remote:
        library = _library()
        url = library.hf_hub_url(listing.repo, path, revision=listing.commit, endpoint=self._endpoint)

        def ask() -> Any:
            return library.get_hf_file_metadata(
                url, token=self._token, timeout=REQUEST, endpoint=self._endpoint
            )

        found = self._ask(listing.repo, path, ask)
        if not _ETAG.fullmatch(found.etag or ""):  # it becomes a file's name
            raise HubFailed(f"the hub gives no ETag for {path} of {listing.repo}; check HF_ENDPOINT")
        headers = library.utils.build_hf_headers(token=self._token, library_name="tidegate")
        return Remote(url, headers, found.etag, found.size)

    def _ask(
        self, repo: str, path: str, request: Callable[[], _T], retries: tuple[float, ...] = RETRIES
    ) -> _T:
        """One request, made again while the hub is in trouble; its errors in our words."""
        if self._offline and not path:
            raise words.offline(repo)
        until = time.monotonic() + DEADLINE - 2 * REQUEST
        for pause in (*retries, None):
            try:
                return request()
            except Exception as error:  # noqa: BLE001 - whatever a library makes of an odd answer
                failure = self._words(error, repo, path)
                again = isinstance(failure, Unreachable) and not self._offline
                if pause is None or not again or time.monotonic() > until:
                    raise failure from None
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _words(self, error: Exception, repo: str, path: str) -> HubFailed:
        """The library's errors, most telling first."""
        import httpx2
        from huggingface_hub import errors

        token = self._token is not None
        if isinstance(error, errors.LocalEntryNotFoundError):
            cause = error.__cause__
            if isinstance(cause, Exception) and not isinstance(cause, errors.LocalEntryNotFoundError):
                return self._words(cause, repo, path)
            return words.offline(repo)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return words.offline(repo)
        if isinstance(error, errors.HFValidationError):
            return words.no_repo(repo, token)
        if isinstance(error, errors.GatedRepoError | errors.DisabledRepoError):
            return words.refused(repo, token)
        if isinstance(error, errors.EntryNotFoundError):
            return words.no_file(repo, path)
        if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
            return words.no_repo(repo, token)
        if isinstance(error, errors.HfHubHTTPError):
            return _by_status(error.response.status_code, repo, token)
        if isinstance(error, httpx2.HTTPError | errors.FileMetadataError):
            return words.unreachable(repo)
        if isinstance(error, OSError):
            return words.unwritable(error) if words.of_disk(error) else words.unreachable(repo)
        log.warning("hub.odd_answer", repo=repo, file=path, exc_info=error)
        return HubFailed(f"what the hub answers for {repo} can't be read; check HF_ENDPOINT and proxies")


def _by_status(status: int, repo: str, token: bool) -> HubFailed:
    if status in (401, 403):
        return words.refused(repo, token)
    if status == 404:
        return words.no_repo(repo, token)
    if status in _TROUBLE:
        return words.in_trouble(repo, status)
    return HubFailed(f"the hub answers {status} for {repo}; check HF_ENDPOINT and the model's source")


@cache
def _library() -> Any:
    """The library: half a second of imports, and it must not draw bars or write lines of its own."""
    import huggingface_hub
    from huggingface_hub import utils

    library: Any = huggingface_hub
    quiet: Any = utils
    quiet.disable_progress_bars()
    quiet.logging.set_verbosity_error()
    return library
