"""Requests of clients that no one here wrote: any bytes are a request or a ProtocolError, and are soon read."""

from __future__ import annotations

from contextlib import suppress

import pytest
from envoy_data_plane.envoy.config.core.v3 import Extension
from envoy_data_plane.envoy.config.core.v3 import Node as FullNode
from envoy_data_plane.envoy.service.discovery.v3 import DeltaDiscoveryRequest, DiscoveryRequest
from envoy_data_plane.google.protobuf import Struct
from envoy_data_plane.google.rpc import Status
from hypothesis import example, given
from hypothesis import strategies as st

from xds.wire import (
    ADMIN_METADATA,
    GROUP_METADATA,
    LONGEST_ERROR,
    MOST_FIELDS,
    MOST_NAMES,
    DeltaRequest,
    Node,
    ProtocolError,
    Request,
    field,
    names_of,
    parse_delta_request,
    parse_request,
    varint,
)

TEXTS = st.text(max_size=8)
NAMES = st.lists(TEXTS, max_size=6)
STATUSES = st.none() | st.builds(Status, code=st.integers(0, 16), message=TEXTS)


@st.composite
def nodes(draw: st.DrawFn) -> tuple[FullNode, Node]:
    """As a client sends it, and what is read of it."""
    node_id, cluster, admin, group, agent = (draw(TEXTS) for _ in range(5))
    metadata = {ADMIN_METADATA: admin, GROUP_METADATA: group, "more": {GROUP_METADATA: [1.0, "x"]}}
    full = FullNode(
        id=node_id,
        cluster=cluster,
        user_agent_name=agent,
        metadata=Struct.from_dict(metadata),
        extensions=[Extension(name="e", category="c")],
    )
    return full, Node(node_id, cluster, admin, group, agent)


NODES = st.none() | nodes()


@st.composite
def world_requests(draw: st.DrawFn) -> tuple[bytes, Request]:
    node, names, error = draw(NODES), draw(NAMES), draw(STATUSES)
    version, type_url, nonce = draw(TEXTS), draw(TEXTS), draw(TEXTS)
    full = DiscoveryRequest(
        version_info=version,
        node=None if node is None else node[0],
        resource_names=names,
        type_url=type_url,
        response_nonce=nonce,
        error_detail=error,
    )
    read = Request(type_url, version, nonce, names_of(names), None if node is None else node[1], _words(error))
    return bytes(full), read


@st.composite
def delta_requests(draw: st.DrawFn) -> tuple[bytes, DeltaRequest]:
    node, subscribe, unsubscribe, error = draw(NODES), draw(NAMES), draw(NAMES), draw(STATUSES)
    type_url, nonce, versions = draw(TEXTS), draw(TEXTS), draw(st.dictionaries(TEXTS, TEXTS, max_size=4))
    full = DeltaDiscoveryRequest(
        node=None if node is None else node[0],
        type_url=type_url,
        resource_names_subscribe=subscribe,
        resource_names_unsubscribe=unsubscribe,
        initial_resource_versions=versions,
        response_nonce=nonce,
        error_detail=error,
    )
    said = None if node is None else node[1]
    read = DeltaRequest(type_url, nonce, tuple(subscribe), tuple(unsubscribe), versions, said, _words(error))
    return bytes(full), read


def _words(error: Status | None) -> str | None:
    return None if error is None else error.message or "refused without a word"


@given(world_requests())
def test_what_is_read_of_a_request_is_what_the_full_decoder_reads(made: tuple[bytes, Request]) -> None:
    """State of the world; with the names known from before, and without."""
    data, expected = made
    assert parse_request(data) == expected
    assert parse_request(data, expected.names) == expected
    assert parse_request(data, names_of(["a"])) == expected


@given(delta_requests())
def test_what_is_read_of_a_delta_request_is_what_the_full_decoder_reads(made: tuple[bytes, DeltaRequest]) -> None:
    """Incremental."""
    data, expected = made
    assert parse_delta_request(data) == expected


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A real request with parts of it changed, cut out, or written twice."""
    data = draw(st.one_of(world_requests(), delta_requests()))[0]
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 20)))
        data = data[:start] + draw(st.sampled_from([b"", data[start:end] * 2]) | st.binary(max_size=4)) + data[end:]
    return data


@given(st.binary(max_size=200) | mutated())
@example(b"\x9a\x00\x01a")
@example(field(3, b"\xff"))
@example(b"\x1a" + b"\xff" * 9 + b"\x01")
def test_any_bytes_are_a_request_or_a_protocol_error(data: bytes) -> None:
    """Of either kind. No other exception: that would be a stack trace of ours for a client's fault."""
    for parse in (parse_request, lambda data: parse_request(data, names_of(["a", "b"])), parse_delta_request):
        with suppress(ProtocolError):
            assert isinstance(parse(data), Request | DeltaRequest)


def test_names_between_other_fields_are_read_in_one_go() -> None:
    """Any order of fields is allowed; each run of names once made all those before it be read again: 200 kB took two
    minutes. These took an hour."""
    data = b"".join(field(3, b"%d" % i) + field(1, b"v") for i in range(MOST_NAMES))
    assert len(parse_request(data).names.values) == MOST_NAMES


@pytest.mark.parametrize("kind", ["names", "one name again", "unsubscribed", "versions"])
def test_too_many_names_are_refused(kind: str) -> None:
    """However they are said, before memory is spent on them."""
    number = {"unsubscribed": 4, "versions": 5}.get(kind, 3)
    parts = (b"a" if kind == "one name again" else field(1, b"%d" % i) for i in range(MOST_NAMES + 1))
    data = b"".join(field(number, part) for part in parts)
    with pytest.raises(ProtocolError, match="more than 65536 resources by name"):
        parse_delta_request(data)
    if number == 3:
        with pytest.raises(ProtocolError, match="more than 65536 resources by name"):
            parse_request(data)


@pytest.mark.parametrize("inside", [b"", b"\x12", b"\x32", b"\x12\x1a"], ids=["request", "node", "error", "metadata"])
def test_messages_of_countless_fields_are_refused(inside: bytes) -> None:
    """Two bytes make a field; 8 MB of them would take the others' time."""
    data = b"\x78\x01" * (MOST_FIELDS + 1)
    for byte in reversed(inside):
        data = bytes([byte]) + varint(len(data)) + data
    with pytest.raises(ProtocolError, match="more than 131072 fields"):
        parse_request(data)


@pytest.mark.parametrize("number", [3, 4, 5], ids=["name", "type", "nonce"])
def test_a_name_of_megabytes_is_refused(number: int) -> None:
    """What a stream keeps of a client is bounded."""
    with pytest.raises(ProtocolError, match="a string of 8388508 bytes where 4096 are the most"):
        parse_request(field(number, b"n" * (8 * 2**20 - 100)))


def test_of_an_error_of_megabytes_the_beginning_is_kept() -> None:
    """It refuses all the same."""
    message = DiscoveryRequest(error_detail=Status(message="ü" * 2**20))
    assert parse_request(bytes(message)).error == "ü" * LONGEST_ERROR
