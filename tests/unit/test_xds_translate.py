"""A plan in Envoy's words, decoded again."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

from envoy_data_plane.envoy.config.cluster.v3 import Cluster, ClusterDiscoveryType, ClusterLbPolicy
from envoy_data_plane.envoy.config.core.v3 import Address, SocketAddress
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment, LbEndpoint, LocalityLbEndpoints
from envoy_data_plane.envoy.config.endpoint.v3 import Endpoint as ProxyEndpoint
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptions
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse

from meshctl.model import Endpoint, EndpointId, LbPolicy, LoadBalancer, Protocol, Retry, RoutePlan
from tests.harness.envoy import plan, route_plan
from xds.snapshot import Group, Snapshot
from xds.translate import Resource, RouteResources, translate, translate_route
from xds.wire import Flavour, TypeUrl, packed

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"


def build(routes: list[RouteResources]) -> Snapshot:
    """What Envoys are served of `routes`."""
    return Group.empty(Flavour.ENVOY).updated(routes).snapshot


def decoded(resource: Resource, kind: Any) -> Any:
    """The message inside a packed resource."""
    return kind.parse(DiscoveryResponse.parse(resource.packed).resources[0].value)


def test_a_cluster_and_an_assignment_per_size_class() -> None:
    """Every size class and the default have both, under the name that the metrics use."""
    resources = translate(plan(route_plan("ns.x/resnet", {A: 600, B: 400, C: 0}))).routes
    (route,) = resources.values()
    names = [f"ns_x/resnet/{size}" for size in ("small", "medium", "large", "default")]
    assert list(route.clusters) == list(route.assignments) == names
    cluster = decoded(route.clusters[names[0]], Cluster)
    assert cluster.name == names[0]
    assert cluster.type is ClusterDiscoveryType.EDS
    assert cluster.track_cluster_stats.per_endpoint_stats
    assert {t.max_connections for t in cluster.circuit_breakers.thresholds} == {2**32 - 1}
    assert cluster.outlier_detection.max_ejection_percent == 50


def test_grpc_servers_are_spoken_to_in_http2() -> None:
    """And HTTP ones in HTTP/1.1, on connections that the proxy is the first to close."""
    for protocol in Protocol:
        wanted = route_plan("n/r", {A: 1000})
        spec = replace(wanted.route.spec, protocol=protocol)
        made = translate_route(replace(wanted, route=replace(wanted.route, spec=spec)))
        (options,) = decoded(made.clusters["n/r/small"], Cluster).typed_extension_protocol_options.values()
        found = HttpProtocolOptions.parse(options.value)
        config, common = found.explicit_http_config, found.common_http_protocol_options
        assert config is not None
        assert (config.http2_protocol_options is not None) == (protocol is Protocol.GRPC)
        assert (config.http_protocol_options is not None) == (protocol is Protocol.HTTP)
        assert (common is not None) == (protocol is Protocol.HTTP)


def test_what_did_not_change_is_the_same_object() -> None:
    """Of the translation before: all but the one load assignment whose weights are others, and its plan."""
    first = translate_route(route_plan("n/r", {A: 600, B: 400}, hosts=("x",)))
    tables = {**one_plan(first).weights, "small": {EndpointId(A): 500, EndpointId(B): 500}}
    plan = replace(one_plan(first), weights=tables)
    second = translate_route(plan, first)
    assert second.plan is plan
    assert second.clusters is first.clusters
    assert second.virtual_host is first.virtual_host
    changed = [name for name, r in second.assignments.items() if r is not first.assignments[name]]
    assert changed == ["n/r/small"]
    spec = replace(plan.route.spec, timeout_s=2.0, proxy_groups=("edge",), hosts=("y",))
    third = translate_route(replace(plan, route=replace(plan.route, spec=spec)), second)
    assert (third.groups, third.hosts) == (("edge",), ("y",))
    assert third.virtual_host != second.virtual_host
    assert all(third.clusters[name] is r for name, r in second.clusters.items())
    assert all(third.assignments[name] is r for name, r in second.assignments.items())


def one_plan(resources: RouteResources) -> RoutePlan:
    """What they were made of."""
    assert resources.plan is not None
    return resources.plan


def test_retries_as_the_route_says() -> None:
    """None where it wants none; what may have run only where that may be repeated."""
    assert configured(Retry(attempts=0)).retry_policy is None
    policy = configured(Retry(attempts=4, per_try_timeout_s=0.5, idempotent=True)).retry_policy
    assert (policy.num_retries, policy.per_try_timeout) == (4, timedelta(seconds=0.5))
    assert policy.retry_on == "connect-failure,refused-stream,reset-before-request,reset,gateway-error"
    grpc = configured(Retry(attempts=1, idempotent=True), Protocol.GRPC)
    assert grpc.retry_policy.retry_on.endswith(",gateway-error,unavailable")


def configured(retry: Retry, protocol: Protocol = Protocol.HTTP) -> Any:
    """Envoy's virtual host of a plan with `retry`; no route of it has a policy of its own, which would replace it."""
    wanted = route_plan("n/r", {A: 1000})
    spec = replace(wanted.route.spec, retry=retry, protocol=protocol)
    snapshot = build([translate_route(replace(wanted, route=replace(wanted.route, spec=spec)))])
    (host,) = RouteConfiguration.parse(DiscoveryResponse.parse(snapshot.routes.body()).resources[0].value).virtual_hosts
    assert all(route.route is not None and route.route.retry_policy is None for route in host.routes)
    return host


def test_weights_without_the_zeros() -> None:
    """Envoy's weights start at 1: weight 0 is left out, and so is an endpoint that is not ready."""
    route = translate_route(route_plan("n/r", {A: 600, B: 400, C: 0}, not_ready=(B,)))
    assignment = decoded(route.assignments["n/r/small"], ClusterLoadAssignment)
    found = {
        e.endpoint.address.socket_address.address: e.load_balancing_weight
        for locality in assignment.endpoints
        for e in locality.lb_endpoints
    }
    assert found == {"10.0.0.1": 600}
    assert route.assignments["n/r/small"].weights == (600,)


def test_endpoints_are_encoded_as_the_generated_classes_do() -> None:
    """By hand, field by field; short and long numbers, IPv4 and IPv6."""
    servers = [("10.0.0.1", 80), ("192.0.2.200", 8000), ("2001:db8::1", 65535), ("10.0.0.2", 127), ("10.0.0.3", 128)]
    route = route_plan("demo/r", {"10.0.0.1:80": 1000})
    endpoints = tuple(Endpoint(EndpointId(f"{address}:{port}"), address, port, "V100", "") for address, port in servers)
    tables = {size: {e.id: 200 for e in endpoints} for size in route.weights}
    made = translate_route(replace(route, route=replace(route.route, endpoints=endpoints), weights=tables))
    for name, assignment in made.assignments.items():
        members = [
            LbEndpoint(
                endpoint=ProxyEndpoint(address=Address(socket_address=SocketAddress(address=a, port_value=port))),
                load_balancing_weight=200,
            )
            for a, port in servers
        ]
        expected = ClusterLoadAssignment(cluster_name=name, endpoints=[LocalityLbEndpoints(lb_endpoints=members)])
        assert assignment.packed == packed(TypeUrl.ENDPOINT, bytes(expected))


def test_all_zero_weights_use_every_ready_endpoint() -> None:
    """A late answer is better than none."""
    route = translate_route(route_plan("n/r", {A: 0, B: 0, C: 0}, not_ready=(C,)))
    assert route.assignments["n/r/default"].weights == (1, 1)


def test_no_endpoint_is_an_empty_assignment() -> None:
    """The cluster and the virtual host stay."""
    route = translate_route(route_plan("n/r", {}))
    assert decoded(route.assignments["n/r/default"], ClusterLoadAssignment).endpoints == []
    assert list(build([route]).virtual_hosts) == ["n/r"]


def test_load_balancers() -> None:
    """The policy and its parameters as decided."""
    least = LoadBalancer(LbPolicy.LEAST_REQUEST, active_request_bias=0.5, choice_count=3)
    cluster = decoded(translate_route(route_plan("n/r", {A: 1}, balancer=least)).clusters["n/r/small"], Cluster)
    assert cluster.lb_policy is ClusterLbPolicy.LEAST_REQUEST
    assert cluster.least_request_lb_config.choice_count == 3
    assert cluster.least_request_lb_config.active_request_bias.default_value == 0.5
    robin = LoadBalancer(LbPolicy.ROUND_ROBIN)
    cluster = decoded(translate_route(route_plan("n/r", {A: 1}, balancer=robin)).clusters["n/r/small"], Cluster)
    assert cluster.lb_policy is ClusterLbPolicy.ROUND_ROBIN
    assert cluster.least_request_lb_config is None


def test_the_route_configuration() -> None:
    """A route per header and size class, and the default last; retries only for what no server has begun."""
    snapshot = build([translate_route(route_plan("n/r", {A: 1}, hosts=("Model.example:80", "*"), timeout_s=2.5))])
    configuration = RouteConfiguration.parse(DiscoveryResponse.parse(snapshot.routes.body()).resources[0].value)
    assert configuration.name == "meshctl"
    assert configuration.ignore_port_in_host_matching
    (host,) = configuration.virtual_hosts
    assert host.domains == ["model.example", "*"]
    assert [r.route.cluster.rpartition("/")[2] for r in host.routes if r.route and r.route.cluster] == [
        *("small", "medium", "large") * 3,
        "default",
    ]
    assert [len(r.match.headers) for r in host.routes if r.match] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 0]
    for route in host.routes:
        assert route.route is not None
        assert route.route.timeout is not None
        assert route.route.timeout.total_seconds() == 2.5
    assert host.retry_policy is not None
    assert host.retry_policy.retry_on == "connect-failure,refused-stream,reset-before-request"


def test_the_same_plan_gives_the_same_bytes_and_a_weight_changes_one_thing() -> None:
    """Nothing but the load assignments depends on the weights."""
    one = translate_route(route_plan("n/r", {A: 600, B: 400}))
    assert translate_route(route_plan("n/r", {A: 600, B: 400})) == one
    other = translate_route(route_plan("n/r", {A: 500, B: 500}))
    assert other.clusters == one.clusters
    assert other.virtual_host == one.virtual_host
    assert other.assignments != one.assignments


def test_a_host_claimed_twice_stays_with_the_first_route() -> None:
    """The second route goes without it, and with no host left it has no virtual host; both are reported."""
    routes = [
        translate_route(route_plan("n/b", {A: 1}, hosts=("x", "y"))),
        translate_route(route_plan("n/a", {A: 1}, hosts=("x", "x"))),
        translate_route(route_plan("n/c", {A: 1}, hosts=("y",))),
    ]
    snapshot = build(routes)
    assert list(snapshot.virtual_hosts) == ["n/a", "n/b"]
    assert [(p.route, p.message.split(";")[0]) for p in snapshot.problems] == [
        ("n/b", "host 'x' is already served by n/a"),
        ("n/c", "host 'y' is already served by n/b"),
    ]
    assert "n/c/small" in snapshot.clusters


def test_ports_of_hosts_are_dropped_and_nothing_else() -> None:
    """An IPv6 authority keeps its colons."""
    route = route_plan("n/r", {A: 1}, hosts=("a:80", "[::1]:80", "[::1]", "*.b:8080"))
    assert translate_route(route).hosts == ("a", "[::1]", "*.b")
    assert translate_route(replace(route)).hosts == translate_route(route).hosts
