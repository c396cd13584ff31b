"""translate(plan) -> Resources: what is decided, in Envoy's words. Pure.

Per route: one cluster (EDS over ADS) and one load assignment for each size class and for `DEFAULT_CLASS`, and one
virtual host whose routes find the size class from the request's headers. All virtual hosts are in ONE
RouteConfiguration, `ROUTE_CONFIGURATION`.

Invariants
- Every route gets a virtual host whose last route matches everything: no request is refused for its size header.
- "First present wins": the matches of a header ask that the headers before it are absent. A first header with nonsense
  in it therefore falls through to the default route, whatever the headers after it say.
- The same RoutePlan gives the same bytes.

Encoding. A message encoder written in Python takes 0.1 ms per endpoint; 1000 routes of 10 endpoints would take half a
minute. Protobuf allows better: repeated fields concatenate and a message split in two merges. So what is common to many
resources is encoded once from envoy-data-plane's messages (the cached functions below), and what differs (names, hosts,
weights) is joined to it as single fields: a weight change only joins bytes. Google's own encoder was
rejected: its generated Envoy package owns the top-level names `xds` and `envoy`.

Rejected: weighted clusters (an independent random pick per request; per-endpoint weights walk a smooth schedule), and
subsets (need a metadata match per size class and can't weigh single endpoints).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from hashlib import blake2b

from envoy_data_plane.envoy.config.cluster import v3 as cluster_v3
from envoy_data_plane.envoy.config.core import v3 as core_v3
from envoy_data_plane.envoy.config.endpoint import v3 as endpoint_v3
from envoy_data_plane.envoy.config.route import v3 as route_v3
from envoy_data_plane.envoy.extensions.upstreams.http import v3 as http_v3
from envoy_data_plane.envoy.type import v3 as type_v3
from envoy_data_plane.envoy.type.matcher import v3 as matcher_v3
from envoy_data_plane.google.protobuf import Any

from meshctl.model import (
    DEFAULT_CLASS,
    EndpointId,
    LbPolicy,
    LoadBalancer,
    Plan,
    Problem,
    Retry,
    RouteId,
    RoutePlan,
    RouteSpec,
    SizeClass,
    cluster_name,
)
from xds.requests import LEGACY_HEADER, bare_hosts, retry_on, size_pattern
from xds.wire import TypeUrl, field, integer, packed

ROUTE_CONFIGURATION = "meshctl"
"""The one RouteConfiguration, which every listener of ours asks for."""
UNLIMITED = 2**32 - 1
"""Envoy's default circuit breakers (1024) answer bursts with 503. Queueing is the servers' business."""
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Resource:
    """One encoded resource. Its message is gone: the bytes are all that is kept of it."""

    name: str
    route: RouteId
    packed: bytes
    """As it stands in a response: an Any in field 2 (a virtual host: field 2 of a RouteConfiguration)."""
    digest: int
    """Of name and content, 128 bits."""
    needs: Collection[str] = ()
    """Resources it names: of a virtual host its clusters, of a listener its route configuration."""
    weights: tuple[int, ...] = ()
    """Of a load assignment's endpoints."""
    part: int = 0
    """A virtual host: the digest before its domains were claimed, which is what its route alone decides."""
    parts: tuple[Resource, ...] = ()
    """A route configuration of several routes: their virtual hosts."""

    @property
    def own_digest(self) -> int:
        """The digest of what the resource's route decides, whatever the other routes do."""
        return self.part or self.digest


@dataclass(frozen=True, slots=True)
class RouteResources:
    """All that one route needs. It is published whole or not at all."""

    route: RouteId
    hosts: tuple[str, ...]
    clusters: Mapping[str, Resource]
    assignments: Mapping[str, Resource]
    """By cluster name."""
    virtual_host: Resource
    """Without its domains, which depend on the other routes (`claim_hosts`)."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Everything a Plan needs, by route."""

    routes: Mapping[RouteId, RouteResources]


def translate(plan: Plan) -> Resources:
    """The resources of every route of `plan`."""
    return Resources({route: translate_route(plan.routes[route]) for route in sorted(plan.routes)})


def translate_route(plan: RoutePlan) -> RouteResources:
    """The resources of one route."""
    spec = plan.route.spec
    names = {size: cluster_name(spec.id, size) for size in (*(s.name for s in spec.sizes), DEFAULT_CLASS)}
    return RouteResources(
        route=spec.id,
        hosts=bare_hosts(spec.hosts),
        clusters={name: cluster(spec.id, name, cluster_tail(plan.load_balancer)) for name in names.values()},
        assignments={name: _assignment(plan, size, name) for size, name in names.items()},
        virtual_host=_virtual_host(spec, names),
    )


def claim_hosts(routes: Iterable[RouteResources]) -> tuple[dict[RouteId, tuple[str, ...]], tuple[Problem, ...]]:
    """The domains of each route's virtual host, and what could not be given.

    Envoy refuses a whole RouteConfiguration for one host claimed twice, so the first route by id keeps it and the
    other one does without; a route left without any host is not in the result.
    """
    owners: dict[str, RouteId] = {}
    problems: list[Problem] = []
    domains: dict[RouteId, tuple[str, ...]] = {}
    for resources in sorted(routes, key=lambda r: r.route):
        kept = []
        for host in resources.hosts:
            owner = owners.setdefault(host, resources.route)
            if owner == resources.route:
                kept.append(host)
            else:
                message = f"host {host!r} is already served by {owner}; remove it from one of the two routes"
                problems.append(Problem(where=f"ModelRoute {resources.route}", message=message, route=resources.route))
        if kept:
            domains[resources.route] = tuple(kept)
    return domains, tuple(problems)


@lru_cache(maxsize=4096)
def with_domains(virtual_host: Resource, domains: tuple[str, ...]) -> Resource:
    """`virtual_host` as it stands in the RouteConfiguration."""
    head = _text(1, virtual_host.name) + b"".join(_text(2, domain) for domain in domains)
    data = field(2, head + virtual_host.packed)
    digest = _digest(virtual_host.name, data)
    return replace(virtual_host, packed=data, digest=digest, part=virtual_host.digest)


def route_configuration(virtual_hosts: Iterable[Resource]) -> bytes:
    """The RouteConfiguration around its virtual hosts, as it stands in a response."""
    return packed(TypeUrl.ROUTE, _route_configuration_head() + b"".join(v.packed for v in virtual_hosts))


def _text(number: int, text: str) -> bytes:
    return field(number, text.encode())


def _digest(name: str, data: bytes) -> int:
    return int.from_bytes(blake2b(name.encode() + b"\0" + data, digest_size=16).digest(), "big")


def _resource(kind: TypeUrl, route: RouteId, name: str, data: bytes, weights: tuple[int, ...] = ()) -> Resource:
    return Resource(name, route, packed(kind, data), _digest(name, data), weights=weights)


# ------------------------------------------------------------------------------------------------------------ clusters


def cluster(route: RouteId, name: str, tail: bytes) -> Resource:
    """The cluster `name`; `tail` is all of it but the name, encoded."""
    return _resource(TypeUrl.CLUSTER, route, name, _text(1, name) + tail)


@lru_cache(maxsize=256)
def cluster_tail(balancer: LoadBalancer) -> bytes:
    """All of a cluster but its name, encoded."""
    least = balancer.policy is LbPolicy.LEAST_REQUEST
    message = cluster_v3.Cluster(
        type=cluster_v3.ClusterDiscoveryType.EDS,
        eds_cluster_config=cluster_v3.ClusterEdsClusterConfig(
            eds_config=core_v3.ConfigSource(
                ads=core_v3.AggregatedConfigSource(), resource_api_version=core_v3.ApiVersion.V3
            )
        ),
        # A GPU server in the same cluster answers a SYN in far less; a dead one costs this once, then a retry.
        connect_timeout=timedelta(seconds=1),
        lb_policy=cluster_v3.ClusterLbPolicy.LEAST_REQUEST if least else cluster_v3.ClusterLbPolicy.ROUND_ROBIN,
        least_request_lb_config=_least_request(balancer) if least else None,
        circuit_breakers=_circuit_breakers(),
        outlier_detection=_outlier_detection(),
        common_lb_config=cluster_v3.ClusterCommonLbConfig(
            # Panic (traffic to ejected endpoints too, once many are ejected) would undo the ejection just when half a
            # fleet answers errors fast. `max_ejection_percent` already keeps half of every cluster in use.
            healthy_panic_threshold=type_v3.Percent(value=0.0),
            # Envoy holds weight changes back for 1 s by default, to spare schedulers that see thousands of them.
            update_merge_window=timedelta(0),
        ),
        track_cluster_stats=cluster_v3.TrackClusterStats(per_endpoint_stats=True),
        upstream_connection_options=cluster_v3.UpstreamConnectionOptions(
            tcp_keepalive=core_v3.TcpKeepalive(keepalive_probes=3, keepalive_time=30, keepalive_interval=5)
        ),
        typed_extension_protocol_options={"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _upstream_http()},
    )
    return bytes(message)


def _least_request(balancer: LoadBalancer) -> cluster_v3.ClusterLeastRequestLbConfig:
    return cluster_v3.ClusterLeastRequestLbConfig(
        choice_count=balancer.choice_count,
        active_request_bias=core_v3.RuntimeDouble(
            default_value=balancer.active_request_bias, runtime_key="meshctl.active_request_bias"
        ),
    )


def _circuit_breakers() -> cluster_v3.CircuitBreakers:
    thresholds = [
        cluster_v3.CircuitBreakersThresholds(
            priority=priority,
            max_connections=UNLIMITED,
            max_pending_requests=UNLIMITED,
            max_requests=UNLIMITED,
            max_retries=UNLIMITED,
        )
        for priority in (core_v3.RoutingPriority.DEFAULT, core_v3.RoutingPriority.HIGH)
    ]
    return cluster_v3.CircuitBreakers(thresholds=thresholds)


def _outlier_detection() -> cluster_v3.OutlierDetection:
    """Ejects what fails outright within a few requests, for seconds: the weights follow within the loop's next ticks.

    Statistical ejection (success rate) is off: it would move traffic behind the decision's back.
    """
    return cluster_v3.OutlierDetection(
        interval=timedelta(seconds=1),
        base_ejection_time=timedelta(seconds=2),
        max_ejection_time=timedelta(seconds=10),
        max_ejection_percent=50,
        consecutive_5xx=5,
        enforcing_consecutive_5xx=100,
        consecutive_gateway_failure=3,
        enforcing_consecutive_gateway_failure=100,
        split_external_local_origin_errors=True,
        consecutive_local_origin_failure=3,
        enforcing_consecutive_local_origin_failure=100,
        enforcing_success_rate=0,
        enforcing_local_origin_success_rate=0,
    )


def _upstream_http() -> Any:
    return Any.pack(
        http_v3.HttpProtocolOptions(
            # Shorter than the keep-alive of the usual servers (uvicorn 5 s, aiohttp 75 s): the proxy, not the server,
            # closes an idle connection, so no request is written into a closing one.
            common_http_protocol_options=core_v3.HttpProtocolOptions(idle_timeout=timedelta(seconds=4)),
            explicit_http_config=http_v3.HttpProtocolOptionsExplicitHttpConfig(
                http_protocol_options=core_v3.Http1ProtocolOptions()
            ),
        )
    )


# --------------------------------------------------------------------------------------------------- load assignments


def _assignment(plan: RoutePlan, size: str, name: str) -> Resource:
    """Endpoints that get no new requests (not ready) and those of weight 0 are left out: Envoy's weights start at 1.

    When every ready endpoint has weight 0 (the sum says "nothing can serve this"), all of them stay, equally: a
    request that may be late is better than a 503. With no ready endpoint the assignment is empty and Envoy answers 503.
    """
    table: Mapping[EndpointId, int] = plan.weights.get(size, {})
    ready = [e for e in plan.route.endpoints if e.ready]
    weighted = [(e, table.get(e.id, 0)) for e in ready]
    used = [(e, weight) for e, weight in weighted if weight > 0] or [(e, 1) for e in ready]
    locality = b"".join(field(2, _lb_endpoint(e.address, e.port) + _lb_weight(weight)) for e, weight in used)
    data = _text(1, name) + (field(2, locality) if used else b"")
    return _resource(TypeUrl.ENDPOINT, plan.route.spec.id, name, data, tuple(weight for _, weight in used))


@lru_cache(maxsize=65536)
def _lb_endpoint(address: str, port: int) -> bytes:
    """LbEndpoint.endpoint.address.socket_address, each the first field of its message; address = 2, port_value = 3.

    By hand, as this is done for each of 10,000 endpoints at the start: 1 s of CPU with the generated classes.
    """
    socket = _text(2, address) + integer(3, port)
    return field(1, field(1, field(1, socket)))


@lru_cache(maxsize=4096)
def _lb_weight(weight: int) -> bytes:
    return bytes(endpoint_v3.LbEndpoint(load_balancing_weight=weight))


# -------------------------------------------------------------------------------------------------------------- routes


def _virtual_host(spec: RouteSpec, names: Mapping[str, str]) -> Resource:
    action = _action_tail(spec.timeout_s, spec.retry)
    routes = [
        _route(_match(spec.headers[: i + 1], size), names[size.name], action)
        for i in range(len(spec.headers))
        for size in spec.sizes
    ]
    routes.append(_route(_match((), None), names[DEFAULT_CLASS], action))
    data = b"".join(field(3, route) for route in routes)
    return Resource(str(spec.id), spec.id, data, _digest(str(spec.id), data), tuple(names.values()))


def _route(match: bytes, cluster: str, action_tail: bytes) -> bytes:
    """An encoded Route: match = 1, route = 2; of the RouteAction, cluster = 1."""
    return match + field(2, _text(1, cluster) + action_tail)


@lru_cache(maxsize=1024)
def _action_tail(timeout_s: float, retry: Retry) -> bytes:
    """All of a RouteAction but its cluster."""
    policy = _retry_policy(retry) if retry.attempts > 0 else None
    return bytes(route_v3.RouteAction(timeout=timedelta(seconds=timeout_s), retry_policy=policy))


def _retry_policy(retry: Retry) -> route_v3.RetryPolicy:
    previous_hosts = route_v3.RetryPolicyRetryHostPredicate(
        name="envoy.retry_host_predicates.previous_hosts",
        typed_config=Any(
            type_url="type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
        ),
    )
    limit_s = retry.per_try_timeout_s
    return route_v3.RetryPolicy(
        retry_on=retry_on(retry),
        num_retries=retry.attempts,
        per_try_timeout=None if limit_s is None else timedelta(seconds=limit_s),
        retry_host_predicate=[previous_hosts],
        host_selection_retry_max_attempts=5,
    )


@lru_cache(maxsize=4096)
def _match(headers: tuple[str, ...], size: SizeClass | None) -> bytes:
    """An encoded Route's match: the last of `headers` says `size` and those before it are absent; None: everything."""
    matchers = []
    if size is not None:
        matchers = [route_v3.HeaderMatcher(name=h, present_match=True, invert_match=True) for h in headers[:-1]]
        matchers.append(_size_matcher(headers[-1], size))
    return bytes(route_v3.Route(match=route_v3.RouteMatch(prefix="/", headers=matchers)))


def _size_matcher(header: str, size: SizeClass) -> route_v3.HeaderMatcher:
    """Envoy's range is [start, end); what it takes is said at `size_pattern`. Of a header that is repeated it takes any
    value: the smallest class that one of them names."""
    if header != LEGACY_HEADER:
        end = min(size.max_batch + 1, _INT64_MAX)
        return route_v3.HeaderMatcher(name=header, range_match=type_v3.Int64Range(start=size.min_batch, end=end))
    matcher = matcher_v3.StringMatcher(safe_regex=matcher_v3.RegexMatcher(regex=size_pattern(header, size)))
    return route_v3.HeaderMatcher(name=header, string_match=matcher)


@lru_cache(maxsize=1)
def _route_configuration_head() -> bytes:
    return bytes(route_v3.RouteConfiguration(name=ROUTE_CONFIGURATION, ignore_port_in_host_matching=True))
