"""The protocol's bytes, compared with the full messages' encoder."""

from __future__ import annotations

import pytest
from envoy_data_plane.envoy.config.core.v3 import Extension
from envoy_data_plane.envoy.config.core.v3 import Node as FullNode
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest, DiscoveryResponse
from envoy_data_plane.google.protobuf import Any, Struct
from envoy_data_plane.google.rpc import Status

from xds.wire import ADMIN_METADATA, Node, ProtocolError, Request, TypeUrl, names_of, packed, parse_request, response


def test_a_request_is_read_leanly() -> None:
    """The used fields come out of a full request; extensions and other metadata are skipped."""
    node = FullNode(
        id="gw",
        cluster="meshctl",
        metadata=Struct.from_dict({"other": 1, ADMIN_METADATA: "127.0.0.1:9901", "more": {"a": ["b"]}}),
        extensions=[Extension(name=f"extension {i}", category="x" * 100) for i in range(300)],
    )
    message = DiscoveryRequest(
        version_info="v1",
        node=node,
        resource_names=["a", "ü"],
        type_url=TypeUrl.ROUTE.value,
        response_nonce="7",
        error_detail=Status(code=13, message="no"),
    )
    expected = Request(TypeUrl.ROUTE, "v1", "7", names_of(["a", "ü"]), Node("gw", "meshctl", "127.0.0.1:9901"), "no")
    assert parse_request(bytes(message)) == expected


def test_an_empty_error_is_a_nack_all_the_same() -> None:
    """Its presence refuses, not its text."""
    message = DiscoveryRequest(error_detail=Status())
    assert parse_request(bytes(message)).error


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"\xff" * 30,
        b"\x0a\x05ab",
        b"\x0a\x02\xff\xfe",
        b"\x08\x01",
        b"\x12\x03\x0a\x09x",
        b"\x0b",
        b"\x00\x00",
    ],
    ids=["open number", "long number", "cut short", "not UTF-8", "number for string", "node cut", "group", "field 0"],
)
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    """No other exception, so that only its own stream ends."""
    with pytest.raises(ProtocolError):
        parse_request(data)


def test_a_response_is_joined_from_packed_resources() -> None:
    """Joined bytes decode as the message they stand for."""
    body = packed(TypeUrl.CLUSTER, b"one") + packed(TypeUrl.CLUSTER, b"x" * 300)
    expected = DiscoveryResponse(
        version_info="v",
        nonce="n",
        type_url=TypeUrl.CLUSTER.value,
        resources=[
            Any(type_url=TypeUrl.CLUSTER.value, value=b"one"),
            Any(type_url=TypeUrl.CLUSTER.value, value=b"x" * 300),
        ],
    )
    assert DiscoveryResponse.parse(response(TypeUrl.CLUSTER, "v", "n", body)) == expected
