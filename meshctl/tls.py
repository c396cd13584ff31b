"""TLS for a server of ours, from files that change while it runs: who renews certificates replaces them in place.

New connections are served with what the files say; those that are open stay. Where the files can't be used together
(one is replaced, the next one not yet) the last good ones stay in force and a warning says so. Files are compared at
intervals rather than watched: a few KB, and no notification can be lost.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import structlog

from meshctl.errors import InputError

log = structlog.get_logger(__name__)

RELOAD_S = 10.0
"""A renewed certificate is in use after this long at most; renewals are days before the old one ends."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files."""

    cert: Path
    """With the chain, the server's own first."""
    key: Path
    client_ca: Path | None = None
    """A client that shows a certificate must have it of one of these; None: nobody is asked for one. Whether one
    without may connect is the server's business: over HTTP it may (a kubelet that looks whether we are ready has none,
    and `stranger` says who that is), to the xDS server it may not."""

    def context(self) -> ssl.SSLContext:
        """Raises InputError naming the files when they can't be used."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.num_tickets = 0  # a session that is resumed would be one of a client whose CA has been taken out
        context.options |= ssl.OP_NO_TICKET
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_OPTIONAL
        except OSError as error:  # ssl.SSLError is one
            raise InputError(f"{self}: no good for TLS: {error}; all must be PEM, the key the certificate's") from error
        return context

    def contents(self) -> Mapping[Path, bytes]:
        """What the files hold now; nothing for one that can't be read."""
        return {path: _bytes(path) for path in (self.cert, self.key, self.client_ca) if path is not None}

    def __str__(self) -> str:
        return ", ".join(str(path) for path in (self.cert, self.key, self.client_ca) if path is not None)


def stranger(connection: asyncio.BaseTransport | None) -> bool:
    """Whether the client at the other end should have shown a certificate, and has not."""
    tls: ssl.SSLObject | None = None if connection is None else connection.get_extra_info("ssl_object")
    return tls is not None and tls.context.verify_mode is ssl.CERT_OPTIONAL and not tls.getpeercert(binary_form=True)


class LastGood:
    """What the files held when they could last be used together. Blocks while it reads them: a few KB."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises InputError when they can't be used."""
        self.files = files
        self.contents = self._seen = files.contents()
        self.context = files.context()

    def renewed(self) -> bool:
        """Looks again; whether there is something new to use. What is of no use is told once, in a warning."""
        contents = self.files.contents()
        if contents == self._seen:
            return False
        try:
            context = self.files.context()
        except InputError as error:
            self._seen = contents
            log.warning("the old certificates stay in use", error=str(error))
            return False
        if self.files.contents() != contents:  # replaced meanwhile: `context` may be of later ones; the next look tells
            return False
        self.contents = self._seen = contents
        self.context = context
        log.info("new certificates are in use", files=str(self.files))
        return True


class Renewing:
    """The context of a server whose files are looked at again and again, while `run` does."""

    def __init__(self, files: TlsFiles, every_s: float = RELOAD_S) -> None:
        """Raises InputError when the files can't be used."""
        self._newest, self._every_s = LastGood(files), every_s
        self.context = self._newest.context
        self.context.sni_callback = self._renewed  # at each handshake, also of clients that name no server

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            await asyncio.to_thread(self._newest.renewed)

    def _renewed(self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _: ssl.SSLContext) -> None:
        connection.context = self._newest.context


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _no_password() -> NoReturn:
    """A key with a password would make OpenSSL ask for it on the terminal."""
    raise OSError("the key has a password; give one without")
