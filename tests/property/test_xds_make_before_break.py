"""Make before break, for every order of events: a model of an Envoy that would answer 503 fails the test.

The model keeps what a real Envoy does (seen in its dialogue): a new or changed cluster warms until it is sent
endpoints; while one does, nothing is said of clusters, neither an acknowledgement nor, on a new stream, what it has;
routes are in force and removed clusters gone at once. It speaks state of the world (`WorldEnvoy`) or delta
(`DeltaEnvoy`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.envoy.service.discovery.v3 import DeltaDiscoveryResponse, DiscoveryResponse
from hypothesis import given, settings
from hypothesis import strategies as st

from meshctl.model import LoadBalancer, SizeClass
from tests.harness.envoy import plan, route_plan
from xds.cache import Cache
from xds.snapshot import Snapshot
from xds.subscription import Subscription
from xds.translate import ROUTE_CONFIGURATION
from xds.wire import DeltaRequest, Node, Request, TypeUrl, fields, names_of

SIZES = (SizeClass("one", 1, 1, 1, 0.5), SizeClass("rest", 2, 64, 8, 0.5))
NODE = Node("gw", "meshctl")
Routes = dict[str, tuple[int, int, float]]
"""Route -> weight, number of size classes, bias: enough to change each type of resource alone."""


@dataclass
class ModelEnvoy(ABC):
    """The proxy's side of one or more streams, one after the other."""

    clusters: dict[str, bytes] = field(default_factory=dict)
    active: set[str] = field(default_factory=set)
    routed: set[str] = field(default_factory=set)
    nonces: dict[str, str] = field(default_factory=dict)
    started: bool = False
    """It was warm once, and has asked for routes since."""
    warming: set[str] = field(default_factory=set)
    unsaid: bool = True
    """Clusters are to be asked for or acknowledged, once all are warm."""

    def connect(self) -> list[Request | DeltaRequest]:
        """The first requests of a new stream, with the versions of the earlier one."""
        self.nonces, self.unsaid = {}, True
        asked = self._clusters()
        asked += [self.request(TypeUrl.ENDPOINT)] if self.clusters else []
        return asked + ([self.request(TypeUrl.ROUTE)] if self.started else [])

    @abstractmethod
    def request(self, kind: TypeUrl, *, answers: bool = False) -> Request | DeltaRequest:
        """What is wanted of `kind` now, and whether that accepts the newest response."""

    @abstractmethod
    def read(self, data: bytes) -> tuple[TypeUrl, Mapping[str, bytes], set[str]]:
        """A response: its type, what is new by name, and what of what it had is gone."""

    def wanted(self, kind: TypeUrl) -> frozenset[str]:
        """Names to subscribe to."""
        names = {TypeUrl.ENDPOINT: self.clusters.keys(), TypeUrl.ROUTE: {ROUTE_CONFIGURATION}}
        return frozenset(names.get(kind, ()))

    def _clusters(self) -> list[Request | DeltaRequest]:
        if self.warming or not self.unsaid:
            return []
        self.unsaid = False
        return [self.request(TypeUrl.CLUSTER, answers=True)]

    def _warm(self) -> list[Request | DeltaRequest]:
        """What it says once all clusters are warm; the first time it goes on to the routes."""
        asked = self._clusters()
        if self.started or self.warming or not self.clusters:
            return asked
        self.started = True
        return [*asked, self.request(TypeUrl.ROUTE)]

    def take(self, data: bytes) -> list[Request | DeltaRequest]:
        """Applies a response; what it answers. Fails where requests would."""
        kind, new, gone = self.read(data)
        if kind is TypeUrl.CLUSTER:
            return self._take_clusters(new, gone)
        if kind is TypeUrl.ENDPOINT:
            return self._take_endpoints(new.keys() | gone)
        for value in new.values():
            actions = [r.route for host in RouteConfiguration.parse(value).virtual_hosts for r in host.routes]
            self.routed = {a.cluster for a in actions if a is not None and a.cluster is not None}
        assert self.routed <= self.active, f"routes to clusters that are not there: {self.routed - self.active}"
        return [self.request(kind, answers=True)]

    def _take_clusters(self, new: Mapping[str, bytes], gone: set[str]) -> list[Request | DeltaRequest]:
        assert not gone & self.routed, f"clusters removed that routes name: {gone & self.routed}"
        changed = {name for name, value in new.items() if self.clusters.get(name) != value}
        self.clusters = {name: value for name, value in self.clusters.items() if name not in gone} | dict(new)
        # An Envoy keeps the old cluster in use while its successor warms.
        self.active -= gone
        self.warming = (self.warming - gone) | changed
        self.unsaid = True
        return [*([self.request(TypeUrl.ENDPOINT)] if changed or gone else []), *self._warm()]

    def _take_endpoints(self, names: set[str]) -> list[Request | DeltaRequest]:
        self.active |= names & self.clusters.keys()
        self.warming -= names
        return [self.request(TypeUrl.ENDPOINT, answers=True), *self._warm()]


@dataclass
class WorldEnvoy(ModelEnvoy):
    """Says all names each time, and the version of the newest response of the type."""

    versions: dict[str, str] = field(default_factory=dict)

    def request(self, kind: TypeUrl, *, answers: bool = False) -> Request:
        names = names_of(sorted(self.wanted(kind)))
        return Request(kind, self.versions.get(kind, ""), self.nonces.get(kind, ""), names, NODE)

    def read(self, data: bytes) -> tuple[TypeUrl, Mapping[str, bytes], set[str]]:
        response = DiscoveryResponse.parse(data)
        kind = TypeUrl(response.type_url)
        self.nonces[kind], self.versions[kind] = response.nonce, response.version_info
        new = {_name(resource.value): resource.value for resource in response.resources}
        return kind, new, self.clusters.keys() - new.keys() if kind is TypeUrl.CLUSTER else set()


@dataclass
class DeltaEnvoy(ModelEnvoy):
    """Says which names are new and which are not wanted any more, and on a new stream what it has of each."""

    versions: dict[str, dict[str, str]] = field(default_factory=lambda: {kind: {} for kind in TypeUrl})
    subscribed: dict[str, frozenset[str]] = field(default_factory=dict)

    def connect(self) -> list[Request | DeltaRequest]:
        self.subscribed = {}
        return super().connect()

    def request(self, kind: TypeUrl, *, answers: bool = False) -> DeltaRequest:
        before, wanted = self.subscribed.get(kind), self.wanted(kind)
        self.subscribed[kind] = wanted
        subscribe, unsubscribe = wanted - (before or set()), (before or frozenset()) - wanted
        has = self.versions[kind]
        if kind is not TypeUrl.CLUSTER:
            has = self.versions[kind] = {name: version for name, version in has.items() if name in wanted}
        nonce = self.nonces.get(kind, "") if answers else ""
        initial = dict(has) if before is None else {}
        return DeltaRequest(kind, nonce, tuple(sorted(subscribe)), tuple(sorted(unsubscribe)), initial, NODE)

    def read(self, data: bytes) -> tuple[TypeUrl, Mapping[str, bytes], set[str]]:
        response = DeltaDiscoveryResponse.parse(data)
        kind, has = TypeUrl(response.type_url), self.versions[response.type_url]
        self.nonces[kind] = response.nonce
        new = {resource.name: resource.resource.value for resource in response.resources if resource.resource}
        has.update({resource.name: resource.version for resource in response.resources})
        for name in response.removed_resources:
            has.pop(name, None)
        return kind, new, set(response.removed_resources)


def _name(value: bytes) -> str:
    """Field 1 of all four types."""
    name = next(value for number, value in fields(value) if number == 1)
    assert isinstance(name, bytes)
    return name.decode()


def applied(cache: Cache, routes: Routes) -> None:
    address = "10.0.0.1:80"
    cache.apply(
        plan(
            *(
                route_plan(
                    f"n/{name}",
                    {address: weight, "10.0.0.2:80": 1000 - weight},
                    hosts=(name,),
                    sizes=SIZES[:count],
                    balancer=LoadBalancer(active_request_bias=bias),
                )
                for name, (weight, count, bias) in routes.items()
            )
        )
    )


ROUTES = st.dictionaries(
    st.sampled_from("abc"),
    st.tuples(st.sampled_from([1, 500, 999]), st.sampled_from([1, 2]), st.sampled_from([0.0, 1.0])),
    max_size=3,
)
STEPS = st.lists(
    st.tuples(
        st.one_of(ROUTES, st.sampled_from(["reconnect", "restart"])),
        st.lists(st.sampled_from(["up", "down", "settle"]), max_size=8),
    ),
    min_size=2,
    max_size=8,
)
"""What happens, and which messages arrive before the next thing does."""


@pytest.mark.parametrize("envoy", [WorldEnvoy, DeltaEnvoy], ids=["state of the world", "delta"])
@settings(max_examples=100, deadline=None)
@given(first=ROUTES, steps=STEPS)
def test_no_order_of_events_breaks_a_route(
    envoy: type[ModelEnvoy], first: Routes, steps: list[tuple[Routes | str, list[str]]]
) -> None:
    """Plans, deliveries in either direction, and lost streams, in any order; and in the end all is in sync."""
    link = Link(envoy())
    link.apply(first)
    for event, deliveries in steps:
        if isinstance(event, dict):
            link.apply(event)
        else:
            link.reconnect(restart=event == "restart")
        for direction in deliveries:
            link.deliver(direction)
    link.deliver("settle")
    snapshot = link.snapshot
    assert not link.envoy.warming
    assert set(link.envoy.clusters) == set(snapshot.clusters)
    assert link.envoy.routed == {name for host in snapshot.virtual_hosts.values() for name in host.needs}
    assert not link.envoy.clusters or link.subscription.synced(snapshot)


class Link:
    """A server's side, a model Envoy, and the messages between them, in order."""

    def __init__(self, envoy: ModelEnvoy) -> None:
        self.cache, self.envoy, self.delta = Cache(), envoy, isinstance(envoy, DeltaEnvoy)
        self.subscription = Subscription(delta=self.delta)
        self.current: Routes = {}
        self.up, self.down = self.envoy.connect(), list[bytes]()

    @property
    def snapshot(self) -> Snapshot:
        assert self.cache.snapshot is not None
        return self.cache.snapshot

    def apply(self, routes: Routes) -> None:
        self.current = routes
        applied(self.cache, routes)

    def reconnect(self, *, restart: bool) -> None:
        """The stream is lost with all that is on it; with `restart` the server's memory too."""
        if restart:
            # A new server knows nothing of clusters that are gone, so only a proxy in sync is safe from it; with delta
            # it is told of them.
            if not self.delta and (self.up or self.down or not self.subscription.synced(self.snapshot)):
                return
            self.cache = Cache()
            self.apply(self.current)
        self.subscription, self.down = Subscription(delta=self.delta), []
        self.up = self.envoy.connect()

    def deliver(self, direction: str) -> bool:
        """One message in `direction`, or all there are; whether there was any."""
        if direction == "settle":
            while self.deliver("up") or self.deliver("down"):
                pass
            return False
        if direction == "up" and self.up:
            self.subscription.receive(self.up.pop(0))
            return True
        if direction == "down":
            if (due := self.subscription.respond(self.snapshot)) is not None:
                self.down.append(due)
            if self.down:
                self.up.extend(self.envoy.take(self.down.pop(0)))
                return True
        return False
