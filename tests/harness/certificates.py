"""Certificates for tests, made by openssl: authorities, what these issue, and how who renews them replaces files."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from meshctl.tls import TlsFiles
from tests.harness.tools import DEADLINE_S

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-batch")


def self_signed(directory: Path, name: str, san: str = "IP:127.0.0.1") -> Path:
    """A key and its own certificate, which whoever trusts it takes as CA: NAME.key, and NAME.crt, which is returned."""
    certificate = directory / f"{name}.crt"
    paths = ("-subj", f"/CN={name}", "-keyout", certificate.with_suffix(".key"), "-out", certificate)
    _openssl("req", "-x509", *_KEY, "-days", "2", "-addext", f"subjectAltName={san}", *paths)
    return certificate


@dataclass(frozen=True)
class Authority:
    """Issues certificates into `directory`."""

    directory: Path
    name: str = "authority"

    def __post_init__(self) -> None:
        self_signed(self.directory, self.name)

    @property
    def ca(self) -> Path:
        """What others trust."""
        return self.directory / f"{self.name}.crt"

    def issue(self, name: str, san: str = "", subject: str | None = None, days: int = 2) -> Path:
        """A key and its certificate: NAME.key, and NAME.crt, which is returned. `subject` is ``/CN=NAME`` unless given;
        with `days` below 0 it has expired."""
        certificate, key = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        request, extensions = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        extensions.write_text("basicConstraints=CA:FALSE\n" + (f"subjectAltName={san}\n" if san else ""))
        _openssl("req", "-new", *_KEY, "-subj", subject or f"/CN={name}", "-keyout", key, "-out", request)
        ca = ("-CA", self.ca, "-CAkey", self.ca.with_suffix(".key"), "-set_serial", f"0x{os.urandom(8).hex()}")
        how = ("-days", str(days), "-extfile", extensions, "-in", request, "-out", certificate)
        _openssl("x509", "-req", *ca, *how)
        return certificate


def tls_files(certificate: Path, client_ca: Path | None = None) -> TlsFiles:
    """Of a certificate that was made here."""
    return TlsFiles(certificate, certificate.with_suffix(".key"), client_ca)


def put(source: Path, target: Path) -> None:
    """Replaces a file as who renews certificates does: at once."""
    copy = target.with_name("copy")
    copy.write_bytes(source.read_bytes())
    os.replace(copy, target)  # noqa: PTH105 (as `mv` does)


def put_pair(source: Path, target: Path) -> None:
    """`put` of the key and its certificate, one after the other: for a moment they don't belong together."""
    put(source.with_suffix(".key"), target.with_suffix(".key"))
    put(source, target)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
