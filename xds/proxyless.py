"""What a gRPC client of its own `xds:///` resolver is served of one route. Pure.

gRPC's resolver knows the same resources as Envoy, but not all of what they say: it ignores the weights of endpoints.
It does follow those of a route's clusters and those of a cluster's localities, both exactly and by chance. So a size
class is a choice of clusters, one for each GPU product, and in a cluster every endpoint is a locality of its own. The
share of an endpoint is then what the plan says.

Invariants
- A size class always has a cluster to go to: requests are late or UNAVAILABLE, never "no route".
- Clusters follow from the spec and the products of the endpoints, so that a shift of weights is a change of the route
  configuration and of load assignments only.
- A locality is named after its endpoint: a new weight moves nobody to another locality, which gRPC would take for new
  servers to connect to.

Rejected: a locality for all endpoints of the same weight. Round robin inside it would be smoother than chance, but each
change of a weight moves endpoints between localities, and requests wait while those connect.

Left out, as gRPC has no such thing: the least-request balancer, outlier detection by consecutive failures, a time-out
per try. Retries of what no server has begun it does by itself. Hosts with a `*` can't be named by a client.

Source: https://github.com/grpc/proposal, A27, A28, A31, A42, A44.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

from envoy_data_plane.envoy.config.cluster import v3 as cluster_v3
from envoy_data_plane.envoy.config.core import v3 as core_v3
from envoy_data_plane.envoy.config.route import v3 as route_v3
from envoy_data_plane.envoy.extensions.filters.http.router import v3 as router_v3
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm_v3
from envoy_data_plane.google.protobuf import Any

from meshctl.model import DEFAULT_CLASS, Protocol, Retry, RouteId, RoutePlan, RouteSpec, cluster_name
from xds.assignments import Members, members, weights_of
from xds.requests import bare_hosts
from xds.translate import UNLIMITED, Resource, resource_of, route_match, text
from xds.wire import TypeUrl, field, integer

NO_PRODUCT = "-"
"""Of endpoints whose GPU is unknown: no product is called so."""
_MANAGER = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


@dataclass(frozen=True, slots=True)
class ClientResources:
    """All that one route needs. It is published whole or not at all."""

    route: RouteId
    hosts: tuple[str, ...]
    """Those that a client can name: ``xds:///HOST``."""
    groups: tuple[str, ...]
    """Groups of clients that are served the route."""
    clusters: Mapping[str, Resource]
    assignments: Mapping[str, Resource]
    """By cluster name."""
    routes: Resource
    """The RouteConfiguration, named like the route."""


def client_resources(plan: RoutePlan) -> ClientResources | None:
    """The resources of one route; None when its servers don't speak gRPC."""
    spec, endpoints = plan.route.spec, plan.route.endpoints
    if spec.protocol is not Protocol.GRPC:
        return None
    products = sorted({endpoint.gpu for endpoint in endpoints}) or [""]
    clusters: dict[str, Resource] = {}
    assignments: dict[str, Resource] = {}
    choices: dict[str, dict[str, int]] = {}
    some = members(endpoints)
    gpus = [endpoint.gpu for endpoint in endpoints if endpoint.ready]
    for size in (*(s.name for s in spec.sizes), DEFAULT_CLASS):
        weights = weights_of(some, plan.weights.get(size, {}))
        choice = choices[size] = {}
        for product in products:
            name = f"{cluster_name(spec.id, size)}/{product or NO_PRODUCT}"
            own = tuple(weight if gpu == product else 0 for gpu, weight in zip(gpus, weights, strict=True))
            choice[name] = sum(own)
            clusters[name] = resource_of(TypeUrl.CLUSTER, spec.id, name, text(1, name) + _cluster_tail())
            assignments[name] = _assignment(spec.id, name, some, own)
    return ClientResources(
        route=spec.id,
        hosts=tuple(host for host in bare_hosts(spec.hosts) if "*" not in host),
        groups=spec.proxy_groups,
        clusters=clusters,
        assignments=assignments,
        routes=_routes(spec, choices),
    )


def listener(host: str, routes: Resource) -> Resource:
    """What ``xds:///host`` asks for first: a Listener that names the RouteConfiguration `routes`."""
    # HttpConnectionManager.rds = 3: config_source = 1, route_config_name = 2; Listener.api_listener.api_listener: 19, 1
    manager = field(3, field(1, _ads()) + text(2, routes.name)) + _filters()
    data = text(1, host) + field(19, field(1, text(1, _MANAGER) + field(2, manager)))
    return resource_of(TypeUrl.LISTENER, routes.route, host, data, needs=(routes.name,))


@lru_cache(maxsize=1)
def _ads() -> bytes:
    return bytes(core_v3.ConfigSource(ads=core_v3.AggregatedConfigSource(), resource_api_version=core_v3.ApiVersion.V3))


@lru_cache(maxsize=1)
def _filters() -> bytes:
    router = hcm_v3.HttpFilter(name="envoy.filters.http.router", typed_config=Any.pack(router_v3.Router()))
    return bytes(hcm_v3.HttpConnectionManager(http_filters=[router]))


@lru_cache(maxsize=1)
def _cluster_tail() -> bytes:
    """All of a cluster but its name, encoded."""
    ads = core_v3.ConfigSource(ads=core_v3.AggregatedConfigSource(), resource_api_version=core_v3.ApiVersion.V3)
    return bytes(
        cluster_v3.Cluster(
            type=cluster_v3.ClusterDiscoveryType.EDS,
            eds_cluster_config=cluster_v3.ClusterEdsClusterConfig(eds_config=ads),
            lb_policy=cluster_v3.ClusterLbPolicy.ROUND_ROBIN,
            # As for Envoys: queueing is the servers' business. gRPC's default is 1024 requests.
            circuit_breakers=cluster_v3.CircuitBreakers(
                thresholds=[cluster_v3.CircuitBreakersThresholds(max_requests=UNLIMITED)]
            ),
        )
    )


def _assignment(route: RouteId, name: str, of: Members, weights: tuple[int, ...]) -> Resource:
    """Of the members with a weight."""
    used = [(e, head, weight) for e, head, weight in zip(of.ids, of.heads, weights, strict=True) if weight]
    data = text(1, name) + b"".join(_locality(e, head, weight) for e, head, weight in used)
    return resource_of(TypeUrl.ENDPOINT, route, name, data, weights=tuple(weight for _, _, weight in used))


@lru_cache(maxsize=65536)
def _locality(name: str, head: bytes, weight: int) -> bytes:
    """Field endpoints = 2 of a ClusterLoadAssignment: locality = 1, lb_endpoints = 2, load_balancing_weight = 3."""
    return field(2, field(1, text(3, name)) + field(2, head) + field(3, integer(1, weight)))


def _routes(spec: RouteSpec, choices: Mapping[str, Mapping[str, int]]) -> Resource:
    """One virtual host for any authority: who got here named one of the route's hosts."""
    tail = _action_tail(spec.timeout_s, spec.retry)
    actions = {size: _action(choice) + tail for size, choice in choices.items()}
    rules = [
        route_match(spec.headers[: i + 1], size) + field(2, actions[size.name])
        for i in range(len(spec.headers))
        for size in spec.sizes
    ]
    rules.append(route_match((), None) + field(2, actions[DEFAULT_CLASS]))
    host = text(1, str(spec.id)) + text(2, "*") + b"".join(field(3, rule) for rule in rules)
    needs = frozenset(name for choice in choices.values() for name in _chosen(choice))
    return resource_of(TypeUrl.ROUTE, spec.id, str(spec.id), text(1, str(spec.id)) + field(2, host), needs=needs)


def _chosen(choice: Mapping[str, int]) -> Mapping[str, int]:
    """Without the zeros, which gRPC refuses to have only: with nobody ready all of them, where nobody answers."""
    return {name: weight for name, weight in choice.items() if weight} or dict.fromkeys(choice, 1)


def _action(choice: Mapping[str, int]) -> bytes:
    """RouteAction.weighted_clusters = 3: clusters = 1, of which name = 1, weight = 2."""
    clusters = (text(1, name) + field(2, integer(1, weight)) for name, weight in _chosen(choice).items())
    return field(3, b"".join(field(1, one) for one in clusters))


@lru_cache(maxsize=1024)
def _action_tail(timeout_s: float, retry: Retry) -> bytes:
    """All of a RouteAction but its clusters."""
    limit = route_v3.RouteActionMaxStreamDuration(max_stream_duration=timedelta(seconds=timeout_s))
    again = retry.idempotent and retry.attempts > 0
    policy = route_v3.RetryPolicy(retry_on="unavailable", num_retries=retry.attempts) if again else None
    return bytes(route_v3.RouteAction(max_stream_duration=limit, retry_policy=policy))
