"""TLS of our servers, as options say it, and where there has to be some."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from meshctl.errors import InputError

if TYPE_CHECKING:
    from meshctl.address import Address
    from meshctl.tls import TlsFiles


def tls_files(prefix: str, cert: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
    """None: no TLS. Raises InputError for options that belong together; `prefix` is that of their names ("xds-")."""
    from meshctl.tls import TlsFiles

    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        options = f"--{prefix}tls-cert, --{prefix}tls-key and --{prefix}client-ca"
        raise InputError(f"{options} belong together: give the first two, or none of them")
    return TlsFiles(cert, key, client_ca)


def xds_tls(
    listen: Address,
    cert: Path | None,
    key: Path | None,
    client_ca: Path | None,
    identities: Path | None,
    *,
    insecure: bool,
) -> TlsFiles | None:
    """What `meshctl run` serves proxies with; None: plain text.

    Raises InputError where others could connect without being asked who they are, unless that is wanted (`insecure`).
    """
    files = tls_files("xds-", cert, key, client_ca)
    if identities is not None and client_ca is None:
        raise InputError("--xds-identities says which certificate is for which group: give --xds-client-ca too")
    if insecure or listen.loopback or (files is not None and files.client_ca is not None):
        return files
    missing = "--xds-client-ca" if files is not None else "--xds-tls-cert, --xds-tls-key and --xds-client-ca"
    raise InputError(
        f"--xds {listen} can be reached by others, and nothing says who may connect: give {missing}; or listen on"
        " 127.0.0.1; or, where the network keeps strangers away, give --xds-insecure"
    )
