"""Who may do what: the key file as it is in effect, and what holds without one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import structlog

from tidegate_chassis import keyfile
from tidegate_chassis.keyfile import KeyFile
from tidegate_chassis.kinds import is_loopback
from tidegate_chassis.watch import FileWatch
from tidegate_edge.envelope import Failure
from tidegate_edge.keyring import Caller, Keyring
from tidegate_edge.settings import EdgeSettings

log = structlog.get_logger("tidegate.edge.keys")


class Guard:
    """Looks at the credentials of every request, and at the file twice a second."""

    def __init__(self, settings: EdgeSettings, path: Path, started: KeyFile) -> None:
        """`started` is what the file said at the start; it is usable, or there is none."""
        self._path = path
        self._watched = settings.auth == "keys"
        self._ring = Keyring(started.keys) if started.exists and self._watched else None
        self._anybody = _anybody(settings)
        self.problems: tuple[str, ...] = ()
        """Why the file as it is now isn't in effect; empty = it is."""

    def inference(self, authorization: bytes, api_key: bytes) -> Caller:
        """Who asks for a model, by two header fields. Raises Failure (401, 403)."""
        caller = self._caller(authorization, api_key)
        if not caller.inference:
            raise Failure("permission_denied", "This key lacks the scope `inference`.")
        return caller

    def operator(self, authorization: bytes, api_key: bytes) -> Caller:
        """Who operates the gateway. Raises Failure (401, 403)."""
        caller = self._caller(authorization, api_key)
        if not caller.operator:
            words = "This key lacks the scope `operator`."
            if not caller.key:
                words = "This route is for operators, and closed: the gateway is reachable from elsewhere "
                words += "and asks for no keys."
            raise Failure("permission_denied", words)
        return caller

    def _caller(self, authorization: bytes, api_key: bytes) -> Caller:
        """1. Nothing is checked. 2. Authorization: Bearer. 3. x-api-key, as Anthropic's clients send it."""
        if self._ring is None:  # 1
            return self._anybody
        bearer = authorization[7:].strip() if authorization[:7].lower() == b"bearer " else b""
        secret = bearer or api_key  # 2, 3
        if not secret:
            words = "An API key is needed: send it as `Authorization: Bearer KEY` or as `x-api-key`."
            raise Failure("invalid_api_key", words)
        return self._ring.find(secret, time.time())

    def gauges(self) -> dict[str, float]:
        """Numbers for the metrics, as they are now."""
        valid = 0 if self._ring is None else self._ring.valid(time.time())
        return {"keys": float(valid), "keys_file_refused": float(bool(self.problems))}

    async def run(self) -> None:
        """Watches the file until cancelled; without `auth: keys` there is nothing to watch."""
        watch = FileWatch(self._path)
        while self._watched:
            await watch.changed()
            self._take(await asyncio.to_thread(keyfile.load, self._path))
        await asyncio.Event().wait()

    def _take(self, found: KeyFile) -> None:
        """1. It can't be used, or is gone: what was in effect stays. 2. It is in effect."""
        problems = tuple(str(problem) for problem in found.problems if not problem.warning)
        if not found.exists and self._ring is not None:
            problems = ("the file is gone",)
        if problems:  # 1
            if problems != self.problems:
                log.error("the key file is refused; what was in effect stays", problems=problems)
            self.problems = problems
            return
        self.problems = ()
        if found.exists:  # 2
            self._ring = Keyring(found.keys)
            log.info("the key file is in effect", keys=self._ring.valid(time.time()))
            for problem in found.problems:
                log.warning("odd in the key file", problem=str(problem))


def _anybody(settings: EdgeSettings) -> Caller:
    """Everybody, when there are no keys: with `auth: keys` on loopback alone, else the edge doesn't start."""
    if settings.auth == "keys":
        return Caller(operator=True)
    opened = settings.open_operations or is_loopback(settings.listen)
    return Caller(operator=opened, act_as=True, checked=False)
