"""A plan in the words of gRPC's resolver, decoded again."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from envoy_data_plane.envoy.config.cluster.v3 import Cluster, ClusterDiscoveryType, ClusterLbPolicy
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
from envoy_data_plane.envoy.config.listener.v3 import Listener
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpConnectionManager
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse

from meshctl.address import Address
from meshctl.model import Retry, RoutePlan
from tests.harness.envoy import route_plan
from tests.harness.grpc_servers import grpc_plan
from xds.grpcbootstrap import grpc_bootstrap
from xds.proxyless import ClientResources, client_resources, listener
from xds.translate import Resource

A, B, C = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"
GPUS = {A: "V100", B: "V100", C: "A100 80/G"}


def made(weights: dict[str, int], **spec: Any) -> ClientResources:
    found = client_resources(grpc_plan("n.x/llm", weights, hosts=spec.pop("hosts", ("llm",)), gpus=GPUS, **spec))
    assert found is not None
    return found


def decoded(resource: Resource, kind: Any) -> Any:
    """The message inside a packed resource."""
    return kind.parse(DiscoveryResponse.parse(resource.packed).resources[0].value)


def localities(resources: ClientResources, name: str) -> dict[str, tuple[int, list[str]]]:
    """Weight and addresses of each locality of a load assignment."""
    found = decoded(resources.assignments[name], ClusterLoadAssignment)
    assert found.cluster_name == name
    return {
        one.locality.sub_zone: (
            one.load_balancing_weight,
            [e.endpoint.address.socket_address.address for e in one.lb_endpoints],
        )
        for one in found.endpoints
    }


def choice(resources: ClientResources, size: int = 0) -> dict[str, int]:
    """The weighted clusters of a route, by position."""
    (host,) = decoded(resources.routes, RouteConfiguration).virtual_hosts
    return {c.name: c.weight for c in host.routes[size].route.weighted_clusters.clusters}


def test_a_cluster_for_each_size_class_and_product() -> None:
    """All of them, whatever the weights are, with endpoints over ADS."""
    resources = made({A: 1000, B: 0, C: 0})
    names = [
        f"n_x/llm/{size}/{gpu}" for size in ("small", "medium", "large", "default") for gpu in ("A100 80/G", "V100")
    ]
    assert list(resources.clusters) == list(resources.assignments) == names
    cluster = decoded(resources.clusters[names[0]], Cluster)
    assert (cluster.name, cluster.type, cluster.lb_policy) == (
        names[0],
        ClusterDiscoveryType.EDS,
        ClusterLbPolicy.ROUND_ROBIN,
    )
    assert cluster.eds_cluster_config.eds_config.ads is not None
    assert made({A: 0, B: 500, C: 500}).clusters == resources.clusters


def test_products_have_the_sum_of_their_endpoints() -> None:
    """Zeros are left out of the choice, and of what must exist for it."""
    resources = made({A: 300, B: 200, C: 500})
    assert choice(resources) == {"n_x/llm/small/A100 80/G": 500, "n_x/llm/small/V100": 500}
    assert set(resources.routes.needs) == set(resources.clusters)
    one = made({A: 300, B: 700, C: 0})
    assert choice(one) == {"n_x/llm/small/V100": 1000}
    assert set(one.routes.needs) == {name for name in one.clusters if name.endswith("V100")}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({A: 500, B: 500, C: 0}, {A: (1000, ["10.0.0.1", "10.0.0.2"])}),
        ({A: 333, B: 334, C: 333}, {A: (667, ["10.0.0.1", "10.0.0.2"])}),
        ({A: 300, B: 200, C: 500}, {A: (300, ["10.0.0.1"]), B: (200, ["10.0.0.2"])}),
        ({A: 1, B: 2, C: 997}, {A: (1, ["10.0.0.1"]), B: (2, ["10.0.0.2"])}),
        ({A: 0, B: 200, C: 800}, {B: (200, ["10.0.0.2"])}),
        ({A: 0, B: 0, C: 1000}, {A: (2, ["10.0.0.1", "10.0.0.2"])}),
        ({A: 0, B: 0, C: 0}, {A: (2, ["10.0.0.1", "10.0.0.2"])}),
    ],
    ids=["equal", "but for rounding", "unequal", "small", "one has none", "the product has none", "nobody has any"],
)
def test_endpoints_of_weights_alike_share_a_locality(
    weights: dict[str, int], expected: dict[str, tuple[int, list[str]]]
) -> None:
    """It is named after the first of them; a product that gets nothing keeps its endpoints."""
    assert localities(made(weights), "n_x/llm/small/V100") == expected


def test_who_is_not_ready_gets_nothing() -> None:
    """Unless the product has nobody else, and gets nothing for it; with nobody ready at all there is nobody to ask."""
    assert localities(made({A: 500, B: 500, C: 0}, not_ready=(B,)), "n_x/llm/small/V100") == {A: (500, ["10.0.0.1"])}
    away = made({A: 300, B: 200, C: 500}, not_ready=(A, B))
    assert choice(away) == {"n_x/llm/small/A100 80/G": 500}
    assert localities(away, "n_x/llm/small/V100") == {A: (2, ["10.0.0.1", "10.0.0.2"])}
    nobody = made({A: 300, B: 200, C: 500}, not_ready=(A, B, C))
    assert choice(nobody) == {"n_x/llm/small/A100 80/G": 1, "n_x/llm/small/V100": 1}
    assert localities(nobody, "n_x/llm/small/V100") == {}


def test_a_route_without_endpoints_still_goes_somewhere() -> None:
    """To a cluster that has nobody, which is UNAVAILABLE, not an unknown service."""
    empty = made({})
    assert choice(empty, -1) == {"n_x/llm/default/-": 1}
    assert localities(empty, "n_x/llm/default/-") == {}


def test_routes_find_the_size_class() -> None:
    """As for Envoy, of any authority, the time-out as a limit of the stream; retries of what may be repeated only."""
    (host,) = decoded(made({A: 1000}, timeout_s=2.5).routes, RouteConfiguration).virtual_hosts
    assert host.domains == ["*"]
    assert [len(rule.match.headers) for rule in host.routes] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 0]
    for rule in host.routes:
        assert rule.route.max_stream_duration.max_stream_duration == timedelta(seconds=2.5)
        assert rule.route.retry_policy is None
    for retry, expected in ((Retry(3, 1.0, idempotent=True), 3), (Retry(0, None, idempotent=True), None)):
        (host,) = decoded(made({A: 1000}, retry=retry).routes, RouteConfiguration).virtual_hosts
        policies = [rule.route.retry_policy for rule in host.routes]
        assert {policy and (policy.num_retries, policy.retry_on) for policy in policies} == {
            expected and (expected, "unavailable")
        }


def test_a_listener_names_the_route_configuration() -> None:
    """Over ADS, with the filter that ends every chain."""
    routes = made({A: 1000}).routes
    found = listener("llm", routes)
    assert (found.name, tuple(found.needs), found.route) == ("llm", ("n.x/llm",), "n.x/llm")
    message = decoded(found, Listener)
    manager = HttpConnectionManager.parse(message.api_listener.api_listener.value)
    assert message.name == "llm"
    assert message.api_listener.api_listener.type_url.endswith("v3.HttpConnectionManager")
    assert manager.rds is not None
    assert (manager.rds.route_config_name, manager.rds.config_source is not None) == ("n.x/llm", True)
    assert [one.name for one in manager.http_filters] == ["envoy.filters.http.router"]


def test_hosts_that_a_client_can_name() -> None:
    """Without wildcards, and without ports, as for Envoys."""
    assert made({A: 1000}, hosts=("LLM.example:80", "*", "*.example", "[::1]")).hosts == ("llm.example", "[::1]")


def test_servers_of_http_are_not_for_grpc_clients() -> None:
    """Nobody there would understand them."""
    http: RoutePlan = route_plan("n/r", {A: 1000})
    assert client_resources(http) is None


def test_the_bootstrap_says_the_group_where_there_is_one() -> None:
    """And in plain text that it is so."""
    plain = grpc_bootstrap(Address.parse("xds.example:18000", "xds"), "n")
    assert plain["node"] == {"id": "n", "cluster": "meshctl"}
    (server,) = plain["xds_servers"]
    assert (server["server_uri"], server["channel_creds"]) == ("xds.example:18000", [{"type": "insecure"}])
    grouped = grpc_bootstrap(Address.parse("[::1]:18000", "xds"), "n", group="edge")
    assert grouped["node"]["metadata"] == {"meshctl.io/group": "edge"}
    assert grouped["xds_servers"][0]["server_uri"] == "[::1]:18000"
