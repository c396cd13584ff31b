"""What a gRPC client of its own `xds:///` resolver is served of one route. Pure.

gRPC's resolver knows the same resources as Envoy, but not all of what they say: it ignores the weights of endpoints.
It does follow those of a route's clusters and those of a cluster's localities: each request draws one. So a size class
is a choice of clusters, one for each GPU product, and a cluster has a locality for each weight that its endpoints have,
inside which they take turns. The share of an endpoint is then what the plan says.

Weights that differ by rounding only (`ALIKE`) share a locality: 333, 333 and 334 take turns, rather than 666 and 334
being drawn. Turns are worth that: of four equal servers at 70 % load a request waits 0.19 service times in the mean
when they take turns, 1.16 when they are drawn (simulated: Poisson arrivals, constant service times).

Invariants
- A size class always has a cluster to go to: requests are late or UNAVAILABLE, never "no route".
- Clusters follow from the spec and the products of the endpoints, so that a shift of weights is a change of the route
  configuration and of load assignments only.
- A product that gets nothing keeps its endpoints: load assignments arrive before the routes, and until these do, some
  requests still go there. Only when nobody at all is ready there is nobody to go to.
- A locality is named after its first endpoint: while its endpoints have weights alike, they stay together whatever the
  weight is. gRPC keeps each locality that it ever saw for 15 minutes; named after weights they would pile up.

Left out, as gRPC has no such thing: the least-request balancer, outlier detection by consecutive failures, a time-out
per try. Retries of what no server has begun it does by itself. Hosts with a `*` can't be named by a client.

Source: https://github.com/grpc/proposal, A27, A28, A31, A42, A44.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

from envoy_data_plane.envoy.config.cluster import v3 as cluster_v3
from envoy_data_plane.envoy.config.core import v3 as core_v3
from envoy_data_plane.envoy.config.route import v3 as route_v3
from envoy_data_plane.envoy.extensions.filters.http.router import v3 as router_v3
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm_v3
from envoy_data_plane.google.protobuf import Any

from meshctl.model import DEFAULT_CLASS, Endpoint, Protocol, Retry, RouteId, RoutePlan, RouteSpec, cluster_name
from xds.assignments import lb_endpoint, members, weights_of
from xds.requests import bare_hosts
from xds.translate import UNLIMITED, Resource, resource_of, route_match, text
from xds.wire import TypeUrl, field, integer

NO_PRODUCT = "-"
"""Of endpoints whose GPU is unknown: no product is called so."""
ALIKE = 1.02
"""Largest ratio of two weights in one locality: less than a dead band, more than the rounding of weights from 50 up."""
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
    fleets: dict[str, list[Endpoint]] = {}
    for endpoint in sorted(endpoints, key=lambda e: e.gpu):
        fleets.setdefault(endpoint.gpu, []).append(endpoint)
    ready = members(endpoints)
    clusters: dict[str, Resource] = {}
    assignments: dict[str, Resource] = {}
    choices: dict[str, dict[str, int]] = {}
    for size in (*(s.name for s in spec.sizes), DEFAULT_CLASS):
        weights = dict(zip(ready.ids, weights_of(ready, plan.weights.get(size, {})), strict=True))
        choice = choices[size] = {}
        for product, fleet in fleets.items() or [("", [])]:
            name = f"{cluster_name(spec.id, size)}/{product or NO_PRODUCT}"
            own = [weights.get(endpoint.id, 0) for endpoint in fleet]
            choice[name] = sum(own)
            if weights and not any(own):
                own = [1] * len(fleet)
            clusters[name] = resource_of(TypeUrl.CLUSTER, spec.id, name, text(1, name) + _cluster_tail())
            assignments[name] = _assignment(spec.id, name, fleet, own)
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


def _assignment(route: RouteId, name: str, fleet: Sequence[Endpoint], weights: Sequence[int]) -> Resource:
    """Of those with a weight."""
    data = text(1, name) + b"".join(_locality(fleet, together, weights) for together in _alike(weights))
    return resource_of(TypeUrl.ENDPOINT, route, name, data, weights=tuple(filter(None, weights)))


def _alike(weights: Sequence[int]) -> list[list[int]]:
    """The positions of those with a weight, those of weights alike together; each in order, and by the first."""
    groups: list[list[int]] = []
    lightest = 0
    for weight, position in sorted((weight, i) for i, weight in enumerate(weights) if weight):
        if groups and weight <= lightest * ALIKE:
            groups[-1].append(position)
        else:
            groups.append([position])
            lightest = weight
    return sorted(sorted(group) for group in groups)


def _locality(fleet: Sequence[Endpoint], together: list[int], weights: Sequence[int]) -> bytes:
    """Field endpoints = 2 of a ClusterLoadAssignment: locality = 1, lb_endpoints = 2, load_balancing_weight = 3."""
    endpoints = b"".join(field(2, lb_endpoint(fleet[i].address, fleet[i].port)) for i in together)
    total = sum(weights[i] for i in together)
    return field(2, field(1, text(3, fleet[together[0]].id)) + endpoints + field(3, integer(1, total)))


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
