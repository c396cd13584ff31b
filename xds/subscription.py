"""One proxy's ADS stream as a value: requests in, responses out, no I/O, no clock. State of the world.

What belongs here: what this proxy asked for, has accepted, has in flight, and what it must be sent next. What must not
be known here: gRPC, other proxies, where snapshots come from.

Invariants
- At most one response of a type is in flight; whatever changes meanwhile is coalesced into the next one.
- Make before break. A change is sent as clusters, load assignments, routes, then the prune:
  routes are sent only when every cluster they name was accepted and got its endpoints on THIS stream, and a cluster
  that the proxy's routes still name stays in what it is sent until it has accepted routes without it.
- A cluster that is new or changed warms only on a fresh load assignment, even an unchanged one: it is sent once more.
- A version that was refused (NACK) is not sent to this proxy again.
- A proxy that comes back with the version it should have is sent nothing.

Sources: https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol ("ACK/NACK and resource type instance
version", "Eventual consistency considerations"). Rejected: delta xDS (later), and pushing routes together with clusters
(Envoy accepts routes to unknown clusters, and answers 503).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from xds.snapshot import EMPTY, Snapshot, body_of, version_of
from xds.translate import ROUTE_CONFIGURATION, Resource
from xds.wire import Node, Request, TypeUrl, response

NO_LISTENERS = "0"
"""Version of the empty list of listeners: our proxies have theirs from the bootstrap."""
GATEWAY_CLUSTER = "meshctl"
"""Node cluster of the proxies that our bootstrap configures."""


@dataclass(frozen=True, slots=True)
class Nack:
    """A proxy refused a response."""

    node: Node
    type_url: TypeUrl
    version: str
    error: str
    contents: Mapping[str, Resource]
    """What was in the response."""


@dataclass(slots=True)
class _Channel:
    """The state of one resource type."""

    subscribed: bool = False
    wildcard: bool = False
    names: frozenset[str] = frozenset()
    claimed: str = ""
    """Version the proxy said it has when it connected; "" when none, or once it was looked at."""
    nonce: str = ""
    flight: Mapping[str, Resource] | None = None
    """Contents of the response that awaits its answer."""
    flight_version: str = ""
    accepted: Mapping[str, Resource] = field(default_factory=dict)
    accepted_version: str = ""
    """ "" while unknown."""
    refused_version: str = ""
    error: str = ""
    """The proxy's words when it last refused, "" once it has accepted something newer."""

    def wants(self, version: str) -> bool:
        """Whether a response of `version` may and should be sent now."""
        return self.flight is None and version not in (self.accepted_version, self.refused_version)


class Subscription:
    """See the module. `receive` takes what the proxy says, `respond` gives what it must be sent next."""

    def __init__(self) -> None:
        self.node = Node("")
        self._clusters = _Channel()
        self._endpoints = _Channel()
        self._listeners = _Channel()
        self._routes = _Channel()
        self._sent = 0
        self._has: dict[str, Resource] = {}
        """Load assignments sent on this stream, in flight or accepted."""
        self._has_digests = 0
        """Sum of the digests in `_has`: the version without walking thousands of names for every weight."""
        self._warm: set[str] = set()
        """Clusters whose load assignment was accepted since the cluster last changed."""
        self._fresh: set[str] = set()
        """Clusters that changed and must be sent their load assignment whether or not that did."""
        self._returning = False
        """The proxy has state of an earlier stream, with routes that are unknown until it accepts ours."""

    @property
    def active(self) -> bool:
        """Whether it asked for anything; a connection that has not is no proxy yet."""
        return any(c.subscribed for c in (self._clusters, self._endpoints, self._listeners, self._routes))

    @property
    def gateway(self) -> bool:
        """Whether this proxy takes part in balancing."""
        return self.node.cluster == GATEWAY_CLUSTER

    @property
    def error(self) -> str:
        """The text of an outstanding NACK, "" when there is none."""
        return self._clusters.error or self._endpoints.error or self._routes.error

    # ------------------------------------------------------------------------------------------------------- requests

    def receive(self, request: Request) -> Nack | None:
        """Takes one request in. Unknown types and stale nonces are ignored, as the protocol asks."""
        if request.node is not None:
            self.node = request.node
        kind = next((t for t in TypeUrl if t == request.type_url), None)
        if kind is None:
            return None
        channel = self._channel(kind)
        if request.nonce and channel.nonce and request.nonce != channel.nonce:
            return None
        self._subscribe(channel, request)
        if channel.flight is None or request.nonce != channel.nonce:
            return None
        contents, channel.flight = channel.flight, None
        if request.error is None:
            self._accept(kind, channel, contents)
            return None
        return self._refuse(kind, channel, contents, request.error)

    def _channel(self, kind: TypeUrl) -> _Channel:
        match kind:
            case TypeUrl.CLUSTER:
                return self._clusters
            case TypeUrl.ENDPOINT:
                return self._endpoints
            case TypeUrl.LISTENER:
                return self._listeners
            case TypeUrl.ROUTE:
                return self._routes

    def _subscribe(self, channel: _Channel, request: Request) -> None:
        """An empty first list of names is the legacy wildcard, and stays one while it is empty."""
        if not channel.subscribed:
            channel.claimed = request.version
            self._returning |= channel is self._clusters and bool(request.version)
        channel.wildcard = "*" in request.names or (not request.names and (channel.wildcard or not channel.subscribed))
        channel.subscribed = True
        if len(request.names) == len(channel.names) and channel.names.issuperset(request.names):
            return
        channel.names = frozenset(request.names)
        if channel is self._endpoints:
            for name in self._has.keys() - channel.names:
                self._forget(name)

    def _accept(self, kind: TypeUrl, channel: _Channel, contents: Mapping[str, Resource]) -> None:
        channel.error = ""
        if kind is TypeUrl.ENDPOINT:
            self._warm.update(name for name in contents if name in self._has and name not in self._fresh)
        elif kind is TypeUrl.ROUTE:
            self._returning = False
        channel.accepted, channel.accepted_version = contents, channel.flight_version

    def _refuse(self, kind: TypeUrl, channel: _Channel, contents: Mapping[str, Resource], error: str) -> Nack:
        """Clusters and load assignments of a refused response may be in force in part: what the proxy has of them is
        then unknown, and the next version is sent whole. Routes are refused as one."""
        channel.error = error
        channel.refused_version = channel.flight_version
        if kind is TypeUrl.CLUSTER:
            channel.accepted_version = ""
        elif kind is TypeUrl.ENDPOINT:
            for name in contents:
                self._forget(name)
        return Nack(self.node, kind, channel.flight_version, error, contents)

    def _forget(self, name: str) -> None:
        gone = self._has.pop(name, None)
        if gone is not None:
            self._has_digests -= gone.digest
        self._warm.discard(name)

    # ------------------------------------------------------------------------------------------------------ responses

    def respond(self, snapshot: Snapshot) -> bytes | None:
        """The next response that `snapshot` makes due, None when there is none now. Call until None."""
        self._adopt(snapshot)
        return (
            self._respond_clusters(snapshot)
            or self._respond_endpoints(snapshot)
            or self._respond_listeners()
            or self._respond_routes(snapshot)
        )

    def synced(self, snapshot: Snapshot) -> bool:
        """Whether the proxy accepted everything of `snapshot` that it asked for, and holds nothing more.

        A gateway asks for everything; one that has not yet is not in sync.
        """
        self._adopt(snapshot)
        if self.gateway and not (self._clusters.wildcard and self._routes.subscribed):
            return False
        channels = [c for c in (self._clusters, self._endpoints, self._routes) if c.subscribed]
        if not channels or any(c.flight is not None for c in channels):
            return False
        if self._clusters.subscribed and self._clusters.accepted_version != self._cluster_target(snapshot)[1]:
            return False
        if self._routes.subscribed and self._routes.accepted_version != snapshot.routes_version:
            return False
        if self.gateway and not self._warm.issuperset(snapshot.clusters):
            return False
        return not self._due(snapshot)

    def _adopt(self, snapshot: Snapshot) -> None:
        """What the proxy had when it connected counts as accepted where it is what it should have."""
        clusters, routes, endpoints = self._clusters, self._routes, self._endpoints
        if clusters.claimed and clusters.wildcard and clusters.claimed == snapshot.clusters_version:
            clusters.accepted, clusters.accepted_version = snapshot.clusters, snapshot.clusters_version
        if routes.claimed and routes.claimed == snapshot.routes_version:
            routes.accepted, routes.accepted_version = snapshot.virtual_hosts, snapshot.routes_version
            self._returning = False
        if endpoints.claimed:
            held = {n: snapshot.assignments[n] for n in endpoints.names if n in snapshot.assignments}
            if version_of(held.values()) == endpoints.claimed:
                self._has, self._has_digests = held, sum(r.digest for r in held.values())
                self._warm = held.keys() - self._fresh
        clusters.claimed = routes.claimed = endpoints.claimed = ""

    def _send(self, kind: TypeUrl, version: str, contents: Mapping[str, Resource], body: bytes) -> bytes:
        channel = self._channel(kind)
        self._sent += 1
        channel.nonce, channel.flight, channel.flight_version = str(self._sent), contents, version
        return response(kind, version, channel.nonce, body)

    def _respond_clusters(self, snapshot: Snapshot) -> bytes | None:
        if not self._clusters.subscribed or self._clusters.flight is not None:
            return None
        target, version = self._cluster_target(snapshot)
        if not self._clusters.wants(version):
            return None
        self._rewarm(_changes(self._clusters.accepted if self._clusters.accepted_version else EMPTY, target))
        body = snapshot.clusters_body() if target is snapshot.clusters else body_of(target.values())
        return self._send(TypeUrl.CLUSTER, version, target, body)

    def _rewarm(self, names: Iterable[str]) -> None:
        """Envoy acknowledges clusters only once they are warm, so their endpoints follow at once, not after the ACK."""
        for name in names:
            self._warm.discard(name)
            self._fresh.add(name)

    def _cluster_target(self, snapshot: Snapshot) -> tuple[Mapping[str, Resource], str]:
        """The clusters this proxy should have now, with their version: the snapshot's, and those its routes still
        name."""
        channel = self._clusters
        if not channel.wildcard:
            some = {n: snapshot.clusters[n] for n in sorted(channel.names) if n in snapshot.clusters}
            return some, version_of(some.values())
        kept = {name: r for name, r in self._routed(snapshot).items() if name not in snapshot.clusters}
        if not kept:
            return snapshot.clusters, snapshot.clusters_version
        target = {**snapshot.clusters, **kept}
        return target, version_of(target.values())

    def _routed(self, snapshot: Snapshot) -> Mapping[str, Resource]:
        """Clusters beyond the snapshot's that the proxy's routes may name: of those it has, the ones named by routes it
        accepted or was sent; while it has the routes of an earlier stream, all of them; and where even what it has is
        unknown, any that were published not long ago."""
        if self._returning:
            had = self._clusters.accepted
            return had if self._clusters.accepted_version else {**snapshot.retired, **had}
        routes, held = self._routes, self._clusters.accepted
        if routes.flight is None and routes.accepted_version == snapshot.routes_version:
            return EMPTY
        hosts = (*routes.accepted.values(), *(routes.flight or EMPTY).values())
        return {name: held[name] for host in hosts for name in host.needs if name in held}

    def _respond_endpoints(self, snapshot: Snapshot) -> bytes | None:
        channel = self._endpoints
        if not channel.subscribed or channel.flight is not None:
            return None
        due = self._due(snapshot)
        if not due:
            return None
        digests = self._has_digests + sum(r.digest - self._digest_had(name) for name, r in due.items())
        version = f"{digests % 2**128:032x}"
        if version == channel.refused_version:
            return None
        self._has.update(due)
        self._has_digests = digests
        self._fresh -= due.keys()
        return self._send(TypeUrl.ENDPOINT, version, due, body_of(due.values()))

    def _digest_had(self, name: str) -> int:
        return self._has[name].digest if name in self._has else 0

    def _due(self, snapshot: Snapshot) -> dict[str, Resource]:
        """Load assignments to be sent: asked for, and changed since they were sent on this stream. A cluster that went
        while it warms still gets its own: until then the proxy acknowledges no clusters."""
        due = {}
        for name in self._endpoints.names:
            new = snapshot.assignments.get(name) or snapshot.retired_assignments.get(name)
            if new is not None and (self._digest_had(name) != new.digest or name in self._fresh):
                due[name] = new
        return dict(sorted(due.items()))

    def _respond_listeners(self) -> bytes | None:
        if not self._listeners.subscribed or not self._listeners.wants(NO_LISTENERS):
            return None
        if self._listeners.claimed == NO_LISTENERS:
            return None
        return self._send(TypeUrl.LISTENER, NO_LISTENERS, EMPTY, b"")

    def _respond_routes(self, snapshot: Snapshot) -> bytes | None:
        if ROUTE_CONFIGURATION not in self._routes.names or not self._routes.wants(snapshot.routes_version):
            return None
        if not all(self._reachable(name) for host in snapshot.virtual_hosts.values() for name in host.needs):
            return None
        return self._send(TypeUrl.ROUTE, snapshot.routes_version, snapshot.virtual_hosts, snapshot.routes_body())

    def _reachable(self, cluster: str) -> bool:
        """Whether requests may be routed to `cluster` now. A client that asks for clusters by name (gRPC) does so only
        after it has the routes, so it is not waited for; a gateway that reconnects while clusters warm asks for routes
        before clusters, so it is."""
        if not self._clusters.wildcard:
            return not self.gateway
        return cluster in self._clusters.accepted and cluster in self._warm


def _changes(old: Mapping[str, Resource], new: Mapping[str, Resource]) -> list[str]:
    """Names in `new` that are not the same in `old`."""
    return [name for name, r in new.items() if name not in old or old[name].digest != r.digest]
