"""TLS files: what the configuration names, checked before anything starts, read again when it changes."""

from __future__ import annotations

import asyncio
import math
import os
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NoReturn

import structlog
from pydantic import Field

from tidegate_chassis.config import ConfigError, Document, Problem, Settings, check
from tidegate_chassis.der import key_algorithm, validity
from tidegate_chassis.kinds import Flag, Text, is_loopback
from tidegate_chassis.watch import FileWatch

log = structlog.get_logger("tidegate.tls")

SOON = 3 * 86400.0
"""Seconds before its end at which a certificate that is in use is warned about."""
_AGAIN = 600.0
"""Seconds between two looks at its end."""
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_MAX = 253402300800.0
"""Seconds since 1970 of the year 10000: certificates that never expire say the second before."""
_FOREIGN_KINDS = {
    bytes.fromhex("06032b6570"): "Ed25519",
    bytes.fromhex("06032b6571"): "Ed448",
    bytes.fromhex("06052b81040023"): "P-521",
}
"""Kinds of keys that `ssl` takes and gRPC's library doesn't, by what names them in a certificate."""
PATH = Text(r"[^\x00-\x1f]*", "a path")


class TlsSettings(Settings):
    """Section `tls`: gRPC between the services, on every address of the form `host:port`."""

    cert: Annotated[str, PATH] = Field(
        "",
        description="File with the certificate that a service shows to the others, then those that lead to "
        "`ca` (PEM). It names the hosts at which the service is reached. Read again when it changes.",
    )
    key: Annotated[str, PATH] = Field("", description="File with its private key (PEM, no password).")
    ca: Annotated[str, PATH] = Field(
        "",
        description="File with the certificates of those who sign the others' (PEM). Empty = gRPC is neither "
        "encrypted nor guarded.",
    )
    require_client_cert: Annotated[bool, Flag()] = Field(
        True, description="Whether who calls a service must show a certificate signed by `ca` (mutual TLS)."
    )


@dataclass(frozen=True)
class TlsFiles:
    """The files of one section."""

    section: str
    """As the configuration calls it, for messages: `tls`."""
    cert: Path | None
    """None = nothing is shown; only who is called is checked."""
    key: Path | None
    ca: Path | None = None
    """None = nobody is asked for a certificate."""
    mutual: bool = False
    """Who calls must show a certificate signed by `ca`."""

    def given(self) -> Iterator[tuple[str, Path]]:
        """The files that there are, by their keys."""
        for key in ("cert", "key", "ca"):
            path: Path | None = getattr(self, key)
            if path is not None:
                yield key, path


@dataclass(frozen=True)
class Credentials:
    """What the files of a section held at one time, in PEM. It belongs together."""

    cert: bytes = b""
    key: bytes = b""
    ca: bytes = b""
    context: ssl.SSLContext | None = field(default=None, compare=False, repr=False)
    """What an HTTP server needs to show the certificate; None without one."""
    ends: float = field(default=math.inf, compare=False)
    """When the certificate expires, in seconds since 1970; infinite without one."""


def read(files: TlsFiles, now: float) -> tuple[Credentials | None, list[Problem]]:
    """Reads and checks the files: what they hold, or None, and what is wrong or odd. It blocks.

    1. Each can be read and holds what it should. 2. The key is the certificate's, and of a kind that serves.
    3. It is valid `now`, in seconds since 1970; else that is only a warning: clocks may be wrong.
    """
    found: list[Problem] = []
    held = {key: _held(key, path, files.section, found) for key, path in files.given()}  # 1
    if found:
        return None, found
    ca = held.get("ca", b"")
    if "cert" not in held:
        return Credentials(ca=ca), found
    try:
        context = _context(held["cert"], held["key"])  # 2
    except ssl.SSLError as error:
        return None, [_unusable(files, error)]
    if files.ca is not None and (kind := _foreign_kind(held["cert"])):
        text = f"{files.cert} has a key of the kind {kind}, which gRPC can't use; give RSA, or P-256 or P-384"
        return None, [Problem(f"{files.section}.cert", text)]
    dates = _dates(held["cert"])
    for begins, ends in dates:  # 3
        if not begins <= now <= ends:
            words = f"expired on {_said(ends)}" if now > ends else f"isn't valid before {_said(begins)}"
            text = f"a certificate in {files.cert} {words}: others will refuse it; renew it"
            found.append(Problem(f"{files.section}.cert", text, warning=True))
    return Credentials(held["cert"], held["key"], ca, context, min(end for _, end in dates)), found


class Certificates:
    """The credentials of one section as its files have them by now. One task, `watch`, changes them."""

    def __init__(self, files: TlsFiles) -> None:
        """Reads them; ConfigError when they can't be used. It blocks: not for an event loop."""
        self.files = files
        credentials, found = read(files, time.time())
        if credentials is None:
            raise ConfigError(found)
        self.current = credentials
        """What new connections use."""
        self._warned = False

    async def watch(self) -> None:
        """Looks at the files until cancelled. What can't be used is refused, once for each change, and what
        was in use stays."""
        watch = FileWatch(*(path for _, path in self.files.given()))
        while True:
            self._warn()
            try:
                async with asyncio.timeout(_AGAIN):
                    await watch.changed()
            except TimeoutError:
                continue
            await self._take()

    async def _take(self) -> None:
        credentials, found = await asyncio.to_thread(read, self.files, time.time())
        section = self.files.section
        if credentials is None:
            problems = [str(problem) for problem in found]
            log.error("changed TLS files are refused; the ones before stay in use", problems=problems)
        elif credentials != self.current:
            self.current, self._warned = credentials, False
            log.info("changed TLS files are in use", section=section, valid_until=_said(credentials.ends))
            for problem in found:
                log.warning("odd in TLS files", problem=str(problem))

    def _warn(self) -> None:
        ends = self.current.ends
        if not self._warned and time.time() > ends - SOON:
            self._warned = True
            where = f"{self.files.section}.cert"
            log.warning("a certificate in use expires soon: renew it", where=where, valid_until=_said(ends))


def check_section(document: Document, listens: str, address: str, found: list[Problem]) -> TlsFiles | None:
    """Section `tls` of a service, checked with its files; None = gRPC is plain, or the section is wrong.

    `listens` is the key with the address on which the service listens for gRPC ("" = on none), `address` its
    value. Adds to `found` what is wrong or odd.
    """
    settings = check(TlsSettings, document.section("tls"), "tls", found)
    if settings is None:
        return None
    files = files_of(document, "tls", settings.cert, settings.key, settings.ca, settings.require_client_cert)
    served = bool(listens) and not address.startswith("unix:")
    missing = list(_missing(files, served))
    found += missing or read(files, time.time())[1]
    if served and not missing and not is_loopback(address):
        found += _unguarded(files, listens, address)
    return files if files.ca else None


def check_server(files: TlsFiles, found: list[Problem]) -> TlsFiles | None:
    """The files of a server that asks nobody for a certificate, checked; None = it is plain, or they are
    wrong. Adds to `found` what is wrong or odd."""
    missing = list(_unpaired(files))
    found += missing or read(files, time.time())[1]
    return files if files.cert and not missing else None


def files_of(
    document: Document, section: str, cert: str, key: str, ca: str = "", mutual: bool = False
) -> TlsFiles:
    """The files that a section's keys name, relative to the configuration's folder."""
    paths = [document.resolve(path) if path else None for path in (cert, key, ca)]
    return TlsFiles(section, paths[0], paths[1], paths[2], mutual)


def _unpaired(files: TlsFiles) -> Iterator[Problem]:
    if bool(files.cert) != bool(files.key):
        where = f"{files.section}.{'key' if files.cert else 'cert'}"
        yield Problem(where, "is required: cert and key belong together")


def _missing(files: TlsFiles, served: bool) -> Iterator[Problem]:
    """Keys of section `tls` that are left out beside those that are given."""
    yield from _unpaired(files)
    if files.cert and not files.ca:
        yield Problem("tls.ca", "is required with cert and key: it says whose certificates are trusted")
    elif files.ca and not files.cert and not files.key and served:
        yield Problem("tls.cert", "is required with tls.ca, for a service that listens on TCP")


def _unguarded(files: TlsFiles, listens: str, address: str) -> Iterator[Problem]:
    """What lets others operate a service that is reachable from elsewhere."""
    elsewhere = f"{address} is reachable from elsewhere, and who can connect operates the service"
    if not files.ca:
        text = f"{elsewhere}; give the section tls (cert, key, ca), or listen on 127.0.0.1 or a Unix socket"
        yield Problem(listens, text, warning=True)
    elif not files.mutual:
        text = f"is false: {elsewhere}; set it to true"
        yield Problem("tls.require_client_cert", text, warning=True)


def _held(key: str, path: Path, section: str, found: list[Problem]) -> bytes:
    """A file's content; what is wrong with it is added to `found`."""
    words = ""
    data = b""
    try:
        data = path.read_bytes()
    except OSError as error:
        words = f"can't be read: {error.strerror}"
    else:
        words = "" if key == "key" else _no_certificates(data)
    if words:
        found.append(Problem(f"{section}.{key}", f"{path} {words}"))
    return data


def _no_certificates(data: bytes) -> str:
    """Why a file's content is no list of certificates; "" when it is one."""
    try:
        _dates(data)
        text = "\n".join(_certificates(data))
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        return "holds no certificate, or a damaged one; give PEM (-----BEGIN CERTIFICATE-----)"
    return ""


def _context(cert: bytes, key: bytes) -> ssl.SSLContext:
    """TLS 1.2 or later for HTTP/1.1. SSLError when certificate and key don't go together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    # The module reads files alone. This one is in memory: what is used is what was checked.
    with os.fdopen(os.memfd_create("tls", os.MFD_CLOEXEC), "wb") as file:
        file.write(key + b"\n" + cert)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password=_no_password)
    return context


class _PasswordNeeded(ssl.SSLError):
    """The key is encrypted."""


def _no_password() -> NoReturn:
    """Stands for a question on the terminal."""
    raise _PasswordNeeded


def _unusable(files: TlsFiles, error: ssl.SSLError) -> Problem:
    where = f"{files.section}.key"
    if isinstance(error, _PasswordNeeded):
        return Problem(where, f"{files.key} is guarded by a password; give one without")
    if error.reason == "KEY_VALUES_MISMATCH":
        return Problem(where, f"{files.key} is not the key of the certificate in {files.cert}")
    return Problem(where, f"{files.key} and {files.cert} can't be used: {error.reason or error}")


def _certificates(pem: bytes) -> list[str]:
    """The certificates in a file, without what stands between them. ValueError when there is none."""
    found = [block.decode("ascii") for block in _CERTIFICATE.findall(pem)]
    if not found:
        raise ValueError("no certificate")
    return found


def _foreign_kind(pem: bytes) -> str:
    """The kind of the first certificate's key if gRPC can't use it, else ""."""
    named = key_algorithm(ssl.PEM_cert_to_DER_cert(_certificates(pem)[0]))
    return next((kind for mark, kind in _FOREIGN_KINDS.items() if mark in named), "")


def _dates(pem: bytes) -> list[tuple[float, float]]:
    """Begin and end of each certificate, in seconds since 1970."""
    return [validity(ssl.PEM_cert_to_DER_cert(block)) for block in _certificates(pem)]


def _said(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC") if moment < _MAX else "never"
