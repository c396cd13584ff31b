"""One client's stream as a value: requests in, responses out, no I/O, no clock. State of the world and delta alike.

What belongs here: what this client is to have of each type, and in which order it is told. How a type's requests and
responses speak is `Channel`'s. What must not be known here: gRPC, other clients, where snapshots come from.

Invariants
- Make before break. A change is sent as clusters, load assignments, listeners, routes, then the prune:
  an Envoy is sent routes only when every cluster they name was accepted and got its endpoints on THIS stream, and a
  cluster that the client's routes still name stays in what it is sent until it has accepted routes without it.
- A cluster that is new or changed warms only on a fresh load assignment, even an unchanged one: it is sent once more.
- A client that asks for clusters by name (gRPC) does so after it has the routes, so its routes wait for nothing; what
  it asked for stays for a while after it is gone, since it asks no more only once it has new routes.

A stream of one type (not aggregated) has no order with the client's other streams: there a removed cluster is kept for
some snapshots instead. Who needs the order asks for ADS.

Sources: https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol ("ACK/NACK and resource type instance
version", "Eventual consistency considerations", "Incremental xDS"). Rejected: pushing routes together with clusters
(Envoy accepts routes to unknown clusters, and answers 503).
"""

from __future__ import annotations

from collections.abc import Collection, Set
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from xds.channel import Answer, Channel, DeltaChannel, WorldChannel
from xds.table import Table
from xds.translate import Resource
from xds.wire import NO_NAMES, DeltaRequest, Flavour, Names, Node, ProtocolError, Request, TypeUrl

if TYPE_CHECKING:
    from xds.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Nack:
    """A proxy refused a response."""

    node: Node
    type_url: TypeUrl
    version: str
    error: str
    contents: Collection[Resource]
    """What was in the response."""


class Subscription:
    """See the module. `receive` takes what the client says, `respond` gives what it must be sent next."""

    __slots__ = (
        "_changed",
        "_channels",
        "_clusters",
        "_endpoints",
        "_listeners",
        "_rerouted",
        "_returning",
        "_routes",
        "_sent",
        "delta",
        "newest",
        "node",
        "only",
    )

    def __init__(self, *, delta: bool = False, only: TypeUrl | None = None) -> None:
        """`only`: the one type of a stream that is not aggregated."""
        self.node = Node("")
        self.delta = delta
        self.only = only
        self._channels: dict[str, Channel] = {t: DeltaChannel(t) if delta else WorldChannel(t) for t in TypeUrl}
        self._clusters, self._endpoints, self._listeners, self._routes = (self._channels[t] for t in TypeUrl)
        self.newest = TypeUrl.CLUSTER
        """The type of the newest response."""
        self._sent = 0
        self._changed: set[str] = set()
        """Clusters that were sent on this stream, and whose load assignment was not accepted since."""
        self._returning = False
        """The client has state of an earlier stream, with routes that are unknown until it accepts ours."""
        self._rerouted = False
        """It accepted ours, or had them."""

    @property
    def active(self) -> bool:
        """Whether it asked for anything; a connection that has not is no client yet."""
        return any(channel.asked for channel in self._channels.values())

    @property
    def gateway(self) -> bool:
        """Whether this client is an Envoy that is sent all clusters, endpoints and routes, in order."""
        return self.node.flavour is Flavour.ENVOY and self.only is None

    @property
    def error(self) -> str:
        """The text of an outstanding NACK, "" when there is none."""
        return next((channel.error for channel in self._channels.values() if channel.error), "")

    @property
    def channels(self) -> Collection[Channel]:
        """Of each type, in the order in which they are sent."""
        return self._channels.values()

    @property
    def many_names(self) -> Names:
        """The names that it repeats in its requests, as they came."""
        return self._endpoints.raw if isinstance(self._endpoints, WorldChannel) else NO_NAMES

    # ------------------------------------------------------------------------------------------------------- requests

    def receive(self, request: Request | DeltaRequest) -> Answer | None:
        """Takes one request in; what it answers, if it answers anything. Unknown types and stale nonces are ignored, as
        the protocol asks. Raises ProtocolError for what no client may do."""
        self._introduce(request.node)
        channel = self._channels.get(request.type_url or self.only or "")
        if channel is None:
            return None
        if self.only is not None and channel.type_url is not self.only:
            raise ProtocolError(
                f"a request for {request.type_url} on a stream of {self.only}; use ADS for several types"
            )
        first = not channel.asked
        if first and channel is self._endpoints and self.gateway and not self._clusters.asked:
            # It says nothing of clusters while one of them warms, and that needs endpoints whatever it has of them.
            request = _unclaimed(request)
        if isinstance(request, DeltaRequest):
            assert isinstance(channel, DeltaChannel)  # noqa: S101 (made so by the constructor)
            answer, had = channel.receive(request), bool(request.versions)
        else:
            assert isinstance(channel, WorldChannel)  # noqa: S101
            answer, had = channel.receive(request), bool(request.version)
        if first and channel is self._clusters:
            # on a stream of its own nobody says what the routes name
            self._returning = had and self.only is None and not self._rerouted
        if answer is not None:
            self._answered(answer)
        return answer

    def _introduce(self, node: Node | None) -> None:
        if node is None:
            return
        if self.active and (node.id, node.group, node.flavour) != (self.node.id, self.node.group, self.node.flavour):
            raise ProtocolError(
                f"the stream of node {self.node.id!r} (group {self.node.group!r}) says it is node {node.id!r} (group"
                f" {node.group!r}) now; open a stream for each node"
            )
        self.node = node

    def _answered(self, answer: Answer) -> None:
        if answer.error is not None:
            return
        if answer.type_url is TypeUrl.ENDPOINT:
            # what was asked for again meanwhile is not in `accepted`; a new set: one that shrinks keeps its memory
            warm = {r.name for r in answer.flight.contents if r.name in self._endpoints.accepted}
            self._changed = {name for name in self._changed if name not in warm}
        elif answer.type_url is TypeUrl.ROUTE:
            self._returning, self._rerouted = False, True

    def nack(self, answer: Answer) -> Nack:
        """What a refusal was about."""
        return Nack(self.node, answer.type_url, answer.flight.version, answer.error or "", answer.flight.contents)

    # ------------------------------------------------------------------------------------------------------ responses

    def respond(self, snapshot: Snapshot) -> bytes | None:
        """The next response that `snapshot` makes due, None when there is none now. Call until None."""
        self._adopt(snapshot)
        return (
            self._respond_clusters(snapshot)
            or self._offer(self._endpoints, self._assignments(snapshot))
            or self._offer(self._listeners, _asked(self._listeners, snapshot.listeners))
            or self._respond_routes(snapshot)
        )

    def targets(self, snapshot: Snapshot) -> list[tuple[Channel, Table]]:
        """What the client is to have now, of each type that it asked for."""
        self._adopt(snapshot)
        of = {
            TypeUrl.CLUSTER: self._cluster_target(snapshot),
            TypeUrl.ENDPOINT: self._assignments(snapshot),
            TypeUrl.LISTENER: _asked(self._listeners, snapshot.listeners),
            TypeUrl.ROUTE: _asked(self._routes, snapshot.routes),
        }
        return [(channel, of[channel.type_url]) for channel in self._channels.values() if channel.asked]

    def synced(self, snapshot: Snapshot) -> bool:
        """Whether the client accepted everything of `snapshot` that it asked for, and holds nothing more.

        An Envoy that is a gateway asks for everything; one that has not yet is not in sync.
        """
        targets = self.targets(snapshot)
        if not targets or any(channel.flight is not None for channel, _ in targets):
            return False
        if self.gateway and not (self._clusters.wildcard and self._routes.asked):
            return False
        return all(channel.settled(target) for channel, target in targets) and not (
            self.gateway and not self._complete(snapshot) and self._cold(snapshot.clusters.keys())
        )

    def _complete(self, snapshot: Snapshot) -> bool:
        """Whether the client accepted all clusters and load assignments, and none is to be sent once more. It tells
        most clients apart by two numbers, where `_cold` looks at each of thousands of names."""
        clusters, endpoints = self._clusters.accepted, self._endpoints.accepted
        return (
            not self._changed
            and clusters.digest == snapshot.clusters.digest
            and endpoints.digest == snapshot.assignments.digest
        )

    def _cold(self, clusters: Set[str]) -> bool:
        """Whether one of `clusters` may have no endpoints at the client: none were accepted since it was sent."""
        return not (self._changed.isdisjoint(clusters) and clusters <= self._endpoints.accepted.keys())

    def _adopt(self, snapshot: Snapshot) -> None:
        """What the client had when it connected counts as accepted where it is what it should have."""
        clusters, endpoints, routes = self._clusters, self._endpoints, self._routes
        if clusters.claims:
            clusters.adopt(_asked(clusters, snapshot.clusters))
        if routes.claims and routes.adopt(_asked(routes, snapshot.routes)):
            self._returning, self._rerouted = False, True
        if endpoints.claims:
            endpoints.adopt(self._assignments(snapshot))
            endpoints.again(frozenset(self._changed))
        if self._listeners.claims:
            self._listeners.adopt(_asked(self._listeners, snapshot.listeners))

    def _offer(self, channel: Channel, target: Table) -> bytes | None:
        if not channel.asked or channel.flight is not None:
            return None
        response = channel.offer(target, str(self._sent + 1))
        if response is not None:
            self._sent, self.newest = self._sent + 1, channel.type_url
        return response

    def _respond_clusters(self, snapshot: Snapshot) -> bytes | None:
        channel = self._clusters
        if not channel.asked or channel.flight is not None:
            return None
        had = channel.accepted
        response = self._offer(channel, self._cluster_target(snapshot))
        if response is not None and self.gateway:
            self._warm_again(channel.sent, had)
        return response

    def _warm_again(self, new: Table, had: Table) -> None:
        """Envoy acknowledges clusters only once they are warm, so their endpoints follow at once, not after the ACK."""
        changes = new.since(had)
        names = frozenset(r.name for r in changes.changed)
        self._changed |= names
        self._changed.difference_update(changes.removed)
        self._endpoints.again(names)

    def _cluster_target(self, snapshot: Snapshot) -> Table:
        """The clusters this client should have now: the snapshot's, and those its routes still name."""
        channel = self._clusters
        if not channel.wildcard:
            base = snapshot.every_cluster.subset(channel.names)
        else:
            base = snapshot.clusters if self.only is None else snapshot.every_cluster
        if self._returning and not channel.known:
            return base.plus(snapshot.retired)
        removed = base.since(channel.sent).removed
        return base.plus({name: channel.sent[name] for name in removed if self._routed(name)}) if removed else base

    def _routed(self, cluster: str) -> bool:
        """Whether routes that the client has, or is being sent, may name `cluster`."""
        if self._returning:
            return True
        flight = self._routes.flight
        tables = (self._routes.accepted.values(), () if flight is None else flight.contents)
        return any(cluster in table.needs for resources in tables for table in resources)

    def _assignments(self, snapshot: Snapshot) -> Table:
        """Asked for, and there. A cluster that went while it warms still gets its own: until then an Envoy acknowledges
        no clusters."""
        return _asked(self._endpoints, snapshot.every_assignment)

    def _respond_routes(self, snapshot: Snapshot) -> bytes | None:
        channel, target = self._routes, _asked(self._routes, snapshot.routes)
        if not channel.asked or channel.flight is not None or not channel.due(target):
            return None
        return self._offer(channel, target) if self._reachable(snapshot, target) else None

    def _reachable(self, snapshot: Snapshot, routes: Table) -> bool:
        """Whether requests may be routed to the clusters of `routes` now. A gateway that reconnects while clusters warm
        asks for routes before clusters, so it is waited for."""
        if not self.gateway or (self._clusters.asked and not self._clusters.wildcard):
            return True
        if self._complete(snapshot):
            return True  # a snapshot is consistent
        needs = frozenset(chain.from_iterable(resource.needs for resource in routes.values()))
        return needs <= self._clusters.accepted.keys() and not self._cold(needs)


def _unclaimed(request: Request | DeltaRequest) -> Request | DeltaRequest:
    """As if nothing were left of an earlier stream."""
    return replace(request, versions={}) if isinstance(request, DeltaRequest) else replace(request, version="")


def _asked(channel: Channel, table: Table) -> Table:
    """What of `table` the client subscribed to."""
    return table if channel.wildcard else table.subset(channel.names)
