"""GGUF files by URL: what their server says of them, and the parts of one that is split."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from tidegate_lifecycle.hub.source import file_name
from tidegate_lifecycle.hub.threads import within
from tidegate_lifecycle.hub.transfer import Job
from tidegate_lifecycle.hub.words import HubFailed, Unreachable

TIMEOUT = 10.0
"""Seconds that a server may take to describe a file."""
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_SHA256 = re.compile(r'"?([0-9a-f]{64})"?')


def parts(url: str) -> list[str]:
    """All parts of a split file, by the number in its name; itself when it isn't split."""
    path = urlsplit(url).path
    found = _SPLIT.search(path)
    if found is None:
        return [url]
    stem, suffix = path[: found.start()], path[found.end(2) :]
    numbers = range(1, int(found[2]) + 1)
    return [url.replace(path, f"{stem}-{n:05}-of-{found[2]}{suffix}", 1) for n in numbers]


async def job(url: str, target: Path, headers: Mapping[str, str]) -> Job:
    """How it is downloaded: size and validator as its server gives them. HubFailed when it has it not."""
    try:
        return await within(2 * TIMEOUT, lambda: _job(url, target, headers), "tidegate-url")
    except TimeoutError:
        raise _silent(url) from None


def _job(url: str, target: Path, headers: Mapping[str, str]) -> Job:
    import httpx2

    what = file_name(url)
    try:
        answer = httpx2.head(
            url, headers={**headers, "Accept-Encoding": "identity"}, follow_redirects=True, timeout=TIMEOUT
        )
    except (httpx2.HTTPError, httpx2.InvalidURL):
        raise _silent(url) from None
    if answer.status_code in (401, 403, 404, 410):
        text = f"{what} can't be downloaded: its server answers {answer.status_code}"
        raise HubFailed(f"{text}; check the model's source")
    if answer.status_code != 200:  # it may not know HEAD: the download itself will tell
        return Job(what, url, target, headers, same=False)
    length, etag = answer.headers.get("Content-Length", ""), answer.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else answer.headers.get("Last-Modified", "")
    linked = (one.headers.get("X-Linked-ETag", "") for one in (*answer.history, answer))
    sha256 = next((found[1] for text in linked if (found := _SHA256.fullmatch(text))), "")
    size = int(length) if length.isdecimal() else None
    return Job(what, url, target, headers, size, sha256, validator, same=bool(validator))


def _silent(url: str) -> Unreachable:
    return Unreachable(
        f"{file_name(url)} can't be downloaded: its server can't be reached; check the network"
    )
