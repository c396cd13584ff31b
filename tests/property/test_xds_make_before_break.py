"""Make before break, for every order of events: a model of an Envoy that would answer 503 fails the test.

The model keeps what a real Envoy does (seen in its dialogue): a new or changed cluster warms until it is sent
endpoints, clusters are acknowledged only when all are warm, routes are in force and removed clusters gone at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from envoy_data_plane.envoy.config.cluster.v3 import Cluster
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment
from envoy_data_plane.envoy.config.route.v3 import RouteConfiguration
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryResponse
from hypothesis import given, settings
from hypothesis import strategies as st

from meshctl.model import LoadBalancer, SizeClass
from tests.harness.envoy import plan, route_plan
from xds.cache import Cache
from xds.snapshot import Snapshot
from xds.subscription import Subscription
from xds.wire import Node, Request, TypeUrl, names_of

SIZES = (SizeClass("one", 1, 1, 1, 0.5), SizeClass("rest", 2, 64, 8, 0.5))
Routes = dict[str, tuple[int, int, float]]
"""Route -> weight, number of size classes, bias: enough to change each type of resource alone."""


@dataclass
class ModelEnvoy:
    """The proxy's side of one or more streams, one after the other."""

    clusters: dict[str, bytes] = field(default_factory=dict)
    active: set[str] = field(default_factory=set)
    routed: set[str] = field(default_factory=set)
    versions: dict[str, str] = field(default_factory=dict)
    nonces: dict[str, str] = field(default_factory=dict)
    asked_routes: bool = False
    warming: set[str] = field(default_factory=set)
    unacknowledged: bool = False
    """Clusters are still warming. Their version is in force all the same, and is what a new stream begins with."""

    def connect(self) -> list[Request]:
        """The first requests of a new stream, with the versions of the earlier one."""
        self.nonces, self.unacknowledged, self.asked_routes = {}, False, False
        first = Request(TypeUrl.CLUSTER, self.versions.get(TypeUrl.CLUSTER, ""), node=Node("gw", "meshctl"))
        return [first, *([self._endpoints()] if self.clusters else []), *self._routes()]

    def _endpoints(self) -> Request:
        kind = TypeUrl.ENDPOINT
        names = tuple(sorted(self.clusters))
        return Request(kind, self.versions.get(kind, ""), self.nonces.get(kind, ""), names_of(names))

    def _routes(self) -> list[Request]:
        if self.asked_routes or self.warming or not self.clusters:
            return []
        self.asked_routes = True
        return [Request(TypeUrl.ROUTE, self.versions.get(TypeUrl.ROUTE, ""), names=names_of(["meshctl"]))]

    def take(self, data: bytes) -> list[Request]:
        """Applies a response; what it answers. Fails where requests would."""
        response = DiscoveryResponse.parse(data)
        kind = TypeUrl(response.type_url)
        self.nonces[kind] = response.nonce
        values = [resource.value for resource in response.resources]
        if kind is TypeUrl.CLUSTER:
            return self._take_clusters(response.version_info, {Cluster.parse(v).name: v for v in values})
        self.versions[kind] = response.version_info
        if kind is TypeUrl.ENDPOINT:
            return self._take_endpoints({ClusterLoadAssignment.parse(v).cluster_name for v in values})
        (configuration,) = (RouteConfiguration.parse(v) for v in values)
        actions = [r.route for host in configuration.virtual_hosts for r in host.routes]
        self.routed = {a.cluster for a in actions if a is not None and a.cluster is not None}
        assert self.routed <= self.active, f"routes to clusters that are not there: {self.routed - self.active}"
        return [Request(kind, response.version_info, response.nonce, names_of(["meshctl"]))]

    def _take_clusters(self, version: str, new: dict[str, bytes]) -> list[Request]:
        gone = self.clusters.keys() - new.keys()
        assert not gone & self.routed, f"clusters removed that routes name: {gone & self.routed}"
        changed = {name for name, value in new.items() if self.clusters.get(name) != value}
        resubscribes = bool(changed or gone)
        self.clusters = new
        # An Envoy keeps the old cluster in use while its successor warms.
        self.active = self.active & new.keys()
        self.warming = (self.warming & new.keys()) | changed
        self.versions[TypeUrl.CLUSTER], self.unacknowledged = version, True
        return [*([self._endpoints()] if resubscribes else []), *self._acknowledge()]

    def _take_endpoints(self, names: set[str]) -> list[Request]:
        self.active |= names & self.clusters.keys()
        self.warming -= names
        return [self._endpoints(), *self._acknowledge()]

    def _acknowledge(self) -> list[Request]:
        if self.warming or not self.unacknowledged:
            return self._routes()
        self.unacknowledged = False
        kind = TypeUrl.CLUSTER
        return [Request(kind, self.versions[kind], self.nonces[kind]), *self._routes()]


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


@settings(max_examples=100, deadline=None)
@given(ROUTES, STEPS)
def test_no_order_of_events_breaks_a_route(first: Routes, steps: list[tuple[Routes | str, list[str]]]) -> None:
    """Plans, deliveries in either direction, and lost streams, in any order; and in the end all is in sync."""
    link = Link()
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
    assert set(link.envoy.clusters) == set(snapshot.clusters)
    assert link.envoy.routed == {name for host in snapshot.virtual_hosts.values() for name in host.needs}
    assert not link.envoy.clusters or link.subscription.synced(snapshot)


class Link:
    """A server's side, a model Envoy, and the messages between them, in order."""

    def __init__(self) -> None:
        self.cache, self.envoy, self.subscription = Cache(), ModelEnvoy(), Subscription()
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
            # A new server knows nothing of clusters that are gone, so only a proxy in sync is safe from it.
            if self.up or self.down or not self.subscription.synced(self.snapshot):
                return
            self.cache = Cache()
            self.apply(self.current)
        self.subscription, self.down = Subscription(), []
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
