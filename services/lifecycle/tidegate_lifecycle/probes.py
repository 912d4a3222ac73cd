"""What model servers say of themselves over HTTP: healthy or not, which models, how busy."""

from __future__ import annotations

import asyncio
import importlib
import math
import ssl
from dataclasses import dataclass, field

import httpx

_BODY_LIMIT = 4 << 20
_PREFIXES = ("vllm:", "llamacpp:")
_RUNNING = ("vllm:num_requests_running", "llamacpp:requests_processing")
_QUEUED = ("vllm:num_requests_waiting", "llamacpp:requests_deferred")


@dataclass(frozen=True)
class Health:
    """What came of a health check."""

    ok: bool
    detail: str = ""
    """Why not, in a few words, without address or path."""


@dataclass(frozen=True)
class Load:
    """What a server says it is doing; None = it doesn't say."""

    running: int | None
    queued: int | None
    figures: int = field(default=0, compare=False)
    """Differs from one reading to the next when any figure of the engine has moved."""


class Probe:
    """Asks model servers. Nothing it does raises, follows a redirect, uses a proxy or keeps a connection.

    A kept connection would look like a dead server when that server restarts on the same port.
    """

    def __init__(self) -> None:
        self._client: httpx.AsyncClient | None = None

    async def get(self, address: str, path: str, timeout: float) -> Health:
        """GET; any 2xx is healthy. `timeout` in seconds bounds the whole."""
        health, _ = await self._fetch(address, path, timeout, 0)
        return health

    async def models(self, address: str, timeout: float) -> list[str] | None:
        """Ids that /v1/models lists; None = no such answer."""
        health, body = await self._fetch(address, "/v1/models", timeout, _BODY_LIMIT)
        if not health.ok:
            return None
        try:
            return [str(entry["id"]) for entry in httpx.Response(200, content=body).json()["data"]]
        except (ValueError, LookupError, TypeError):
            return None

    async def load(self, address: str, timeout: float) -> Load:
        """Requests running and waiting by its /metrics, summed over its engines."""
        health, body = await self._fetch(address, "/metrics", timeout, _BODY_LIMIT)
        text = body.decode("utf-8", "replace") if health.ok else ""
        figures = hash(tuple(line for line in text.splitlines() if line.startswith(_PREFIXES)))
        return Load(_metric(text, _RUNNING), _metric(text, _QUEUED), figures)

    async def close(self) -> None:
        """Lets go of the client."""
        client, self._client = self._client, None
        if client:
            await client.aclose()

    async def _fetch(self, address: str, path: str, timeout: float, limit: int) -> tuple[Health, bytes]:
        body = bytearray()
        try:
            async with asyncio.timeout(timeout):
                client = await self._ready()
                async with client.stream("GET", address.rstrip("/") + path) as response:
                    if not response.is_success:
                        return Health(False, f"status {response.status_code}"), b""
                    if limit:  # else nobody asked for the body
                        async for chunk in response.aiter_bytes():
                            body += chunk
                            if len(body) > limit:
                                return Health(False, "an endless answer"), b""
        except TimeoutError:
            return Health(False, f"no answer within {timeout:g} s"), b""
        except httpx.ConnectError:
            return Health(False, "no connection"), b""
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError) as error:
            return Health(False, f"no valid answer ({type(error).__name__})"), b""
        return Health(True), bytes(body)

    async def _ready(self) -> httpx.AsyncClient:
        if self._client is None:
            client = await asyncio.to_thread(_client)
            if self._client is None:  # else another probe was first
                self._client = client
        return self._client


def _client() -> httpx.AsyncClient:
    """Made in a thread: reads the system's certificates, imports what httpx would on its first request."""
    importlib.import_module("anyio._backends._asyncio")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(
        verify=ssl.create_default_context(), trust_env=False, limits=limits, timeout=httpx.Timeout(30.0)
    )


def _metric(text: str, names: tuple[str, ...]) -> int | None:
    """The sum of a gauge over its labels; None when it isn't there."""
    found = []
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in names:
            try:
                found.append(float(line.rpartition(" ")[2]))
            except ValueError:
                continue
    total = sum(found)
    return int(total) if found and math.isfinite(total) and total >= 0 else None
