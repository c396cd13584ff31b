"""The bootstrap of a gRPC client that finds its servers through our xDS server. Pure: addresses in, plain data out.

gRPC reads it from the file that GRPC_XDS_BOOTSTRAP names, or from GRPC_XDS_BOOTSTRAP_CONFIG itself. Source of the
format: https://github.com/grpc/proposal, A27 (xDS), A65 (TLS to the xDS server).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshctl.address import Address
from meshctl.model import PROXY_GROUP
from xds.wire import GROUP_METADATA

REFRESH = "60s"
"""How often gRPC looks whether the files of certificates changed."""


@dataclass(frozen=True, slots=True)
class ClientTls:
    """Files that the client reads, PEM."""

    ca: Path
    cert: Path | None = None
    """What it shows to the server; None: nothing."""
    key: Path | None = None


def grpc_bootstrap(xds: Address, node_id: str, *, group: str = "", tls: ClientTls | None = None) -> dict[str, Any]:
    """The bootstrap of one client of `group` ("": the group of all that name none). Plain text without `tls`."""
    metadata = {"metadata": {GROUP_METADATA: group}} if group else {}
    return {
        "xds_servers": [
            {"server_uri": str(xds), "channel_creds": [_credentials(tls)], "server_features": ["xds_v3"]},
        ],
        "node": {"id": node_id, "cluster": PROXY_GROUP, **metadata},
    }


def _credentials(tls: ClientTls | None) -> dict[str, Any]:
    if tls is None:
        return {"type": "insecure"}
    files = {"ca_certificate_file": tls.ca, "certificate_file": tls.cert, "private_key_file": tls.key}
    named = {name: str(path) for name, path in files.items() if path is not None}
    return {"type": "tls", "config": {**named, "refresh_interval": REFRESH}}
