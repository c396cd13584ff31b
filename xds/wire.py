"""The xDS protocol's bytes: what a DiscoveryRequest says, and DiscoveryResponses joined from encoded resources.

Requests are read leanly: a real Envoy's first one carries 35 kB of extensions, which a full decode turns into 26 ms of
objects that nobody reads. Responses are concatenated: repeated fields concatenate in protobuf, so a resource is encoded
once and its bytes serve every response and every proxy.

Source: https://protobuf.dev/programming-guides/encoding/ and envoy/service/discovery/v3/discovery.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from meshctl.errors import MeshctlError


class TypeUrl(StrEnum):
    """The resource types we serve. Their order is the order in which a change is sent: make before break."""

    CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    ENDPOINT = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
    LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
    ROUTE = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"


class ProtocolError(MeshctlError):
    """A peer sent what is not a DiscoveryRequest. Its stream ends; nobody else's does."""


@dataclass(frozen=True, slots=True)
class Node:
    """Who asks."""

    id: str
    cluster: str = ""
    admin: str = ""
    """``host:port`` of its admin interface, from the node's metadata."""


ADMIN_METADATA = "meshctl.io/admin"
"""The key of the node metadata under which our bootstrap tells where the proxy's admin interface is."""


@dataclass(frozen=True, slots=True)
class Request:
    """The fields of a DiscoveryRequest that are used."""

    type_url: str
    version: str = ""
    nonce: str = ""
    names: tuple[str, ...] = ()
    node: Node | None = None
    error: str | None = None
    """The proxy's words when it refuses (NACK), else None."""


_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_LONGEST_VARINT = 10


def varint(value: int) -> bytes:
    """`value` >= 0 in base 128, least significant group first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field: a string, bytes or message."""
    return varint(number << 3 | _BYTES) + varint(len(payload)) + payload


def integer(number: int, value: int) -> bytes:
    """An integer field of at least 0, which is left out when it is 0."""
    return varint(number << 3 | _VARINT) + varint(value) if value else b""


def packed(type_url: str, data: bytes) -> bytes:
    """One resource as it stands in a DiscoveryResponse: field 2, an Any."""
    return field(2, field(1, type_url.encode()) + field(2, data))


def response(type_url: str, version: str, nonce: str, body: bytes) -> bytes:
    """A DiscoveryResponse around `body`, the concatenation of `packed` resources."""
    return b"".join(
        (field(1, version.encode()), body, field(4, type_url.encode()), field(5, nonce.encode())),
    )


def parse_request(data: bytes) -> Request:
    """Raises ProtocolError when `data` is not a DiscoveryRequest."""
    type_url = version = nonce = ""
    names: list[str] = []
    node, error = None, None
    for number, value in fields(data):
        match number:
            case 1:
                version = _text(value)
            case 2:
                node = _node(_message(value))
            case 3:
                names.append(_text(value))
            case 4:
                type_url = _text(value)
            case 5:
                nonce = _text(value)
            case 6:
                error = _status(_message(value))
    return Request(type_url, version, nonce, tuple(names), node, error)


def fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of an encoded message. Raises ProtocolError where it is cut short or garbled."""
    at, size = 0, len(data)
    while at < size:
        key, at = _read_varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ProtocolError(f"not a protobuf message: field 0 at byte {at}")
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        if kind == _BYTES:
            length, at = _read_varint(data, at)
        else:
            length = {_FIXED_64: 8, _FIXED_32: 4}.get(kind, size)
        if at + length > size:
            raise ProtocolError(f"not a protobuf message: field {number} of wire type {kind} at byte {at}")
        yield number, data[at : at + length]
        at += length


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift, byte in enumerate(data[at : at + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise ProtocolError(f"not a protobuf message: a number without end at byte {at}")


def _message(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise ProtocolError("not a DiscoveryRequest: a number where a message or string belongs")
    return value


def _text(value: bytes | int) -> str:
    try:
        return _message(value).decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"not a DiscoveryRequest: a string that is not UTF-8 ({error})") from error


def _node(data: bytes) -> Node:
    """id = 1, cluster = 2, metadata = 3 (a Struct); extensions and the rest are skipped."""
    texts, admin = {1: "", 2: ""}, ""
    for number, value in fields(data):
        if number in texts:
            texts[number] = _text(value)
        elif number == 3:
            admin = _struct_string(_message(value), ADMIN_METADATA) or admin
    return Node(texts[1], texts[2], admin)


def _struct_string(data: bytes, key: str) -> str:
    """The string under `key` of an encoded google.protobuf.Struct, "" when there is none."""
    for number, entry in fields(data):
        if number != 1:
            continue
        parts = dict(fields(_message(entry)))
        if _text(parts.get(1, b"")) == key:
            return _text(dict(fields(_message(parts.get(2, b"")))).get(3, b""))
    return ""


def _status(data: bytes) -> str:
    """The message (field 2) of a google.rpc.Status."""
    return _text(dict(fields(data)).get(2, b"")) or "refused without a word"
