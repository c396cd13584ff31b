"""The xDS server's certificates, as gRPC wants them, and whom they let in.

A certificate that is renewed is used from the next handshake on, at most `LOOK_S` late; streams that are open stay.
gRPC asks before each handshake, from threads of its own, so the files are looked at then, and by one thread at a time,
instead of by a task that somebody would have to end. Invariant: what is handed to gRPC was checked together
(`LastGood`): files that don't fit change nothing.

A client must show a certificate wherever a CA for clients is given: otherwise the group that it names would be its own
word. gRPC's server resumes no sessions, so each new connection is checked anew, and one whose certificate has expired
gets no further.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from meshctl.api.document import read_bounded
from meshctl.errors import InputError
from meshctl.tls import LastGood, TlsFiles
from xds.identity import Identities, Identity

LOOK_S = 1.0
"""Handshakes closer together than this share one look at the files: a thousand may come at once."""
NAMED = Identities()
"""Each belongs to the group that its certificate is named after."""


@dataclass(frozen=True, slots=True)
class Security:
    """TLS, and who may belong to which group. A server without one speaks plain text and believes what it is told."""

    tls: TlsFiles
    identities: Identities = NAMED

    @staticmethod
    def load(tls: TlsFiles, identities: Path | None) -> Security:
        """With the rules of a file. Raises InputError when it has none, or can't be used with `tls`."""
        if identities is None:
            return Security(tls)
        if tls.client_ca is None:
            raise InputError(f"{identities}: says who may belong to which group: --xds-client-ca must prove who is who")
        return Security(tls, Identities.parse(read_bounded(identities), str(identities)))

    def credentials(self) -> grpc.ServerCredentials:
        """For one server, which follows the files while it runs. Raises InputError when they can't be used now."""
        certificates = _Certificates(self.tls)
        return grpc.dynamic_ssl_server_credentials(
            certificates.newest(), certificates.renewed, require_client_authentication=self.tls.client_ca is not None
        )

    def check(self, auth: Mapping[str, Sequence[bytes]], group: str) -> Identity:
        """Who the peer is, by its connection's auth_context. Raises NotAllowedError if it may not belong to `group`."""
        identity = Identity.of(auth)
        self.identities.check(identity, group)
        return identity


class _Certificates:
    """The newest ones that are good, for gRPC's threads."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._good = LastGood(files)
        self._lock = threading.Lock()
        self._next_look_s = time.monotonic() + LOOK_S

    def newest(self) -> grpc.ServerCertificateConfiguration:
        files, contents = self._files, self._good.contents
        pair = contents[files.key], contents[files.cert]
        return grpc.ssl_server_certificate_configuration([pair], files.client_ca and contents[files.client_ca])

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Those to use from now on; None for those in use."""
        if time.monotonic() < self._next_look_s or not self._lock.acquire(blocking=False):
            return None  # another thread looks: its answer will be the server's
        try:
            found = self.newest() if self._good.renewed() else None
            self._next_look_s = time.monotonic() + LOOK_S
            return found
        finally:
            self._lock.release()
