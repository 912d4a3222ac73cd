"""Who asks, by the key that came with the request. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from hmac import compare_digest

from tidegate_chassis.keyfile import EVERY, Key, digest
from tidegate_edge.envelope import Failure


@dataclass(frozen=True, slots=True)
class Caller:
    """What somebody may do."""

    key: str = ""
    """The id of the key; empty = none was asked for."""
    tenant: str = ""
    """Whose share and rates count; empty = nobody's in particular."""
    models: frozenset[str] | None = None
    """Names and aliases of models; None = all."""
    inference: bool = True
    """May ask models."""
    operator: bool = False
    """May see status and metrics, and give orders."""
    act_as: bool = False
    """Is believed when it names a tenant and a priority."""
    checked: bool = True
    """Its credentials are the edge's business and end here; else they go on to the model server."""

    def may_use(self, name: str, aliases: Iterable[str]) -> bool:
        """Whether a model of the catalogue is among its own."""
        return self.models is None or name in self.models or not self.models.isdisjoint(aliases)


NOBODY = Caller(models=frozenset(), inference=False)


class Keyring:
    """The keys of one reading of the file."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._entries = {
            (hashed := bytes.fromhex(key.hash)): (hashed, _until(key), _caller(key), key) for key in keys
        }

    def find(self, secret: bytes, now: float) -> Caller:
        """Whose key it is, at `now` (seconds since 1970). Raises Failure (401).

        Found by the hash, whose bytes nobody can choose, and compared in constant time.
        """
        wanted = digest(secret)
        entry = self._entries.get(wanted)
        if entry is None or not compare_digest(entry[0], wanted):
            raise Failure("invalid_api_key", "The API key is not valid here.")
        if entry[1] <= now:
            key = entry[3]
            raise Failure("invalid_api_key", f"The API key {key.prefix}… is {key.invalid(now)}.")
        return entry[2]

    def valid(self, now: float) -> int:
        """How many keys can be used at `now`."""
        return sum(until > now for _, until, _, _ in self._entries.values())


def _until(key: Key) -> float:
    """When it is no longer valid, in seconds since 1970."""
    return 0.0 if key.revoked else key.expires or math.inf


def _caller(key: Key) -> Caller:
    return Caller(
        key=key.id,
        tenant=key.tenant,
        models=None if EVERY in key.models else frozenset(key.models),
        inference="inference" in key.scopes,
        operator="operator" in key.scopes,
        act_as=key.act_as,
    )
