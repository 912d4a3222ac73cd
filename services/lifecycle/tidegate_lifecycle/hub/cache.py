"""The hub's cache on disk, as far as it can be read without the library. Blocks: called in threads."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository."""

    path: str
    """Within the repository, with slashes."""
    size: int | None
    """Bytes; None = the hub doesn't say."""
    sha256: str = ""
    """Of its content, for large files; empty = unknown."""


@dataclass(frozen=True)
class Listing:
    """The files of a repository at a commit."""

    repo: str
    commit: str
    files: tuple[RepoFile, ...]
    cached: bool = False
    """The hub couldn't be asked: these are the files that the cache holds, perhaps not all there are."""

    why: str = ""
    """Why it couldn't be asked, for callers."""

    def find(self, path: str) -> RepoFile | None:
        """The file of that path."""
        return next((file for file in self.files if file.path == path), None)


@dataclass(frozen=True)
class Cache:
    """Where downloads are kept."""

    root: Path
    """What HF_HOME names; containers see all of it."""
    hub: Path
    """What HF_HUB_CACHE names: the repositories."""

    @classmethod
    def at(cls, root: Path) -> Cache:
        """The usual layout under a folder."""
        return cls(root, root / "hub")

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Cache:
        """Where the library itself would look."""
        home = Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
        root = Path(environ.get("HF_HOME") or home).expanduser()
        return cls(root, Path(environ.get("HF_HUB_CACHE") or root / "hub").expanduser())

    def repo(self, repo: str) -> Path:
        """A repository's folder: named as the library does."""
        return self.hub / "--".join(("models", *repo.split("/")))

    def blob(self, repo: str, etag: str) -> Path:
        """Where the content of that name lies, whatever files have it."""
        return self.repo(repo) / "blobs" / etag

    def listing(self, repo: str) -> Listing | None:
        """What there is of a repository's newest commit; None = nothing that can be read."""
        try:
            commit = (self.repo(repo) / "refs" / "main").read_text().strip()
            folder = self.repo(repo) / "snapshots" / commit
            if not commit or not folder.is_dir():
                return None
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files = [RepoFile(str(path.relative_to(folder)), path.stat().st_size) for path in paths]
        except OSError:
            return None
        return Listing(repo, commit, tuple(files), cached=True)

    def remember(self, listing: Listing) -> None:
        """This commit is the newest one known: what is looked at when the hub can't be asked. OSError."""
        file = self.repo(listing.repo) / "refs" / "main"
        if not file.exists() or file.read_text() != listing.commit:
            file.parent.mkdir(parents=True, exist_ok=True)
            fresh = file.with_name(f"main.{secrets.token_hex(4)}")
            fresh.write_text(listing.commit)
            fresh.replace(file)

    def share(self, folder: Path) -> None:
        """Lets those use a folder of the cache who may use the cache itself: a server in a container has no
        capabilities, so that even root in it needs leave to write beside what was downloaded for it."""
        leave = self.root.stat().st_mode & 0o077
        within = (one for one in folder.parents if one.is_relative_to(self.root) and one != self.root)
        for path in (*within, folder, *folder.rglob("*")):
            with contextlib.suppress(OSError):  # it is gone, or the file system has no such thing
                status = path.lstat()
                wanted = status.st_mode | (leave if path.is_dir() else leave & 0o066)
                if status.st_uid == os.geteuid() and not path.is_symlink() and wanted != status.st_mode:
                    path.chmod(stat.S_IMODE(wanted))

    def file(self, listing: Listing, path: str) -> Path:
        """Where a file of a repository is, once it is there."""
        return self.repo(listing.repo) / "snapshots" / listing.commit / path
