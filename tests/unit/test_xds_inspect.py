"""What people are shown of resources: the bytes that were sent, as protobuf's JSON says them."""

from __future__ import annotations

import orjson
import pytest
from envoy_data_plane.envoy.config.core.v3 import AggregatedConfigSource, ConfigSource
from envoy_data_plane.envoy.config.listener.v3 import ApiListener, Listener
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpFilter,
    Rds,
)
from envoy_data_plane.google.protobuf import Any

from tests.harness.envoy import route_plan
from xds.inspect import SHORT, decode
from xds.translate import route_configuration, translate_route, with_domains
from xds.wire import ProtocolError, TypeUrl, field, packed

RESOURCES = translate_route(route_plan("ns/resnet", {"10.0.0.1:8000": 600, "10.0.0.2:8000": 400}))


def test_every_resource_of_a_route_is_decoded() -> None:
    """With its type, its name and what it carries inside, as JSON that can be printed."""
    (cluster, *_), (assignment, *_) = RESOURCES.clusters.values(), RESOURCES.assignments.values()
    decoded = decode(cluster.packed)
    assert (decoded["@type"], decoded["name"]) == (TypeUrl.CLUSTER, cluster.name)
    options = decoded["typedExtensionProtocolOptions"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"]
    assert "httpProtocolOptions" in options["explicitHttpConfig"]
    (locality,) = decode(assignment.packed)["endpoints"]
    assert [e["loadBalancingWeight"] for e in locality["lbEndpoints"]] == [600, 400]
    assert orjson.dumps(decoded)


def test_routes_are_decoded_with_the_retries_inside() -> None:
    """A retry's predicate is a message in a message."""
    decoded = decode(route_configuration([with_domains(RESOURCES.virtual_host, ("a.example",))]))
    (host,) = decoded["virtualHosts"]
    assert host["domains"] == ["a.example"]
    (predicate,) = host["retryPolicy"]["retryHostPredicate"]
    assert predicate["typedConfig"]["@type"].endswith("PreviousHostsPredicate")


def test_a_listener_is_decoded_with_its_filters() -> None:
    """What gRPC clients are sent: an API listener, whose connection manager names a router."""
    router = HttpFilter(name="router", typed_config=Any.pack(Router()))
    rds = Rds(route_config_name="ns/resnet", config_source=ConfigSource(ads=AggregatedConfigSource()))
    manager = HttpConnectionManager(rds=rds, http_filters=[router])
    listener = Listener(name="a.example", api_listener=ApiListener(api_listener=Any.pack(manager)))
    decoded = decode(packed(TypeUrl.LISTENER, bytes(listener)))
    inside = decoded["apiListener"]["apiListener"]
    assert (inside["rds"]["routeConfigName"], inside["httpFilters"][0]["name"]) == ("ns/resnet", "router")


def test_an_unknown_type_is_said_and_fails_nothing() -> None:
    """Under `error`, with the type."""
    decoded = decode(packed("type.googleapis.com/a.B", b""))
    assert decoded["@type"] == "type.googleapis.com/a.B"
    assert "a.B" in decoded["error"]


def test_what_is_no_resource_is_an_error() -> None:
    """Cut short."""
    with pytest.raises(ProtocolError, match="not a protobuf message"):
        decode(field(2, b"abc")[:-1])


def test_every_type_has_a_short_name_in_the_order_of_a_change() -> None:
    """The order of TypeUrl is that of make before break."""
    assert list(SHORT) == list(TypeUrl)
    assert list(SHORT.values()) == ["CDS", "EDS", "LDS", "RDS"]
