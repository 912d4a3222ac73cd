"""The file of API keys: who may do what, found by the hashes of the keys. The edge reads it, `tidegate keys`
writes it.

JSON: `{"version": 1, "keys": [...]}`, each key an object with the fields of `Key`. Unknown fields are
refused: an older version must not leave out a limit that it doesn't know.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import string
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from tidegate_chassis.config import Problem, Settings, check
from tidegate_chassis.kinds import Choice, Flag, Kind, Text, Whole

DEFAULT = "./tidegate-keys.json"
"""`edge.keys_file` when nothing is said."""
MARK = "tg-"
"""Every key begins with it, so that scanners for leaked secrets can know one."""
SHOWN = len(MARK) + 6
"""So many characters of a key are kept and shown."""
EVERY = "*"
"""Among `models`: all that there are."""

_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 40
"""Random characters of a key: 238 bits. A plain hash is enough for these; nobody can try them out."""
_HASH = frozenset("0123456789abcdef")
_LARGEST = 16 * 2**20
"""Bytes of a file that are read."""


class Moment(Kind):
    """A time as `2026-01-31T12:00:00Z`, parsed to seconds since 1970; null = never, parsed to 0."""

    def parse(self, value: object) -> float:
        if value is None:
            return 0.0
        if not isinstance(value, str) or not value.endswith("Z"):
            raise ValueError
        seconds = int(datetime.fromisoformat(value).timestamp())
        if seconds <= 0:  # 0 means never
            raise ValueError
        return float(seconds)

    def allowed(self) -> str:
        return "a time such as 2026-01-31T12:00:00Z, or null"

    def show(self, value: Any) -> str:
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%dT%H:%M:%SZ}" if value else ""


_MOMENT = Moment()
_MODEL = r"\*|[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}"
TENANT = Text(
    r"[A-Za-z0-9._-]{1,64}", "1 to 64 letters, digits and the signs . _ and -, such as default or team-a"
)
MODEL = Text(_MODEL, "the name or an alias of a model, or * for all")
SCOPE = Choice("inference", "operator")
NAME = Text(r"[^\x00-\x1f\x7f]{0,100}", "up to 100 characters in one line")


class Key(Settings):
    """One key: what it may do. The key itself is nowhere."""

    id: Annotated[str, Text(r"[A-Za-z0-9_-]{1,64}", "1 to 64 letters, digits and the signs _ and -")]
    """Names it in the log and in `tidegate keys revoke`."""
    hash: str
    """SHA-256 of the key, in hexadecimal digits."""
    prefix: str = ""
    """The beginning of the key, to know it by."""
    name: Annotated[str, NAME] = ""
    """For people."""
    tenant: Annotated[str, TENANT] = "default"
    """Whose share and rates its requests count for."""
    models: list[Annotated[str, MODEL]] = Field(default_factory=lambda: [EVERY])
    """Names or aliases of the models that it may use; `*` = all."""
    scopes: list[Annotated[str, SCOPE]] = Field(default_factory=lambda: ["inference"])
    """`inference`: ask models. `operator`: status, metrics and orders."""
    act_as: Annotated[bool, Flag()] = False
    """Its requests may name another tenant and a priority (X-Tidegate-Tenant, X-Tidegate-Priority)."""
    created: Annotated[float, _MOMENT] = 0.0
    """When it was made, in seconds since 1970."""
    expires: Annotated[float, _MOMENT] = 0.0
    """From then on it isn't valid any more; 0 = never."""
    revoked: Annotated[float, _MOMENT] = 0.0
    """Since then it isn't valid any more; 0 = it wasn't revoked."""

    def invalid(self, now: float) -> str:
        """Why it can't be used at `now` (seconds since 1970): expired or revoked; empty = it can."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires and self.expires <= now else ""

    def plain(self) -> dict[str, Any]:
        """As the file has it."""
        times = ("created", "expires", "revoked")
        return self.model_dump() | {name: _MOMENT.show(getattr(self, name)) or None for name in times}


class _Form(Settings):
    """The file as a whole."""

    version: Annotated[int, Whole(1, 1)]
    keys: list[Any]


@dataclass(frozen=True)
class KeyFile:
    """What a file said when it was read."""

    keys: tuple[Key, ...] = ()
    problems: tuple[Problem, ...] = ()
    """What is wrong with it, by path (`keys.3.tenant`), and what is merely odd."""
    exists: bool = True

    @property
    def usable(self) -> bool:
        """Nothing is wrong with it, and it is there."""
        return self.exists and all(problem.warning for problem in self.problems)


def load(path: Path) -> KeyFile:
    """Reads a file; blocks. Never raises for what it finds.

    1. No file is no problem: `exists` tells. 2. One that others than its owner may write is refused: who
    writes it may do everything. 3. One that everybody may read is odd: it tells names, tenants and models,
    but no keys.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(_LARGEST + 1)
    except FileNotFoundError:  # 1
        return KeyFile(exists=False)
    except OSError as error:
        return KeyFile(problems=(Problem("", f"can't be read: {error.strerror}"),))
    keys, problems = parse(text)
    if mode & 0o022:  # 2
        words = f"may be written by others than its owner (mode {mode:04o}); use chmod go-w on it"
        problems.append(Problem("", words))
    elif mode & 0o004:  # 3
        problems.append(Problem("", f"may be read by everybody (mode {mode:04o}); chmod o-r", warning=True))
    return KeyFile(keys, tuple(problems))


def parse(text: bytes) -> tuple[tuple[Key, ...], list[Problem]]:
    """The keys of a file, and every problem with it. No value that might be a key is repeated."""
    if len(text) > _LARGEST:
        return (), [Problem("", f"is larger than {_LARGEST >> 20} MiB")]
    problems: list[Problem] = []
    try:
        data = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        return (), [Problem("", f"is no JSON: {str(error)[:200]}")]
    form = check(_Form, data, "", problems) if isinstance(data, dict) else None
    if form is None:
        found = [Problem(problem.path.lstrip("."), problem.message) for problem in problems]
        return (), found or [Problem("", 'must be an object {"version": 1, "keys": [...]}')]
    keys = [key for i, item in enumerate(form.keys) if (key := _key(item, f"keys.{i}", problems))]
    problems += _twice(keys)
    return tuple(keys), problems


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the field {next(name for name in names if names.count(name) > 1)!r} is given twice"
        )
    return found


def _key(item: Any, path: str, problems: list[Problem]) -> Key | None:
    if not isinstance(item, dict):
        problems.append(Problem(path, "must be an object with the fields of a key"))
        return None
    key = check(Key, item, path, problems)
    wrong = [] if key is None else _unsaid(key, path)
    problems += wrong
    return None if wrong else key


def _unsaid(key: Key, path: str) -> list[Problem]:
    """What is wrong with the fields in which somebody may have put a key: they aren't repeated."""
    found = []
    if len(key.hash) != 64 or not _HASH.issuperset(key.hash):
        words = "must be 64 hexadecimal digits in lower case, the SHA-256 of a key"
        found.append(Problem(f"{path}.hash", f"{words}; `tidegate keys create` makes them"))
    if len(key.prefix) > SHOWN or not key.prefix.isascii():
        found.append(Problem(f"{path}.prefix", f"must be the first characters of a key, at most {SHOWN}"))
    return found


def _twice(keys: list[Key]) -> list[Problem]:
    found, seen = [], dict[tuple[str, str], int]()
    for i, key in enumerate(keys):
        for field in ("id", "hash"):
            first = seen.setdefault((field, getattr(key, field)), i)
            if first != i:
                found.append(Problem(f"keys.{i}.{field}", f"is the same as that of keys.{first}"))
    return found


def render(keys: Iterable[Key]) -> bytes:
    """A file with these keys."""
    return json.dumps({"version": 1, "keys": [key.plain() for key in keys]}, indent=2).encode() + b"\n"


def make_secret() -> str:
    """A new key."""
    return MARK + "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))


def digest(secret: bytes) -> bytes:
    """What a key is known by."""
    return hashlib.sha256(secret).digest()
