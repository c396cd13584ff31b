"""The bootstrap of an Envoy that gets its routes from our xDS server. Pure: addresses in, plain data out.

The listener is static and everything else comes over ADS: see docs/decisions/0002-static-listener.md.
"""

from __future__ import annotations

from typing import Any

from meshctl.address import Address
from meshctl.model import PROXY_GROUP
from xds.envoytls import EnvoyTls, transport_socket
from xds.translate import ROUTE_CONFIGURATION
from xds.wire import ADMIN_METADATA, GROUP_METADATA

XDS_CLUSTER = "xds_cluster"
MAX_REQUEST_HEADERS_KB = 96
"""A nonsense size header of many kB is served by the default route, not refused with 431."""
STREAM_IDLE_TIMEOUT = "300s"
"""Each route has its own timeout, which is shorter; this ends what a client left open."""
_TYPE = "type.googleapis.com/envoy.extensions"


def bootstrap(
    xds: Address,
    listen: Address,
    admin: Address,
    node_id: str,
    *,
    group: str = "",
    tls: EnvoyTls | None = None,
    delta: bool = False,
) -> dict[str, Any]:
    """The bootstrap of one gateway of `group` ("": the group of all that name none); with `tls`, the files of
    `envoytls.secret_files` belong to it. `delta`: it is told what changed, instead of the state of the world."""
    # 0s: wait for as long as it takes. An Envoy without routes is not ready, rather than ready and answering 404.
    ads = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
    routes = {"rds": {"route_config_name": ROUTE_CONFIGURATION, "config_source": ads}}
    return {
        **base(admin, node_id, group),
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC" if delta else "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": XDS_CLUSTER}}],
                # The node is 35 kB of extensions in a real Envoy: once per stream is enough.
                "set_node_on_first_message_only": True,
            },
            "cds_config": ads,
        },
        "static_resources": {"listeners": [listener(listen, routes)], "clusters": [_xds_cluster(xds, tls, node_id)]},
    }


def base(admin: Address, node_id: str, group: str = "") -> dict[str, Any]:
    """What every bootstrap of ours has: who it is, admin interface, limits."""
    metadata = {ADMIN_METADATA: str(admin)} | ({GROUP_METADATA: group} if group else {})
    return {
        "node": {"id": node_id, "cluster": PROXY_GROUP, "metadata": metadata},
        "admin": {"address": socket_address(admin)},
        "layered_runtime": {
            "layers": [
                {
                    "name": "meshctl",
                    "static_layer": {
                        # The legacy header is matched by a regular expression; the default (100) is too small for it.
                        "re2.max_program_size.error_level": 32768,
                        # Connections are the clients' business; Envoy warns unless a limit is chosen.
                        "overload.global_downstream_max_connections": 1_000_000,
                    },
                }
            ]
        },
    }


def socket_address(address: Address) -> dict[str, Any]:
    """As Envoy writes it."""
    return {"socket_address": {"address": address.host, "port_value": address.port}}


def listener(address: Address, routes: dict[str, Any]) -> dict[str, Any]:
    """The listener with its HTTP connection manager; `routes` is its ``rds`` or ``route_config``."""
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ingress",
        "codec_type": "AUTO",
        **routes,
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}}
        ],
        "server_header_transformation": "APPEND_IF_ABSENT",
        "max_request_headers_kb": MAX_REQUEST_HEADERS_KB,
        "stream_idle_timeout": STREAM_IDLE_TIMEOUT,
        "request_headers_timeout": "10s",
        "common_http_protocol_options": {"idle_timeout": "3600s", "headers_with_underscores_action": "ALLOW"},
        # A tracing id per request is work and a header that nobody here reads.
        "generate_request_id": False,
    }
    network = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {"name": "ingress", "address": socket_address(address), "filter_chains": [{"filters": [network]}]}


def http2() -> dict[str, Any]:
    """HTTP/2 to the xDS server, with pings: a controller that vanished is noticed within 15 s."""
    options = {"connection_keepalive": {"interval": "10s", "timeout": "5s"}}
    return {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": options},
        }
    }


def _xds_cluster(xds: Address, tls: EnvoyTls | None, node_id: str) -> dict[str, Any]:
    return {
        "name": XDS_CLUSTER,
        "type": "STRICT_DNS",
        "dns_lookup_family": "ALL",  # by default Envoy takes IPv6 addresses alone where a name has some
        "connect_timeout": "1s",
        "typed_extension_protocol_options": http2(),
        "load_assignment": static_assignment(XDS_CLUSTER, [xds]),
        **({} if tls is None else {"transport_socket": transport_socket(tls, xds, node_id)}),
    }


def static_assignment(name: str, endpoints: list[Address]) -> dict[str, Any]:
    """A load assignment over `endpoints`, all alike."""
    members = [{"endpoint": {"address": socket_address(endpoint)}} for endpoint in endpoints]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": members}]}
