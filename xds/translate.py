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

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from hashlib import blake2b

from envoy_data_plane.envoy.config.cluster import v3 as cluster_v3
from envoy_data_plane.envoy.config.core import v3 as core_v3
from envoy_data_plane.envoy.config.route import v3 as route_v3
from envoy_data_plane.envoy.extensions.upstreams.http import v3 as http_v3
from envoy_data_plane.envoy.type import v3 as type_v3
from envoy_data_plane.envoy.type.matcher import v3 as matcher_v3
from envoy_data_plane.google.protobuf import Any

from meshctl.model import (
    DEFAULT_CLASS,
    PROXY_GROUP,
    LbPolicy,
    LoadBalancer,
    Plan,
    Problem,
    Protocol,
    Retry,
    RouteId,
    RoutePlan,
    RouteSpec,
    SizeClass,
    cluster_name,
)
from xds.assignments import CHUNK, Assignment, Members, encode, members, packed_assignment, weighted
from xds.requests import LEGACY_HEADER, bare_hosts, retry_on, size_pattern
from xds.wire import TypeUrl, field, packed

ROUTE_CONFIGURATION = "meshctl"
"""The one RouteConfiguration, which every listener of ours asks for."""
UNLIMITED = 2**32 - 1
"""Envoy's default circuit breakers (1024) answer bursts with 503. Queueing is the servers' business."""
_INT64_MAX = 2**63 - 1
_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


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
    groups: tuple[str, ...] = (PROXY_GROUP,)
    """Groups of proxies that are served the route."""
    plan: RoutePlan | None = dataclasses.field(default=None, compare=False, repr=False)
    """What was translated; None where it is not known."""
    encoded: _Encoded | None = dataclasses.field(default=None, compare=False, repr=False)
    """What the next translation can build on; None for a route of few endpoints, for which it is not worth keeping."""


@dataclass(frozen=True, slots=True)
class _Encoded:
    members: Members
    assignments: Mapping[str, Assignment]
    """By cluster name."""


@dataclass(frozen=True, slots=True)
class Resources:
    """Everything a Plan needs, by route."""

    routes: Mapping[RouteId, RouteResources]


def translate(plan: Plan) -> Resources:
    """The resources of every route of `plan`."""
    return Resources({route: translate_route(plan.routes[route]) for route in sorted(plan.routes)})


def translate_route(plan: RoutePlan, before: RouteResources | None = None) -> RouteResources:
    """The resources of one route. What `before`, an earlier translation of it, has with the same content is kept as the
    same object; the result is the same without it."""
    spec = plan.route.spec
    names = {size: cluster_name(spec.id, size) for size in (*(s.name for s in spec.sizes), DEFAULT_CLASS)}
    assignments, encoded = _assignments(plan, names, before)
    old = before.plan if before is not None else None
    if before is not None and old is not None and _treats_alike(old, plan):
        return replace(before, assignments=assignments, plan=plan, encoded=encoded)
    tail = cluster_tail(plan.load_balancer, spec.protocol)
    clusters = {name: cluster(spec.id, name, tail) for name in names.values()}
    host = _virtual_host(spec, names)
    return RouteResources(
        route=spec.id,
        hosts=bare_hosts(spec.hosts),
        clusters=clusters if before is None else {n: kept(before.clusters.get(n), r) for n, r in clusters.items()},
        assignments=assignments,
        virtual_host=host if before is None else kept(before.virtual_host, host),
        groups=spec.proxy_groups,
        plan=plan,
        encoded=encoded,
    )


def _treats_alike(old: RoutePlan, new: RoutePlan) -> bool:
    """Nothing but weights and endpoints differs."""
    specs = old.route.spec, new.route.spec
    return (specs[0] is specs[1] or specs[0] == specs[1]) and old.load_balancer == new.load_balancer


def kept(old: Resource | None, new: Resource) -> Resource:
    """`old` itself where its content is that of `new`."""
    return old if old is not None and old.digest == new.digest else new


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
    head = text(1, virtual_host.name) + b"".join(text(2, domain) for domain in domains)
    data = field(2, head + virtual_host.packed)
    digest = digest_of(virtual_host.name, data)
    return replace(virtual_host, packed=data, digest=digest, part=virtual_host.digest)


def route_configuration(virtual_hosts: Iterable[Resource]) -> bytes:
    """The RouteConfiguration around its virtual hosts, as it stands in a response."""
    return packed(TypeUrl.ROUTE, _route_configuration_head(), *(v.packed for v in virtual_hosts))


def text(number: int, text: str) -> bytes:
    return field(number, text.encode())


def digest_of(name: str, data: bytes) -> int:
    return int.from_bytes(blake2b(name.encode() + b"\0" + data, digest_size=16).digest(), "big")


def resource_of(
    kind: TypeUrl,
    route: RouteId,
    name: str,
    data: bytes,
    *,
    needs: Collection[str] = (),
    weights: tuple[int, ...] = (),
) -> Resource:
    """The resource `name`, whose message is `data`."""
    return Resource(name, route, packed(kind, data), digest_of(name, data), needs, weights)


# ------------------------------------------------------------------------------------------------------------ clusters


def cluster(route: RouteId, name: str, tail: bytes) -> Resource:
    """The cluster `name`; `tail` is all of it but the name, encoded."""
    return resource_of(TypeUrl.CLUSTER, route, name, text(1, name) + tail)


@lru_cache(maxsize=256)
def cluster_tail(balancer: LoadBalancer, protocol: Protocol = Protocol.HTTP) -> bytes:
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
        typed_extension_protocol_options={
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _upstream(protocol)
        },
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


def _upstream(protocol: Protocol) -> Any:
    if protocol is Protocol.GRPC:
        # No idle time-out: a server that closes says GOAWAY first. No pings either: gRPC servers end a connection that
        # pings more often than every 5 minutes while nothing is asked on it. TCP's keepalive finds the dead.
        config = http_v3.HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=core_v3.Http2ProtocolOptions())
        return Any.pack(http_v3.HttpProtocolOptions(explicit_http_config=config))
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


def _assignments(
    plan: RoutePlan, names: Mapping[str, str], before: RouteResources | None
) -> tuple[dict[str, Resource], _Encoded | None]:
    """By cluster name, and what to build the next ones on."""
    last = before.encoded if before is not None else None
    shared = members(plan.route.endpoints, last.members if last is not None else None)
    many = len(shared.heads) > CHUNK
    made: dict[str, Resource] = {}
    encoded: dict[str, Assignment] = {}
    for size, name in names.items():
        old = before.assignments.get(name) if before is not None else None
        former = last.assignments.get(name) if last is not None else None
        if old is not None and (former is not None or not many) and _weighs_alike(before, plan, size):
            made[name] = old
            if former is not None:
                encoded[name] = former
            continue
        heads, weights = weighted(shared, plan.weights.get(size, {}))
        assignment = encode(heads, weights, former)
        digest = digest_of(name, b"".join(assignment.digests))
        if old is None or old.digest != digest:
            old = Resource(name, plan.route.spec.id, packed_assignment(name, assignment), digest, weights=weights)
        made[name] = old
        if many:
            encoded[name] = assignment
    return made, _Encoded(shared, encoded) if many else None


def _weighs_alike(before: RouteResources | None, new: RoutePlan, size: str) -> bool:
    """The very same endpoints, with the very same table of weights."""
    old = before.plan if before is not None else None
    if old is None or old.route.endpoints is not new.route.endpoints:
        return False
    table = new.weights.get(size)
    return table is not None and old.weights.get(size) is table


# -------------------------------------------------------------------------------------------------------------- routes


def _virtual_host(spec: RouteSpec, names: Mapping[str, str]) -> Resource:
    action = _action_tail(spec.timeout_s)
    routes = [
        _route(route_match(spec.headers[: i + 1], size), names[size.name], action)
        for i in range(len(spec.headers))
        for size in spec.sizes
    ]
    routes.append(_route(route_match((), None), names[DEFAULT_CLASS], action))
    data = b"".join(field(3, route) for route in routes) + _retries(spec.retry, spec.protocol)
    return Resource(str(spec.id), spec.id, data, digest_of(str(spec.id), data), tuple(names.values()))


def _route(match: bytes, cluster: str, action_tail: bytes) -> bytes:
    """An encoded Route: match = 1, route = 2; of the RouteAction, cluster = 1."""
    return match + field(2, text(1, cluster) + action_tail)


@lru_cache(maxsize=1024)
def _action_tail(timeout_s: float) -> bytes:
    """All of a RouteAction but its cluster."""
    return bytes(route_v3.RouteAction(timeout=timedelta(seconds=timeout_s)))


@lru_cache(maxsize=1024)
def _retries(retry: Retry, protocol: Protocol) -> bytes:
    """Of all routes of a virtual host at once: in each of 10,000 routes the policy was 1.8 MB of 3 and took Envoy about
    half of its time, at every change of any of them."""
    policy = _retry_policy(retry, protocol) if retry.attempts > 0 else None
    return bytes(route_v3.VirtualHost(retry_policy=policy))


def _retry_policy(retry: Retry, protocol: Protocol) -> route_v3.RetryPolicy:
    previous_hosts = route_v3.RetryPolicyRetryHostPredicate(
        name="envoy.retry_host_predicates.previous_hosts",
        typed_config=Any(
            type_url="type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
        ),
    )
    limit_s = retry.per_try_timeout_s
    return route_v3.RetryPolicy(
        retry_on=retry_on(retry, protocol),
        num_retries=retry.attempts,
        per_try_timeout=None if limit_s is None else timedelta(seconds=limit_s),
        retry_host_predicate=[previous_hosts],
        host_selection_retry_max_attempts=5,
    )


@lru_cache(maxsize=4096)
def route_match(headers: tuple[str, ...], size: SizeClass | None) -> bytes:
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
