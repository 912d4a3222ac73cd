"""TLS files: what is refused, with which words; what is warned about; what happens when they change."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.certificates import Authority, put
from tests.support.until import until
from tidegate_chassis import config, tls, watch
from tidegate_chassis.config import ConfigError, Problem
from tidegate_chassis.der import key_algorithm, validity
from tidegate_chassis.tls import Certificates, TlsFiles, check_section

KEY = ec.generate_private_key(ec.SECP256R1())
NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x" * 64)])


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One authority with a certificate and key `own`, which no test changes."""
    made = Authority(tmp_path_factory.mktemp("tls"))
    made.issue()
    return made


def _files(section: dict[str, str], **keys: Any) -> TlsFiles:
    paths = {key: Path(path) for key, path in section.items()}
    return TlsFiles("tls", paths.get("cert"), paths.get("key"), paths.get("ca"), **keys)


def _found(folder: Path, section: dict[str, Any], address: str = "127.0.0.1:7071") -> list[Problem]:
    path = folder / "tidegate.yaml"
    path.write_text(yaml.safe_dump({"tls": section}))
    found: list[Problem] = []
    check_section(config.read(path), "admission.listen" if address else "", address, found)
    return found


def _signed(begins: datetime.datetime, ends: datetime.datetime, serial: int = 1) -> bytes:
    build = x509.CertificateBuilder(NAME, NAME, KEY.public_key(), serial, begins, ends)
    return build.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


MOMENTS = st.integers(-631152000, 253402300799).map(
    lambda at: datetime.datetime.fromtimestamp(at, datetime.UTC)
)
"""From 1950 to 9999, as certificates can say them."""


@settings(max_examples=60, deadline=None)
@given(MOMENTS, MOMENTS, st.integers(1, 2**159 - 1))
def test_dates_of_certificates_are_read(
    one: datetime.datetime, other: datetime.datetime, serial: int
) -> None:
    """In both forms that certificates have them (before and after 2050), to the second."""
    begins, ends = sorted((one, other))
    assert validity(_signed(begins, ends, serial)) == (begins.timestamp(), ends.timestamp())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_certificates_are_told_as_such(data: st.DataObject) -> None:
    """Cut off, or with other bytes: a ValueError or dates, never another error and never a hang."""
    begins, ends = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (2020, 2050))
    whole = bytearray(_signed(begins, ends))
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, 150))] = data.draw(st.integers(0, 255))
    whole = whole[: data.draw(st.integers(0, 400))]
    for read in (validity, key_algorithm):
        with contextlib.suppress(ValueError):
            read(bytes(whole))


def test_what_can_not_be_used_is_refused(authority: Authority, tmp_path: Path) -> None:
    """Missing, unreadable, empty, another kind, another's key, a password: each says file and key."""
    own = authority.section()
    authority.issue("other")
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    locked = KEY.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "locked").write_bytes(locked)
    cut = Path(own["cert"]).read_text().splitlines()
    (tmp_path / "cut").write_text("\n".join([*cut[:3], *cut[-1:]]))
    (tmp_path / "random").write_bytes(os.urandom(1000))
    cases = [
        ({"cert": f"{tmp_path}/none"}, "tls.cert", "none can't be read: No such file"),
        ({"key": f"{tmp_path}/folder"}, "tls.key", "folder can't be read: Is a directory"),
        ({"ca": f"{tmp_path}/empty"}, "tls.ca", "empty holds no certificate"),
        ({"cert": own["key"]}, "tls.cert", "holds no certificate"),
        ({"cert": f"{tmp_path}/cut"}, "tls.cert", "damaged"),
        ({"ca": f"{tmp_path}/random"}, "tls.ca", "holds no certificate"),
        ({"key": own["ca"]}, "tls.key", "can't be used"),
        ({"key": f"{tmp_path}/random"}, "tls.key", "can't be used"),
        ({"key": str(authority.folder / "other.key")}, "tls.key", "is not the key of the certificate in"),
        ({"key": f"{tmp_path}/locked"}, "tls.key", "guarded by a password"),
        ({"key": ""}, "tls.key", "belong together"),
        ({"cert": ""}, "tls.cert", "belong together"),
        ({"ca": ""}, "tls.ca", "whose certificates are trusted"),
        ({"cert": "", "key": ""}, "tls.cert", "is required with tls.ca"),
        ({"require_client_cert": "yes"}, "tls.require_client_cert", "true or false"),
        ({"crt": "x"}, "tls.crt", "is no key"),
    ]
    for change, path, words in cases:
        found = _found(tmp_path, {**own, **change})
        assert [(problem.path, words in problem.message) for problem in found] == [(path, True)], found
        assert not found[0].warning


def test_keys_that_grpc_can_not_use_are_refused(tmp_path: Path) -> None:
    """Certificates of kinds that only HTTPS takes say so at the start, not at the first handshake."""
    begins = datetime.datetime.now(datetime.UTC)
    ends = begins + datetime.timedelta(days=9)
    cases: list[tuple[str, Any, Any]] = [
        ("Ed25519", ed25519.Ed25519PrivateKey.generate(), None),
        ("Ed448", ed448.Ed448PrivateKey.generate(), None),
        ("P-521", ec.generate_private_key(ec.SECP521R1()), hashes.SHA512()),
        ("", ec.generate_private_key(ec.SECP384R1()), hashes.SHA384()),
        ("", rsa.generate_private_key(65537, 2048), hashes.SHA256()),
    ]
    for kind, key, algorithm in cases:
        build = x509.CertificateBuilder(NAME, NAME, key.public_key(), 1, begins, ends)
        cert = build.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        put(tmp_path / "own.pem", cert)
        put(tmp_path / "own.key", key.private_bytes(*form))
        found = _found(tmp_path, {"cert": "own.pem", "key": "own.key", "ca": "own.pem"})
        assert [(one.path, f"of the kind {kind}," in one.message) for one in found] == (
            [("tls.cert", True)] if kind else []
        )
        https = TlsFiles("edge.tls", tmp_path / "own.pem", tmp_path / "own.key")
        assert tls.read(https, time.time())[1] == []


def test_relative_paths_and_words_between_certificates(authority: Authority, tmp_path: Path) -> None:
    """Paths start at the file's folder. What stands around certificates, in any script, doesn't matter."""
    for name in ("own.pem", "own.key", "ca.pem"):
        put(tmp_path / name, (authority.folder / name).read_bytes())
    put(tmp_path / "ca.pem", "# Zertifizierungsstelle für Tests\n".encode() + authority.trust)
    assert not _found(tmp_path, {"cert": "own.pem", "key": "own.key", "ca": "./ca.pem"})


def test_dates_are_warned_about(authority: Authority, tmp_path: Path) -> None:
    """One that has expired, or isn't valid yet, is only odd: clocks may be wrong."""
    for days, words in (((-9, -1), "expired on 20"), ((1, 9), "isn't valid before 20")):
        authority.issue("dated", days=days)
        (problem,) = _found(tmp_path, authority.section("dated"))
        assert (problem.path, problem.warning, words in problem.message) == ("tls.cert", True, True)


def test_an_address_that_others_reach_is_warned_about(authority: Authority, tmp_path: Path) -> None:
    """Without TLS, and with TLS that asks nobody who he is; not on loopback, and not on Unix sockets."""
    own = authority.section()
    for address in ("0.0.0.0:1", "[::]:1", "host:1"):
        (problem,) = _found(tmp_path, {}, address)
        assert (problem.path, problem.warning) == ("admission.listen", True)
        assert "give the section tls" in problem.message
        (problem,) = _found(tmp_path, {**own, "require_client_cert": False}, address)
        assert (problem.path, problem.warning) == ("tls.require_client_cert", True)
        assert not _found(tmp_path, own, address)
    for address in ("127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/run/a", ""):
        assert not _found(tmp_path, {}, address)
        assert not _found(tmp_path, {**own, "require_client_cert": False}, address)


def test_who_only_calls_needs_no_certificate(authority: Authority, tmp_path: Path) -> None:
    """With `ca` alone the others are checked: for an edge, and for services on Unix sockets."""
    assert not _found(tmp_path, {"ca": str(authority.ca)}, "")
    assert not _found(tmp_path, {"ca": str(authority.ca)}, "unix:/run/a")


@contextlib.asynccontextmanager
async def _watched(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Certificates]:
    monkeypatch.setattr(watch, "PACE", 0.02)
    certificates = await asyncio.to_thread(Certificates, _files(authority.section()))
    task = asyncio.create_task(certificates.watch())
    try:
        yield certificates
        assert not task.done()
    finally:
        task.cancel()


async def test_changed_files_are_taken_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renewed pair counts as soon as both files are there; one that can't be used is refused, said once,
    and what was in use stays until there is a good one; touching the files does nothing."""
    authority = Authority(tmp_path)
    authority.issue()
    with structlog.testing.capture_logs() as logs:
        async with _watched(authority, monkeypatch) as certificates:
            first = certificates.current
            authority.issue()
            await until(lambda: certificates.current != first, "the renewed pair is in use")
            second = certificates.current
            put(tmp_path / "own.key", (tmp_path / "ca.pem").read_bytes())
            await until(lambda: len(logs) == 2, "the refusal")
            (tmp_path / "own.pem").unlink()
            await until(lambda: len(logs) == 3, "the other refusal")
            assert certificates.current is second
            authority.issue()
            await until(lambda: certificates.current is not second, "the next good pair")
            os.utime(tmp_path / "own.pem", (time.time(), 1_000_000))
            third = certificates.current
            authority.issue()
            await until(lambda: certificates.current is not third, "the last pair")
    events = [(entry["log_level"], entry["event"].partition(";")[0]) for entry in logs]
    used, refused = ("info", "changed TLS files are in use"), ("error", "changed TLS files are refused")
    assert events == [used, refused, refused, used, used]
    assert "own.pem can't be read: No such file" in str(logs[2]["problems"])


async def test_a_change_is_seen_whatever_its_date_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written in place, as long as before and as old as before, as some copying programs leave files."""
    authority = Authority(tmp_path)

    def fill(name: str) -> None:
        for kind in ("key", "pem"):
            path = tmp_path / f"own.{kind}"
            path.write_bytes((tmp_path / f"{name}.{kind}").read_bytes().ljust(4000))
            os.utime(path, (1_000_000, 1_000_000))

    for name in ("first", "second"):
        authority.issue(name)
    fill("first")
    async with _watched(authority, monkeypatch) as certificates:
        before = certificates.current
        fill("second")
        await until(lambda: certificates.current != before, "the second pair is in use")


async def test_the_end_of_a_certificate_in_use_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that expires within days is warned about once, and again only when its successor does too."""
    authority = Authority(tmp_path)
    authority.issue(days=(-1, 2))
    with structlog.testing.capture_logs() as logs:
        async with _watched(authority, monkeypatch) as certificates:
            await until(lambda: logs, "the warning")
            authority.issue(days=(-1, 2.5))
            await until(lambda: len(logs) == 3, "the next warning")
            authority.issue()
            await until(lambda: len(logs) == 4, "a long life")
            last = certificates.current
            authority.issue()
            await until(lambda: certificates.current is not last, "looked at once more")
    assert [entry["event"].startswith("a certificate in use expires soon") for entry in logs] == [
        True, False, True, False, False,
    ]  # fmt: skip


def test_files_that_went_bad_since_they_were_checked_are_an_error(tmp_path: Path) -> None:
    """A process doesn't start with them."""
    authority = Authority(tmp_path)
    authority.issue()
    (tmp_path / "own.key").write_text("")
    with pytest.raises(ConfigError, match=r"tls\.key.*can't be used"):
        Certificates(_files(authority.section()))
