"""What a model's `source` means. Pure: the one place for its grammar."""

from __future__ import annotations

import re
from dataclasses import dataclass

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Local:
    """A file or a folder."""

    path: str


@dataclass(frozen=True)
class Url:
    """A file by its address."""

    url: str


@dataclass(frozen=True)
class InRepo:
    """A GGUF file of a repository."""

    repo: str
    path: str
    """Within the repository, with slashes."""


@dataclass(frozen=True)
class Repo:
    """A repository; which of its files is to be found out."""

    repo: str
    quant: str = ""
    """The quantization that is meant; empty = not said."""


Source = Local | Url | InRepo | Repo


def parse(text: str) -> Source:
    """1. A URL. 2. A file or folder: its path is absolute or begins with `.` or `~`, or is a name, or
    folder/name, that ends in .gguf. 3. A file of a repository: org/repo/folder/file.gguf. 4. A repository,
    with :QUANT if given; a name that isn't org/repo is the hub's to judge."""
    if text.startswith(("http://", "https://")):  # 1
        return Url(text)
    is_gguf = text.lower().endswith(".gguf")
    if text.startswith(("/", ".", "~")) or (is_gguf and text.count("/") < 2):  # 2
        return Local(text)
    if is_gguf:  # 3
        owner, name, path = text.split("/", 2)
        return InRepo(f"{owner}/{name}", path)
    repo, _, quant = text.partition(":")  # 4
    return Repo(repo, quant)


def is_gguf(source: Source) -> bool:
    """Whether it names a GGUF file, or a repository of such, whatever the engine."""
    if isinstance(source, Repo):
        return bool(source.quant) or source.repo.lower().endswith("gguf")
    return isinstance(source, InRepo) or _name(source).lower().endswith(".gguf")


def downloadable(source: Source) -> bool:
    """Whether it is somewhere else, and well-formed."""
    if isinstance(source, Repo | InRepo):
        return _REPO.fullmatch(source.repo) is not None
    return isinstance(source, Url)


def file_name(url: str) -> str:
    """What a downloaded file is called: the last part of its path, without what files may not have."""
    last = re.split(r"[?#]", url, maxsplit=1)[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]", "_", last)[-128:].lstrip(".") or "model.gguf"


def _name(source: Local | Url) -> str:
    return source.path if isinstance(source, Local) else file_name(source.url)
