"""What gRPC is told of the xDS server: its methods, with bytes in and out, and the options of its connections."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import grpc

from xds.health import Health
from xds.limits import Limits
from xds.wire import TypeUrl

_DISCOVERY = {
    None: ("discovery.v3.AggregatedDiscoveryService", "AggregatedResources"),
    TypeUrl.CLUSTER: ("cluster.v3.ClusterDiscoveryService", "Clusters"),
    TypeUrl.ENDPOINT: ("endpoint.v3.EndpointDiscoveryService", "Endpoints"),
    TypeUrl.LISTENER: ("listener.v3.ListenerDiscoveryService", "Listeners"),
    TypeUrl.ROUTE: ("route.v3.RouteDiscoveryService", "Routes"),
}
METHODS: Mapping[str, tuple[TypeUrl | None, bool]] = MappingProxyType(
    {
        f"/envoy.service.{service}/{kind}{resources}": (only, kind == "Delta")
        for only, (service, resources) in _DISCOVERY.items()
        for kind in ("Stream", "Delta")
    }
)
"""Each method that is served: the one type that its streams are for (None: all), and whether it is incremental."""


def options(limits: Limits) -> Sequence[tuple[str, int]]:
    """Of the server's connections."""
    return (
        # Two servers on one port would each see half of the proxies.
        ("grpc.so_reuseport", 0),
        # A proxy that vanished without a FIN is noticed within 40 s, even with nothing to send.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Our bootstrap makes Envoy ping; gRPC's defaults would hang up on it ("too many pings").
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
        ("grpc.http2.max_ping_strikes", 0),
        # Requests are small: measuring how much could be on its way to us gains nothing, and costs a ping for every
        # message received, an eighth of the CPU time of a push and 8 kB a stream.
        ("grpc.http2.bdp_probe", 0),
        # A record of each connection for a service that is not served.
        ("grpc.enable_channelz", 0),
        # Streams are counted; a connection without one is a file that is open.
        ("grpc.max_connection_idle_ms", int(limits.first_request_s * 1000)),
        ("grpc.max_connection_age_ms", int(limits.connection_age_s * 1000)),
        ("grpc.max_connection_age_grace_ms", 10_000),
        ("grpc.max_receive_message_length", limits.message_bytes),
        ("grpc.max_send_message_length", -1),
    )


class DiscoveryHandler(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no type hints
    """Routes the methods we serve, with bytes in and out."""

    def __init__(self, serve: Callable[[TypeUrl | None, bool, AsyncIterator[bytes], Any], Any], health: Health) -> None:
        self._health = health
        self._handlers = {
            method: grpc.stream_stream_rpc_method_handler(partial(serve, only, delta))
            for method, (only, delta) in METHODS.items()
        }

    def service(self, call: Any) -> Any:
        return self._handlers.get(call.method) or self._health.handler(call.method)
