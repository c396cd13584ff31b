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
from xds.subscription import Subscription
from xds.wire import Node, Request, TypeUrl

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
        return Request(kind, self.versions.get(kind, ""), self.nonces.get(kind, ""), names)

    def _routes(self) -> list[Request]:
        if self.asked_routes or self.warming or not self.clusters:
            return []
        self.asked_routes = True
        return [Request(TypeUrl.ROUTE, self.versions.get(TypeUrl.ROUTE, ""), names=("meshctl",))]

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
        return [Request(kind, response.version_info, response.nonce, ("meshctl",))]

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
EVENTS = st.lists(
    st.one_of(ROUTES, st.sampled_from(["down", "down", "up", "up", "reconnect", "restart"])), min_size=5, max_size=60
)


@settings(max_examples=150, deadline=None)
@given(ROUTES, EVENTS)
def test_no_order_of_events_breaks_a_route(first: Routes, events: list[Routes | str]) -> None:
    """Plans, deliveries in either direction, and lost streams, in any order; and in the end all is in sync."""
    cache, envoy, subscription = Cache(), ModelEnvoy(), Subscription()
    applied(cache, first)
    up, down = envoy.connect(), list[bytes]()
    current = first

    def deliver(event: str) -> bool:
        assert cache.snapshot is not None
        if event == "up" and up:
            subscription.receive(up.pop(0))
        elif event == "down" and (due := subscription.respond(cache.snapshot)) is not None:
            down.append(due)
        elif event == "down" and down:
            up.extend(envoy.take(down.pop(0)))
        else:
            return False
        return True

    for event in events:
        if isinstance(event, dict):
            current = event
            applied(cache, current)
        elif event in ("reconnect", "restart"):
            if event == "restart":
                # A new server knows nothing of clusters that are gone, so only a proxy in sync is safe from it.
                if cache.snapshot is None or up or down or not subscription.synced(cache.snapshot):
                    continue
                cache = Cache()
                applied(cache, current)
            subscription, down = Subscription(), []
            up = envoy.connect()
        else:
            deliver(event)
    while deliver("up") or deliver("down"):
        pass
    assert cache.snapshot is not None
    assert set(envoy.clusters) == set(cache.snapshot.clusters)
    assert envoy.routed == {name for host in cache.snapshot.virtual_hosts.values() for name in host.needs}
    assert not envoy.clusters or subscription.synced(cache.snapshot)
