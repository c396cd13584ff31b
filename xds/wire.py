"""The xDS protocol's bytes: what a request says (state of the world or delta), and responses joined from encoded
resources.

Requests are read leanly: a real Envoy's first one carries 35 kB of extensions, which a full decode turns into 26 ms of
objects that nobody reads. Responses are concatenated: repeated fields concatenate in protobuf, so a resource is encoded
once and its bytes serve every response and every proxy.

Source: https://protobuf.dev/programming-guides/encoding/ and envoy/service/discovery/v3/discovery.proto.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from enum import StrEnum
from functools import lru_cache
from weakref import WeakValueDictionary

from meshctl.errors import MeshctlError
from meshctl.model import PROXY_GROUP


class TypeUrl(StrEnum):
    """The resource types we serve. Their order is the order in which a change is sent: make before break."""

    CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
    ENDPOINT = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
    LISTENER = "type.googleapis.com/envoy.config.listener.v3.Listener"
    ROUTE = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"


class ProtocolError(MeshctlError):
    """A peer sent what is not a request, or what no client may send. Its stream ends; nobody else's does."""


class Flavour(StrEnum):
    """What kind of client asks: they are told the same decision in different resources."""

    ENVOY = "Envoy"
    GRPC = "gRPC"


ADMIN_METADATA = "meshctl.io/admin"
"""The key of the node metadata under which our bootstrap tells where the proxy's admin interface is."""
GROUP_METADATA = "meshctl.io/group"
"""The key of the node metadata that says whose routes the proxy wants, where its node cluster does not."""


@dataclass(frozen=True, slots=True)
class Node:
    """Who asks."""

    id: str
    cluster: str = ""
    admin: str = ""
    """``host:port`` of its admin interface, from the node's metadata."""
    metadata_group: str = ""
    agent: str = ""
    """Its user_agent_name: ``envoy``, ``gRPC Python`` ..."""

    @property
    def group(self) -> str:
        """Whose routes it is served."""
        return self.metadata_group or self.cluster or PROXY_GROUP

    @property
    def flavour(self) -> Flavour:
        return Flavour.GRPC if self.agent.startswith("gRPC") else Flavour.ENVOY


class Names:
    """The names of a state-of-the-world request, with the bytes they came in: a proxy repeats them in each of its
    requests, thousands of them, and a thousand proxies the same ones. Equal bytes are one object (`names_of`)."""

    __slots__ = ("__weakref__", "raw", "values")

    def __init__(self, raw: bytes, values: frozenset[str]) -> None:
        self.raw = raw
        """As they stand in the request: fields 3, one after the other."""
        self.values = values


NO_NAMES = Names(b"", frozenset())
MOST_NAMES = 65_536
"""In one request. 10,000 routes have 40,000 clusters; who asks for more than this asks for what is not there."""
MOST_FIELDS = 2 * MOST_NAMES
"""Of one message. Reading 8 MB of two-byte fields would hold up everybody's stream for seconds."""
_FEW_FIELDS = 16
"""Of a message that has two."""
LONGEST_TEXT_BYTES = 4096
"""Of a name, version, nonce or what a node says of itself, which are kept while the stream is open."""
LONGEST_ERROR = 16_384
"""Characters that are kept of a client's words."""


@dataclass(frozen=True, slots=True)
class Request:
    """The fields of a DiscoveryRequest that are used."""

    type_url: str
    version: str = ""
    nonce: str = ""
    names: Names = NO_NAMES
    node: Node | None = None
    error: str | None = None
    """The proxy's words when it refuses (NACK), else None."""


@dataclass(frozen=True, slots=True)
class DeltaRequest:
    """The fields of a DeltaDiscoveryRequest that are used."""

    type_url: str
    nonce: str = ""
    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    versions: Mapping[str, str] = dataclass_field(default_factory=dict)
    """What the proxy has of an earlier stream (initial_resource_versions): name -> version."""
    node: Node | None = None
    error: str | None = None


_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_LONGEST_VARINT = 10
_NAME_KEY = 3 << 3 | _BYTES
"""Begins each of a request's resource_names."""


_ONE_BYTE = tuple(bytes((value,)) for value in range(0x80))


def varint(value: int) -> bytes:
    """`value` >= 0 in base 128, least significant group first."""
    if value < 0x80:
        return _ONE_BYTE[value]
    if value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field: a string, bytes or message."""
    return b"".join((varint(number << 3 | _BYTES), varint(len(payload)), payload))


def integer(number: int, value: int) -> bytes:
    """An integer field of at least 0, which is left out when it is 0."""
    return varint(number << 3 | _VARINT) + varint(value) if value else b""


def packed(type_url: str, *data: bytes) -> bytes:
    """One resource as it stands in a DiscoveryResponse: field 2, an Any. `data` is all of it, in one piece or several:
    they are copied once, and the routes of a thousand hosts are megabytes."""
    size = sum(map(len, data))
    head = b"".join((field(1, type_url.encode()), varint(2 << 3 | _BYTES), varint(size)))
    return b"".join((varint(2 << 3 | _BYTES), varint(len(head) + size), head, *data))


def response(type_url: str, version: str, nonce: str, body: bytes) -> bytes:
    """A DiscoveryResponse, or a DeltaDiscoveryResponse (the fields have the same numbers), around `body`: the
    concatenation of `packed` resources, or of `delta_resource`s and `delta_removed`."""
    return b"".join(
        (field(1, version.encode()), body, field(4, type_url.encode()), field(5, nonce.encode())),
    )


def delta_resource(name: str, version: str, packed_resource: bytes) -> bytes:
    """One resource as it stands in a DeltaDiscoveryResponse: field 2, a Resource of name = 3, version = 1 and the Any,
    which is field 2 here as it is in a DiscoveryResponse."""
    return field(2, field(3, name.encode()) + field(1, version.encode()) + packed_resource)


def delta_removed(names: Iterable[str]) -> bytes:
    """Names that are no more, as they stand in a DeltaDiscoveryResponse."""
    return b"".join(field(6, name.encode()) for name in names)


def parse_request(data: bytes, known: Names = NO_NAMES) -> Request:
    """Raises ProtocolError when `data` is not a DiscoveryRequest. Where its names are the same bytes as `known`, these
    are taken instead of reading them again."""
    type_url = version = nonce = ""
    runs: list[bytes] = []
    node, error = None, None
    at, size, count = 0, len(data), 0
    while at < size:
        count += 1
        _limited_fields(count)
        if data[at] == _NAME_KEY:
            run, at = _run_of_names(data, at, known)
            runs.append(run)
            continue
        number, value, at = _field(data, at)
        match number:
            case 1:
                version = _text(value)
            case 2:
                node = value
            case 4:
                type_url = _text(value)
            case 5:
                nonce = _text(value)
            case 6:
                error = value
    raw = b"".join(runs)
    names = known if raw == known.raw else _intern(raw)
    return Request(type_url, version, nonce, names, _node(node), _status(error))


def parse_delta_request(data: bytes) -> DeltaRequest:
    """Raises ProtocolError when `data` is not a DeltaDiscoveryRequest."""
    type_url = nonce = ""
    subscribe: list[str] = []
    unsubscribe: list[str] = []
    versions: dict[str, str] = {}
    node, error = None, None
    for number, value in fields(data):
        match number:
            case 1:
                node = value
            case 2:
                type_url = _text(value)
            case 3:
                subscribe.append(_text(value))
            case 4:
                unsubscribe.append(_text(value))
            case 5:
                name, version = _entry(_message(value))
                versions[name] = version
            case 6:
                nonce = _text(value)
            case 7:
                error = value
    for names in (subscribe, unsubscribe, versions):
        _limited(len(names))
    return DeltaRequest(type_url, nonce, tuple(subscribe), tuple(unsubscribe), versions, _node(node), _status(error))


@lru_cache(maxsize=16_384)
def _entry(data: bytes) -> tuple[str, str]:
    """An entry of a map of strings. After a restart a thousand proxies send the same thousands of them."""
    found = dict(fields(data, _FEW_FIELDS))
    return _text(found.get(1, b"")), _text(found.get(2, b""))


_interned: WeakValueDictionary[bytes, Names] = WeakValueDictionary()
_sets: WeakValueDictionary[int, frozenset[str]] = WeakValueDictionary()


def interned(names: frozenset[str]) -> frozenset[str]:
    """One object for equal sets of names: a thousand streams ask for the same thousands of names."""
    found = _sets.get(hash(names))
    if found is None:
        _sets[hash(names)] = names
    return found if found is not None and found == names else names


def names_of(values: Iterable[str]) -> Names:
    """The names of a request, as `parse_request` would have them."""
    return _intern(b"".join(field(3, value.encode()) for value in values))


def _run_of_names(data: bytes, at: int, known: Names) -> tuple[bytes, int]:
    """The names that follow each other from `at` on, as they stand there; and where they end."""
    end = at + len(known.raw)
    if known.raw and data.startswith(known.raw, at) and (end == len(data) or data[end] != _NAME_KEY):
        return known.raw, end
    end, count = at, 0
    while end < len(data) and data[end] == _NAME_KEY:
        count += 1
        _limited(count)
        _, _, end = _field(data, end)
    return data[at:end], end


def _intern(raw: bytes) -> Names:
    if not raw:
        return NO_NAMES
    found = _interned.get(raw)
    if found is None:
        values = [_text(value) for _, value in fields(raw)]
        _limited(len(values))
        found = _interned[raw] = Names(raw, interned(frozenset(values)))
    return found


def _limited(count: int) -> None:
    if count > MOST_NAMES:
        raise ProtocolError(f"a request for more than {MOST_NAMES} resources by name; no stream is served more")


def _limited_fields(count: int, most: int = MOST_FIELDS) -> None:
    if count > most:
        raise ProtocolError(f"not a DiscoveryRequest: a message of more than {most} fields")


def fields(data: bytes, most: int = MOST_FIELDS) -> Iterator[tuple[int, bytes | int]]:
    """Number and value of each field of an encoded message. Raises ProtocolError where it is cut short, garbled, or has
    more than `most`."""
    at, size, count = 0, len(data), 0
    while at < size:
        count += 1
        _limited_fields(count, most)
        number, value, at = _field(data, at)
        yield number, value


def _field(data: bytes, at: int) -> tuple[int, bytes | int, int]:
    """Number and value of the field at `at`, and where the next one is."""
    size = len(data)
    key = data[at]
    if key < 0x80:  # all fields that are used
        at += 1
    else:
        key, at = _read_varint(data, at)
    number, kind = key >> 3, key & 7
    if number == 0:
        raise ProtocolError(f"not a protobuf message: field 0 at byte {at}")
    if kind == _VARINT:
        value, at = _read_varint(data, at)
        return number, value, at
    if kind != _BYTES:
        length = {_FIXED_64: 8, _FIXED_32: 4}.get(kind, size)
    elif at < size and data[at] < 0x80:
        length, at = data[at], at + 1
    else:
        length, at = _read_varint(data, at)
    end = at + length
    if end > size:
        raise ProtocolError(f"not a protobuf message: field {number} of wire type {kind} at byte {at}")
    return number, data[at:end], end


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
    data = _message(value)
    if len(data) > LONGEST_TEXT_BYTES:
        raise ProtocolError(
            f"not a DiscoveryRequest: a string of {len(data)} bytes where {LONGEST_TEXT_BYTES} are the most"
        )
    return _decoded(data)


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"not a DiscoveryRequest: a string that is not UTF-8 ({error})") from error


def _node(value: bytes | int | None) -> Node | None:
    """id = 1, cluster = 2, metadata = 3 (a Struct), user_agent_name = 6; extensions and the rest are skipped."""
    if value is None:
        return None
    texts = {1: "", 2: "", 6: ""}
    told = {ADMIN_METADATA: "", GROUP_METADATA: ""}
    metadata: bytes | int = b""
    for number, part in fields(_message(value)):
        if number in texts:
            texts[number] = _text(part)
        elif number == 3:
            metadata = part
    told.update(_struct_strings(_message(metadata), told))
    return Node(texts[1], texts[2], told[ADMIN_METADATA], told[GROUP_METADATA], texts[6])


def _struct_strings(data: bytes, keys: Collection[str]) -> dict[str, str]:
    """The strings under `keys` of an encoded google.protobuf.Struct; nothing for those that are none."""
    found = {}
    for number, entry in fields(data):
        if number != 1:
            continue
        parts = dict(fields(_message(entry), _FEW_FIELDS))
        key = _text(parts.get(1, b""))
        if key in keys and (text := _text(dict(fields(_message(parts.get(2, b"")), _FEW_FIELDS)).get(3, b""))):
            found[key] = text
    return found


def _status(value: bytes | int | None) -> str | None:
    """The message (field 2) of a google.rpc.Status; None where there is no status."""
    if value is None:
        return None
    words = _decoded(_message(dict(fields(_message(value))).get(2, b"")))
    return words[:LONGEST_ERROR] or "refused without a word"
