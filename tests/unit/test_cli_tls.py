"""Which options of `meshctl run` serve proxies over TLS, and where plain text is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshctl.address import Address
from meshctl.cli.tls import xds_tls
from meshctl.errors import InputError
from meshctl.tls import TlsFiles

CERT, KEY, CA, WHO = Path("cert"), Path("key"), Path("ca"), Path("who")


def asked(host: str, *files: Path | None, who: Path | None = None, insecure: bool = False) -> TlsFiles | None:
    """What is made of the options; `files` are certificate, key and CA, as far as they are given."""
    cert, key, ca = (*files, None, None, None)[:3]
    return xds_tls(Address(host, 18000), cert, key, ca, who, insecure=insecure)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_loopback_anything_goes(host: str) -> None:
    """Plain text, TLS, TLS that asks for certificates."""
    assert asked(host) is None
    assert asked(host, CERT, KEY) == TlsFiles(CERT, KEY)
    assert asked(host, CERT, KEY, CA, who=WHO) == TlsFiles(CERT, KEY, CA)


@pytest.mark.parametrize("host", ["10.0.0.1", "::", "example.org", "localhost.example.org"])
def test_where_others_can_connect_they_must_prove_who_they_are(host: str) -> None:
    """Or be let in by an option that says what it does."""
    with pytest.raises(InputError, match="give --xds-tls-cert, --xds-tls-key and --xds-client-ca; or listen on"):
        asked(host)
    with pytest.raises(InputError, match="nothing says who may connect: give --xds-client-ca; or"):
        asked(host, CERT, KEY)
    assert asked(host, CERT, KEY, CA) == TlsFiles(CERT, KEY, CA)
    assert asked(host, insecure=True) is None
    assert asked(host, CERT, KEY, insecure=True) == TlsFiles(CERT, KEY)


@pytest.mark.parametrize("given", [(CERT,), (None, KEY), (None, None, CA), (CERT, None, CA)])
def test_certificate_and_key_belong_together(given: tuple[Path | None, ...]) -> None:
    """Also on loopback, and whatever else is wanted."""
    with pytest.raises(InputError, match="--xds-tls-cert, --xds-tls-key and --xds-client-ca belong together"):
        asked("127.0.0.1", *given, insecure=True)


@pytest.mark.parametrize("given", [(), (CERT, KEY)])
def test_identities_need_proof(given: tuple[Path, ...]) -> None:
    """A file that says who may have what is of no use where nobody is asked."""
    with pytest.raises(InputError, match="give --xds-client-ca too"):
        asked("127.0.0.1", *given, who=WHO)
