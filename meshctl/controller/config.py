"""What `meshctl run` can be told. Light to import: no adapter, no server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from meshctl.address import Address

if TYPE_CHECKING:
    from meshctl.tls import TlsFiles

DEFAULT_XDS = Address("127.0.0.1", 18000)
DEFAULT_ADMIN = Address("127.0.0.1", 18001)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What `meshctl run` can be told about the cluster."""

    kubeconfig: Path | None = None
    """None: the cluster this runs in, else what kubectl would take."""
    namespaces: tuple[str, ...] = ()
    """Empty: all."""
    istio: bool = False
    """Write to Istio."""
    istiod: tuple[str, ...] = ()
    """URLs of istiod's monitoring port; empty: what was written is believed after a settle time."""
    lease: str | None = None
    """``namespace/name``; None: this is the only replica."""


@dataclass(frozen=True, slots=True)
class Config:
    """What `meshctl run` can be told."""

    manifests: Path | None
    """Directory with the desired state; None: `cluster` has it."""
    cluster: ClusterConfig | None = None
    prometheus: str | None = None
    """URL; None scrapes the endpoints and proxies directly."""
    xds: Address = DEFAULT_XDS
    """Port 0 takes a free one, here and for `admin`."""
    xds_tls: TlsFiles | None = None
    """None: plain text, which the command line allows on loopback or on request only."""
    xds_identities: Path | None = None
    """Who may have which group of proxies; None: whom the group is named after."""
    admin: Address = DEFAULT_ADMIN
    state: Path | None = None
    """State file; None takes the one that belongs to `manifests`. With a cluster there is none: what is in force is
    read back from it."""
    tick_s: float = 1.0
    window_s: float = 5.0
    """Rates are means over this time."""
