"""`tidegate keys create|list|revoke`: writes the file of API keys that edges read. No service is asked."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tidegate_chassis import keyfile
from tidegate_chassis.config import read
from tidegate_chassis.keyfile import Key, KeyFile, Moment
from tidegate_chassis.kinds import Duration, Kind
from tidegate_serve.operate import FAILED, UNUSABLE, Failed, UsageError, table

_MOMENT = Moment()
_EXPIRES = Duration("1s", "3650d")
_PRIVATE = 0o600
_MAY_KEEP = 0o740
"""Bits that an existing file's mode keeps: its group may read it, if it could."""


def run(arguments: argparse.Namespace) -> int:
    """Carries out one command; returns the exit status."""
    actions = {"create": _create, "list": _list, "revoke": _revoke}
    try:
        actions[arguments.action](_path(arguments.config), arguments)
    except UsageError as error:
        print(f"tidegate: {error}", file=sys.stderr)
        return UNUSABLE
    except (Failed, OSError) as error:
        print(f"tidegate: {error}", file=sys.stderr)
        return FAILED
    return 0


def _path(config: str) -> Path:
    """The key file of a configuration, whether it is there or not."""
    document = read(config)
    unreadable = [problem.message for problem in document.problems if not problem.path]
    if unreadable:
        raise UsageError("\n".join(unreadable))
    named = document.section("edge").get("keys_file", keyfile.DEFAULT)
    if not isinstance(named, str) or not named:
        raise UsageError(f"edge.keys_file: {named!r} is not allowed; give a path")
    return document.resolve(named).resolve()  # what a link points to is replaced, not the link


def _create(path: Path, arguments: argparse.Namespace) -> None:
    secret, now = keyfile.make_secret(), int(time.time())
    key = _made(secret, now, arguments)
    with _locked(path):
        found = _usable(path)
        _write(path, (*found.keys, key))
    if arguments.json:
        print(json.dumps({"key": secret, **_told(key, now)}, indent=2))
        return
    print(secret)
    print(f"This is shown only now. {key.id} is in {path}: {_may(key)}.", file=sys.stderr)
    if not found.exists:
        print("From now on every request to an edge with `auth: keys` needs a key.", file=sys.stderr)


def _made(secret: str, now: int, arguments: argparse.Namespace) -> Key:
    """The key that the options describe. UsageError for one that isn't allowed."""
    given: dict[str, Any] = {"name": arguments.name, "tenant": arguments.tenant, "act_as": arguments.act_as}
    for option, kind, values in (
        ("--name", keyfile.NAME, [arguments.name]),
        ("--tenant", keyfile.TENANT, [arguments.tenant]),
        ("--model", keyfile.MODEL, arguments.model),
        ("--scope", keyfile.SCOPE, arguments.scope),
    ):
        for value in values:
            _parsed(option, kind, value)
    if arguments.model:
        given["models"] = list(dict.fromkeys(arguments.model))
    if arguments.scope:
        given["scopes"] = list(dict.fromkeys(arguments.scope))
    if arguments.expires is not None:
        given["expires"] = _MOMENT.show(now + _parsed("--expires", _EXPIRES, arguments.expires))
    given |= {"id": secrets.token_hex(4), "created": _MOMENT.show(now)}
    return Key(hash=keyfile.digest(secret.encode()).hex(), prefix=secret[: keyfile.SHOWN], **given)


def _parsed(option: str, kind: Kind, value: str) -> Any:
    try:
        return kind.parse(value)
    except ValueError:
        raise UsageError(f"{option}: {value!r} is not allowed; give {kind.allowed()}") from None


def _list(path: Path, arguments: argparse.Namespace) -> None:
    found, now = _usable(path), time.time()
    if arguments.json:
        print(json.dumps({"keys": [_told(key, now) for key in found.keys]}, indent=2))
        return
    if not found.keys:
        print("no keys")
        return
    rows = [("ID", "KEY", "NAME", "TENANT", "MODELS", "SCOPES", "CREATED", "EXPIRES", "STATE")]
    for key in found.keys:
        scopes = ", ".join([*key.scopes, *(["act_as"] if key.act_as else [])])
        times = (_MOMENT.show(key.created), _MOMENT.show(key.expires) or "never")
        models = ", ".join(key.models) or "-"
        state = key.invalid(now) or "valid"
        rows.append((key.id, f"{key.prefix}…", key.name, key.tenant, models, scopes, *times, state))
    print(table(rows))


def _revoke(path: Path, arguments: argparse.Namespace) -> None:
    now = time.time()
    with _locked(path):
        found = _usable(path)
        key = next((key for key in found.keys if key.id == arguments.key), None)
        if key is None:
            words = f"there is no key {arguments.key} in {path}; `tidegate keys list` shows those that exist"
            raise Failed(words)
        if not key.revoked:
            revoked = key.model_copy(update={"revoked": float(int(now))})
            _write(path, tuple(revoked if one is key else one for one in found.keys))
            key = revoked
    if arguments.json:
        print(json.dumps(_told(key, now), indent=2))
    else:
        print(f"{key.id} is revoked: edges refuse it within two seconds; what runs with it is finished")


def _told(key: Key, now: float) -> dict[str, object]:
    """A key for scripts: without its hash, which nobody needs."""
    plain = key.plain() | {"state": key.invalid(now) or "valid"}
    del plain["hash"]
    return plain


def _may(key: Key) -> str:
    """What a key may do, in words."""
    models = "every model" if keyfile.EVERY in key.models else ", ".join(key.models) or "no model"
    parts = [f"asks {models} for tenant {key.tenant}"] if "inference" in key.scopes else []
    parts += ["operates the gateway"] if "operator" in key.scopes else []
    parts += ["may name other tenants and priorities"] if key.act_as else []
    expires = f"; it expires at {_MOMENT.show(key.expires)}" if key.expires else ""
    return ", ".join(parts) + expires


def _usable(path: Path) -> KeyFile:
    """The file as it is; Failed, with every problem, when it can't be used."""
    found = keyfile.load(path)
    wrong = [problem for problem in found.problems if not problem.warning]
    if wrong:
        raise Failed("\n".join(f"{path}: {problem}" for problem in wrong))
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other commands from writing at the same time: the later one would undo the earlier one's work."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Puts a whole new file in the place of the old one, on the disk before its name is. A new file is its
    owner's alone; an existing one keeps owner, group and what its group may read."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(keyfile.render(keys))
            file.flush()
            _like(path, file.fileno())
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _like(path: Path, fd: int) -> None:
    try:
        old = path.stat()
    except FileNotFoundError:
        os.fchmod(fd, _PRIVATE)
        return
    if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(fd, old.st_uid, old.st_gid)
    os.fchmod(fd, old.st_mode & _MAY_KEEP)
