"""Section `edge` of the configuration, and what else the edge reads of it."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tidegate_chassis import config, keyfile
from tidegate_chassis.config import ConfigError, Document, Problem, Settings, TelemetrySettings
from tidegate_chassis.keyfile import KeyFile
from tidegate_chassis.kinds import (
    Address,
    Choice,
    Duration,
    Flag,
    Kind,
    Number,
    Size,
    Text,
    Whole,
    is_loopback,
)
from tidegate_chassis.tls import PATH, TlsFiles, check_section, check_server, files_of

ADMISSION_LISTEN = "127.0.0.1:7071"
LIFECYCLE_LISTEN = "127.0.0.1:7072"
_ROUTE = re.compile(r"(POST|PUT) (/[A-Za-z0-9._~-]+)+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_OPERATING = re.compile(
    r"/(sleep|wake_up|is_sleeping|collective_rpc|release_kv_cache_memory|server_info|reset_\w+|pause|resume|"
    r"abort_requests|start_profile|stop_profile|scale_elastic_ep|v1/(un)?load_lora_adapter|metrics|load)"
)


class Route(Kind):
    """A method and a path, such as `POST /v1/something`."""

    def parse(self, value: object) -> str:
        if not isinstance(value, str) or not _ROUTE.fullmatch(value) or re.search(r"/\.\.?(/|$)", value):
            raise ValueError
        return value

    def allowed(self) -> str:
        return 'a method (POST or PUT) and a plain path, such as "POST /v1/something"'


class Origin(Kind):
    """An origin as browsers send it, or `*`."""

    def parse(self, value: object) -> str:
        if not isinstance(value, str) or not (value == "*" or _ORIGIN.fullmatch(value)):
            raise ValueError
        return value

    def allowed(self) -> str:
        return "an origin in lower case without a path, such as https://chat.example.org, or * for all"


class Retries(Settings):
    """`edge.retries`: connection failures before the first byte of an answer."""

    attempts: Annotated[int, Whole(1, 10)] = Field(3, description="Attempts in all, the first one included.")
    delay: Annotated[float, Duration("10ms", "60s")] = Field(
        1.0, description="Wait before the second attempt, unless it goes to another instance."
    )
    factor: Annotated[float, Number(1, 10)] = Field(
        1.5, description="By how much the wait grows with each further attempt."
    )


class EdgeTls(Settings):
    """`edge.tls`: HTTPS on `edge.listen`."""

    cert: Annotated[str, PATH] = Field(
        "",
        description="File with the certificate that clients are shown, then those that lead to its root "
        "(PEM). With it `listen` speaks HTTPS alone. Read again when it changes.",
    )
    key: Annotated[str, PATH] = Field("", description="File with its private key (PEM, no password).")


class EdgeSettings(Settings):
    """Section `edge`."""

    listen: Annotated[str, Address(unix=False)] = Field(
        "127.0.0.1:8080",
        description="Where clients connect. Beyond loopback it needs keys, or `auth: none`.",
    )
    tls: EdgeTls = Field(EdgeTls(), description="HTTPS for clients.")
    workers: Annotated[int, Whole(1, 64)] = Field(
        1,
        description="Processes on `listen`, each with its own session. `max_connections`, `max_buffered` and "
        "`max_spooled` are shared out among them. SIGHUP renews all, one after the other, without a lost "
        "request; SIGHUP to one of them renews that one.",
    )
    drain_timeout: Annotated[float, Duration("1s", "24h")] = Field(
        300.0,
        description="How long a worker that was renewed goes on with its connections and streams; then what "
        "still runs ends with an error. A stop of the whole edge takes 5 s.",
    )
    admission_address: Annotated[str, Address(optional=True)] = Field(
        "", description="Where admission is reached; empty = where `admission.listen` says."
    )
    lifecycle_address: Annotated[str, Address(optional=True)] = Field(
        "", description="Where lifecycle is reached; empty = where `lifecycle.listen` says."
    )
    auth: Annotated[str, Choice("keys", "none")] = Field(
        "keys",
        description="`keys`: every request needs one of `keys_file`; while there is no such file, everybody "
        "may ask, on loopback only. `none`: everybody may ask.",
    )
    keys_file: Annotated[str, Text(".+", "a path")] = Field(
        keyfile.DEFAULT,
        description="File with the hashes of API keys, made by `tidegate keys create`; read again when it "
        "has changed.",
    )
    open_operations: Annotated[bool, Flag()] = Field(
        False,
        description="With `auth: none` beyond loopback: whether everybody may see status and metrics and "
        "give orders too. With keys that takes the scope `operator`, on loopback without keys it is open.",
    )
    cors_origins: list[Annotated[str, Origin()]] = Field(
        [],
        description="Origins whose pages may call from browsers, such as https://chat.example.org; "
        "`*` = all of them.",
    )
    max_body: Annotated[int, Size("1KiB", "1GiB")] = Field(
        32 * 2**20, description="Largest request body; a larger one is refused with 413."
    )
    max_buffered: Annotated[int, Size("1KiB", "1TiB")] = Field(
        2**30, description="All request bodies in memory together; beyond it new ones get 503."
    )
    spool_above: Annotated[int, Size("256KiB", "1GiB")] = Field(
        2**20, description="A larger request body is kept in a file without a name until a server has it."
    )
    spool_dir: str = Field(
        "",
        description="Folder for these files, which the edge may write to; empty = the system's for temporary "
        "files. On a tmpfs they take memory.",
    )
    max_spooled: Annotated[int, Size("1MiB", "1TiB")] = Field(
        8 * 2**30, description="All request bodies in files together; beyond it new ones get 503."
    )
    connect_timeout: Annotated[float, Duration("100ms", "300s")] = Field(
        10.0, description="To connect to a model server."
    )
    response_timeout: Annotated[float, Duration("60s", "3600s")] = Field(
        600.0, description="To the first byte of a model server's answer."
    )
    stream_idle_timeout: Annotated[float, Duration("1s", "3600s")] = Field(
        300.0, description="Longest silence within an answer."
    )
    write_timeout: Annotated[float, Duration("1s", "3600s")] = Field(
        30.0, description="A client that takes nothing, or sends nothing of its body, for so long is cut."
    )
    retries: Retries = Field(
        Retries(), description="What happens when no connection to a model server is made."
    )
    keepalive_after: Annotated[float, Duration("100ms", "1h", "never")] = Field(
        15.0, description="SSE comments begin after so long while a streaming request waits; 0 = never."
    )
    control_grace: Annotated[float, Duration("1s", "24h")] = Field(
        600.0, description="How long running relays go on without admission."
    )
    max_connections: Annotated[int, Whole(1, 1_000_000)] = Field(
        10_000,
        description="Client connections at one time; for one more the longest idle is closed, and when none "
        "is idle it gets 503.",
    )
    max_head: Annotated[int, Size("1KiB", "1MiB")] = Field(
        64 * 2**10, description="Largest head of a request, its first line and header fields; beyond it 431."
    )
    head_timeout: Annotated[float, Duration("1s", "1h")] = Field(
        10.0,
        description="From the first byte of a request to the end of its head; then 408. A TLS handshake has "
        "as long.",
    )
    idle_timeout: Annotated[float, Duration("1s", "24h")] = Field(
        75.0, description="How long a client's connection is kept without a request."
    )
    extra_routes: list[Annotated[str, Route()]] = Field(
        [], description='Routes passed to model servers beside the built-in ones, as "POST /v1/something".'
    )
    metrics_listen: Annotated[str, Address(unix=False, optional=True)] = Field(
        "", description="An open port with /metrics alone; empty = only on `listen`."
    )

    def share(self, workers: int) -> EdgeSettings:
        """The settings for one of `workers` processes: what they may hold together is shared out."""
        held = {name: -(-getattr(self, name) // workers) for name in _SHARED}
        return self.model_copy(update=held)


_SHARED = ("max_connections", "max_buffered", "max_spooled")
"""What the workers share out."""


class _Listener(Settings, extra="ignore"):
    """What the edge needs of the sections of its peers."""

    listen: Annotated[str, Address()] = ""


@dataclass(frozen=True)
class Loaded:
    """Everything the edge reads of a configuration file."""

    document: Document
    edge: EdgeSettings
    telemetry: TelemetrySettings
    keys: KeyFile
    """The key file as it is now; none with `auth: none`."""
    keys_path: Path
    """Where it is, or would be."""
    tls: TlsFiles | None
    """For gRPC; None = it is plain."""
    https: TlsFiles | None
    """For clients; None = HTTP is plain."""


def load(path: str | Path) -> Loaded:
    """Reads and checks a file. Raises ConfigError with all problems at once."""
    loaded, found = _examine(path)
    config.require(found)
    if loaded is None:
        raise ConfigError(found)
    return loaded


def problems(path: str | Path) -> list[Problem]:
    """What `load` would refuse, and what is merely odd; never raises."""
    return sorted(set(_examine(path)[1]))


def _examine(path: str | Path) -> tuple[Loaded | None, list[Problem]]:
    document = config.read(path)
    found = document.problems
    telemetry = config.check(TelemetrySettings, document.section("telemetry"), "telemetry", found)
    edge = config.check(EdgeSettings, document.section("edge"), "edge", found)
    files = check_section(document, "", "", found)
    if edge is None or telemetry is None:
        return None, found
    keys_path = document.resolve(edge.keys_file)
    keys = keyfile.load(keys_path)
    found.extend(_judge(edge, document, keys))
    spool = str(document.resolve(edge.spool_dir)) if edge.spool_dir else tempfile.gettempdir()
    https = check_server(files_of(document, "edge.tls", edge.tls.cert, edge.tls.key), found)
    addresses = {}
    for name, default in (("admission", ADMISSION_LISTEN), ("lifecycle", LIFECYCLE_LISTEN)):
        own = getattr(edge, f"{name}_address")
        peer = None if own else config.check(_Listener, document.section(name), name, found)
        addresses[f"{name}_address"] = own or (peer.listen if peer and peer.listen else default)
    keys = keys if edge.auth == "keys" else KeyFile(exists=False)
    edge = edge.model_copy(update={**addresses, "spool_dir": spool})
    return Loaded(document, edge, telemetry, keys, keys_path, files, https), found


def _judge_bodies(edge: EdgeSettings) -> list[Problem]:
    """A body for which there is never room."""
    share = edge.share(edge.workers)
    among = f", shared among {edge.workers} workers," if edge.workers > 1 else ""
    bodies = {"max_buffered": min(edge.max_body, edge.spool_above)}
    if edge.max_body > edge.spool_above:
        bodies["max_spooled"] = edge.max_body
    return [
        Problem(
            "edge.max_body",
            f"a body of {size} bytes would always get 503: edge.{key}{among} is {room} bytes",
            warning=True,
        )
        for key, size in bodies.items()
        if size > (room := getattr(share, key))
    ]


def _judge(edge: EdgeSettings, document: Document, keys: KeyFile) -> list[Problem]:
    """What no single key can tell."""
    found = _judge_keys(edge, keys)
    found += _judge_bodies(edge)
    spool = document.resolve(edge.spool_dir)
    if edge.spool_dir and not (spool.is_dir() and os.access(spool, os.W_OK | os.X_OK)):
        found.append(Problem("edge.spool_dir", f"{edge.spool_dir} must be a folder that can be written to"))
    found += [
        Problem("edge.extra_routes", f"{route} operates model servers; anybody may call it", warning=True)
        for route in edge.extra_routes
        if _OPERATING.fullmatch(route.partition(" ")[2])
    ]
    return found


def _judge_keys(edge: EdgeSettings, keys: KeyFile) -> list[Problem]:
    """1. Nothing is checked: a key file guards nothing. 2. A key file is to be used: it must be fit for it.
    3. There is none: then only this machine may ask."""

    def odd(name: str, words: str) -> Problem:
        return Problem(f"edge.{name}", words, warning=True)

    path = "edge.keys_file"
    if edge.auth == "none":  # 1
        words = f"{edge.keys_file} exists, but with auth: none nobody is asked for a key"
        return [odd("keys_file", words)] if keys.exists else []
    found = []
    if edge.open_operations:
        found.append(
            odd("open_operations", "has no effect with auth: keys; give operators a key with that scope")
        )
    if keys.exists:  # 2
        found += [Problem(path, f"{edge.keys_file}: {one}", one.warning) for one in keys.problems]
        if keys.usable and not any(not key.revoked for key in keys.keys):
            found.append(odd("keys_file", f"{edge.keys_file} holds no key that could be used"))
    elif not is_loopback(edge.listen):  # 3
        words = (
            f"{edge.listen} is reachable from elsewhere and {edge.keys_file} is not there to guard it: make "
        )
        words += (
            "keys with `tidegate keys create`, listen on 127.0.0.1, or set edge.auth: none if everybody who "
        )
        words += "can connect may use it"
        found.append(Problem("edge.listen", words))
    return found
