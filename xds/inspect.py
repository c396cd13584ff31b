"""What one may know of a connected client: how far it is, and what it holds. Pure; filled by the server, read by the
admin API (`meshctl proxy-status`, `meshctl proxy-config`).

Said is what the client itself said: a type is SYNCED when the client acknowledged exactly what it should have now, and
what it holds is what it acknowledged, never what was merely sent. Rejected: Envoy's Client Status Discovery Service.
It answers the same question in a message of its own that only an xDS client reads; people ask here, and programs over
the JSON of the admin API. Words and columns are those of istioctl, which users of meshes know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from xds.wire import TypeUrl, fields

SHORT: Mapping[str, str] = MappingProxyType(
    {TypeUrl.CLUSTER: "CDS", TypeUrl.ENDPOINT: "EDS", TypeUrl.LISTENER: "LDS", TypeUrl.ROUTE: "RDS"}
)
"""What the types are called where people read them, in the order in which a change is sent."""


class SyncState(StrEnum):
    """How far a client is with one resource type."""

    SYNCED = "SYNCED"
    """It acknowledged what it should have now."""
    STALE = "STALE"
    """Something newer was sent and is not answered, or is due."""
    NACKED = "NACKED"
    """It refused the newest that it was sent, and has what it acknowledged before."""
    NOT_SENT = "NOT SENT"
    """It asked, and nothing was sent: there is nothing of what it asked for."""
    NOT_ASKED = "NOT ASKED"
    """It did not subscribe to this type."""


@dataclass(frozen=True, slots=True)
class TypeStatus:
    """One resource type on one stream. Times are those of the monotonic clock, None for what has not happened."""

    type: str
    """One of `SHORT`'s values."""
    state: SyncState
    resources: int = 0
    """How many it acknowledged."""
    version: str = ""
    """Of what it acknowledged; "" when nothing."""
    sent_at_s: float | None = None
    """When the newest response was written."""
    acked_at_s: float | None = None
    error: str = ""
    """The client's words when it refused, "" once it accepted something newer."""


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """One stream. A client that uses a service per type has several, and so may several clients with one node id."""

    node: str
    group: str
    flavour: str
    """``envoy`` or ``grpc``."""
    peer: str
    """Its address, as gRPC says it."""
    identity: str
    """Of its certificate; "" without one."""
    protocol: str
    """``sotw`` or ``delta``."""
    service: str
    """``ADS``, or the short name of the one type that the stream is for."""
    connected_s: float
    """For how long."""
    types: tuple[TypeStatus, ...] = ()
    """In the order of `SHORT`."""


def decode(packed: bytes) -> dict[str, Any]:
    """A resource as protobuf's JSON says it, from the bytes it has in a response (field 2, an Any).

    Slow (7 ms for a cluster, as much for ten endpoints): not for a server. What is of no known type, which would be a
    bug, is said under ``error`` and fails nothing else. Raises ProtocolError for what is no field.
    """
    # Half a second of imports: only for who looks. The three are what resources carry inside, in an Any of their own.
    import envoy_data_plane.envoy.extensions.filters.http.router.v3
    import envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3
    import envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3  # noqa: F401 (registers its types)
    from envoy_data_plane.google.protobuf import Any as AnyMessage

    import xds.translate  # noqa: F401 (registers the types of resources)

    message = AnyMessage.parse(b"".join(value for _, value in fields(packed) if isinstance(value, bytes)))
    try:
        decoded: dict[str, Any] = message.to_dict()
    except TypeError as unregistered:
        return {"@type": message.type_url, "error": str(unregistered)}
    return decoded
