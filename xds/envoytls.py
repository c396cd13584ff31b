"""TLS between an Envoy and our xDS server, as Envoy's configuration. Pure: paths in, plain data out.

Certificates are named in files of their own, which Envoy takes for a secret discovery service: it reads them again when
they are renewed, which it does not do with files that its bootstrap names (docs/decisions/0009-xds-security.md). Who
renews a certificate must move it into its directory, as Kubernetes and `mv` do: that is what Envoy notices. A pair that
does not match (its second half comes in a moment) changes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshctl.address import Address

_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
_CA, _CERTIFICATE = "ca", "certificate"


@dataclass(frozen=True, slots=True)
class EnvoyTls:
    """What an Envoy wants to see, and what it shows. Absolute paths on its own file system, to PEM files."""

    ca: Path
    """The server's certificate must be of one of these, and for the name or address by which the server is found."""
    cert: Path | None
    """Envoy's own, with its chain; None: it shows none."""
    key: Path | None
    """With `cert`, and only then."""
    secrets: Path
    """Directory of the files that `secret_files` tells of."""


def secret_files(tls: EnvoyTls, xds: Address, node_id: str) -> dict[str, dict[str, Any]]:
    """File name -> its content, to be written as JSON: one secret each, the most that Envoy takes from a file."""
    found = {
        _CA: {
            "validation_context": {
                "trusted_ca": {"filename": str(tls.ca)},
                "watched_directory": {"path": str(tls.ca.parent)},
                "match_typed_subject_alt_names": [
                    {"san_type": "IP_ADDRESS" if xds.ip else "DNS", "matcher": {"exact": xds.host}}
                ],
            }
        }
    }
    if tls.cert is not None:
        found[_CERTIFICATE] = {
            "tls_certificate": {
                "certificate_chain": {"filename": str(tls.cert)},
                "private_key": {"filename": str(tls.key)},
                "watched_directory": {"path": str(tls.cert.parent)},
            }
        }
    return {
        _file_name(node_id, name): {"resources": [{"@type": f"{_TYPE}.Secret", "name": name, **secret}]}
        for name, secret in found.items()
    }


def transport_socket(tls: EnvoyTls, xds: Address, node_id: str) -> dict[str, Any]:
    """Of the cluster that is the xDS server."""

    def secret(name: str) -> dict[str, Any]:
        source = {"path": str(tls.secrets / _file_name(node_id, name))}
        return {"name": name, "sds_config": {"path_config_source": source, "resource_api_version": "V3"}}

    context: dict[str, Any] = {
        "alpn_protocols": ["h2"],  # gRPC refuses who offers nothing
        "validation_context_sds_secret_config": secret(_CA),
    }
    if tls.cert is not None:
        context["tls_certificate_sds_secret_configs"] = [secret(_CERTIFICATE)]
    sni = {} if xds.ip else {"sni": xds.host}
    upstream = {"@type": f"{_TYPE}.UpstreamTlsContext", "common_tls_context": context, **sni}
    return {"name": "envoy.transport_sockets.tls", "typed_config": upstream}


def _file_name(node_id: str, secret: str) -> str:
    """The files of several Envoys may lie in one directory."""
    return f"{re.sub(r'[^A-Za-z0-9.-]', '_', node_id)}.xds-{secret}.json"
