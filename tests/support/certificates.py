"""Certificates for tests: an authority of their own, and the files that a configuration names."""

from __future__ import annotations

import datetime
import os
import ssl
from pathlib import Path

import trustme

HOST = "127.0.0.1"


class Authority:
    """Signs certificates, and puts them into files of a folder: `ca.pem`, and `NAME.pem` with `NAME.key`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self._signer = trustme.CA()
        self.ca = folder / "ca.pem"
        self._signer.cert_pem.write_to_path(self.ca)

    @property
    def trust(self) -> bytes:
        """The authority's own certificate."""
        return self._signer.cert_pem.bytes()

    def issue(self, name: str = "own", host: str = HOST, days: tuple[float, float] = (-1, 90)) -> None:
        """Puts a new certificate for `host` into place, each file at once. `days`: from when until when it is
        valid, counted from now."""
        now = datetime.datetime.now(datetime.UTC)
        begins, ends = (now + datetime.timedelta(days=day) for day in days)
        made = self._signer.issue_cert(host, not_before=begins, not_after=ends)
        put(self.folder / f"{name}.key", made.private_key_pem.bytes())
        put(self.folder / f"{name}.pem", b"".join(blob.bytes() for blob in made.cert_chain_pems))

    def section(self, name: str = "own") -> dict[str, str]:
        """The section `tls` with these files."""
        return {
            "cert": str(self.folder / f"{name}.pem"),
            "key": str(self.folder / f"{name}.key"),
            "ca": str(self.ca),
        }

    def server(self, name: str = "own") -> dict[str, str]:
        """The keys of `edge.tls` with these files."""
        return {key: path for key, path in self.section(name).items() if key != "ca"}

    def client(self) -> ssl.SSLContext:
        """Trusts what this authority has signed."""
        context = ssl.create_default_context(cadata=self.trust.decode())
        context.set_alpn_protocols(["h2", "http/1.1"])
        return context


def put(path: Path, data: bytes) -> None:
    """Puts another file in a file's place, as those do that renew certificates."""
    other = path.with_suffix(".new")
    other.write_bytes(data)
    os.replace(other, path)
