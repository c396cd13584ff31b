"""What an Envoy says on an ADS stream, state of the world and delta, as bytes. Pure, and lean: a thousand of these
share a core with what is measured.

A dialogue reads of a response its type, version, nonce and, where it does not know them yet, its resources' names. It
asks for clusters, then for their load assignments, then for routes, and accepts everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from meshctl.errors import MeshctlError
from meshctl.model import PROXY_GROUP
from xds.cache import Cache
from xds.subscription import Subscription
from xds.translate import ROUTE_CONFIGURATION
from xds.wire import TypeUrl, fields, parse_delta_request, parse_request
from xds.wire import field as encoded

_AGGREGATED = "/envoy.service.discovery.v3.AggregatedDiscoveryService"
SOTW_METHOD, DELTA_METHOD = f"{_AGGREGATED}/StreamAggregatedResources", f"{_AGGREGATED}/DeltaAggregatedResources"


def method(*, delta: bool) -> str:
    return DELTA_METHOD if delta else SOTW_METHOD


def node(number: int, like: bytes = b"") -> bytes:
    """An encoded Node: `like` (what a real Envoy said of itself) under a name of its own, since the last one counts."""
    return like + _text(1, f"bench-{number:04}") + _text(2, PROXY_GROUP)


@dataclass(frozen=True, slots=True)
class Skimmed:
    """What is read of a response. `resources` are as they stand in it, undecoded."""

    type_url: str
    version: str
    nonce: str
    resources: tuple[bytes, ...]


def skimmed(data: bytes) -> Skimmed:
    """Both kinds of response have these under the same numbers."""
    texts, resources = {1: b"", 4: b"", 5: b""}, []
    for number, value in fields(data):
        if number == 2:
            resources.append(bytes(value))
        elif number in texts:
            texts[number] = bytes(value)
    return Skimmed(texts[4].decode(), texts[1].decode(), texts[5].decode(), tuple(resources))


@dataclass(slots=True)
class Dialogue:
    """One stream after the other of one proxy."""

    node: bytes
    delta: bool = False
    names: tuple[str, ...] = ()
    """Of the clusters it has."""
    held: dict[str, Skimmed] = field(default_factory=dict)
    """By type: the last response."""
    versions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """By type and name, where a response has only what changed."""
    streams: int = 0

    def opening(self) -> list[bytes]:
        """The first requests of a stream: what it has from the one before is told."""
        self.streams += 1
        if not self.held:
            return [self._ask(TypeUrl.CLUSTER, (), self.node)]
        return [
            self._ask(kind, names, self.node if kind is TypeUrl.CLUSTER else b"")
            for kind, names in self._subscriptions().items()
            if kind in self.held
        ]

    def forget(self) -> None:
        """The next stream is that of a new process."""
        self.held, self.versions, self.names = {}, {}, ()

    def answer(self, data: bytes) -> list[bytes]:
        """The acknowledgement of a response, and what it makes the proxy ask for."""
        got = skimmed(data)
        known = self.held.get(got.type_url)
        self.held[got.type_url] = got
        kind = TypeUrl(got.type_url)
        if self.delta:
            self.versions.setdefault(kind, {}).update(map(_named_version, got.resources))
        if known is not None:
            return [self._ack(kind, got)]
        if kind is TypeUrl.CLUSTER:
            self.names = _names(got.resources, self.delta)
        asked = [self._ack(kind, got)]
        follows = {TypeUrl.CLUSTER: TypeUrl.ENDPOINT, TypeUrl.ENDPOINT: TypeUrl.ROUTE}.get(kind)
        if follows is not None:
            asked.append(self._ask(follows, self._subscriptions()[follows]))
        return asked

    def _subscriptions(self) -> dict[TypeUrl, tuple[str, ...]]:
        return {TypeUrl.CLUSTER: (), TypeUrl.ENDPOINT: self.names, TypeUrl.ROUTE: (ROUTE_CONFIGURATION,)}

    def _ask(self, kind: TypeUrl, names: tuple[str, ...], node: bytes = b"") -> bytes:
        had = self.held.get(kind)
        named = encoded(1 if self.delta else 2, node) if node else b""
        if not self.delta:
            version = _text(1, had.version) if had else b""
            return version + named + _sotw_tail(kind, names)
        initial = _initial_versions(tuple(self.versions.get(kind, {}).items()))
        return named + _text(2, kind) + _texts(3, names) + initial

    def _ack(self, kind: TypeUrl, got: Skimmed) -> bytes:
        if self.delta:
            return _text(2, kind) + _text(6, got.nonce)
        names = self._subscriptions()[kind]
        return _text(1, got.version) + _sotw_tail(kind, names) + _text(5, got.nonce)


class Proxy:
    """A dialogue with a subscription, and nothing in between: what a stream of the server costs without gRPC."""

    def __init__(self, *, delta: bool) -> None:
        self._subscription = Subscription(delta=delta)
        self._dialogue = Dialogue(node(0), delta)
        self._tell(self._dialogue.opening())

    def settle(self, cache: Cache) -> list[bytes]:
        """Takes what is due and acknowledges it, until nothing is."""
        found = []
        while (data := self.due(cache)) is not None:
            found.append(data)
            self.accept(data)
        return found

    def due(self, cache: Cache) -> bytes | None:
        """The next response."""
        if cache.snapshot is None:
            raise MeshctlError("nothing was published")
        return self._subscription.respond(cache.snapshot)

    def accept(self, data: bytes) -> None:
        """Acknowledges it."""
        self._tell(self._dialogue.answer(data))

    def _tell(self, requests: list[bytes]) -> None:
        subscription = self._subscription
        for data in requests:
            delta = subscription.delta
            subscription.receive(parse_delta_request(data) if delta else parse_request(data, subscription.many_names))


def _text(number: int, text: str) -> bytes:
    return encoded(number, text.encode())


def _texts(number: int, texts: Iterable[str]) -> bytes:
    return b"".join(_text(number, text) for text in texts)


@lru_cache(maxsize=64)
def _sotw_tail(kind: TypeUrl, names: tuple[str, ...]) -> bytes:
    return _texts(3, names) + _text(4, kind)


@lru_cache(maxsize=64)
def _names(resources: tuple[bytes, ...], delta: bool) -> tuple[str, ...]:
    """Of clusters: field 3 of a delta Resource, else field 1 of the Cluster in the Any."""
    if delta:
        return tuple(value_of(resource, 3).decode() for resource in resources)
    return tuple(value_of(value_of(resource, 2), 1).decode() for resource in resources)


@lru_cache(maxsize=64)
def _initial_versions(versions: tuple[tuple[str, bytes], ...]) -> bytes:
    """A map is repeated entries of key = 1, value = 2."""
    return b"".join(encoded(5, _text(1, name) + encoded(2, version)) for name, version in versions)


def _named_version(resource: bytes) -> tuple[str, bytes]:
    """Of a delta Resource: fields 3 and 1."""
    found = dict(fields(resource))
    return bytes(found[3]).decode(), bytes(found[1])


def value_of(message: bytes, wanted: int) -> bytes:
    """Of a field of an encoded message, b"" when it is not there."""
    return next((bytes(value) for number, value in fields(message) if number == wanted), b"")
