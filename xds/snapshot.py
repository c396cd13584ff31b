"""What one group of clients is served at one instant, checked, and how the next instant's follows from it. Pure.

Invariant, checked before anything is published: every resource that another one names exists. A virtual host names
clusters of its own route, every cluster has its load assignment and the reverse, names are unique, a listener's route
configuration exists, and a load assignment with endpoints has weights that Envoy accepts. What is inconsistent is an
error and is never published; the last good snapshot stays.

A snapshot is made from the one before it and what changed: 1000 routes of 4 clusters cost 300 ms to begin with and a
change of one of them 1 ms. Nothing that exists is changed in place, so a step that fails leaves all as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import chain

from meshctl.errors import MeshctlError
from meshctl.model import Problem, RouteId
from xds.proxyless import ClientResources, client_resources, listener
from xds.table import EMPTY, MODULUS, Table
from xds.translate import ROUTE_CONFIGURATION, Resource, RouteResources, route_configuration, with_domains
from xds.wire import Flavour

RETIRED_KEPT = 8
"""Snapshots for which a removed cluster is remembered, for clients that reconnect with routes to it."""
_NONE: Mapping[str, Resource] = EMPTY


class InconsistentError(MeshctlError):
    """Resources that name what does not exist. They were not published; this is a bug of the translation."""


@dataclass(frozen=True)
class Snapshot:
    """What clients are sent."""

    clusters: Table = EMPTY
    assignments: Table = EMPTY
    """By the name of their cluster."""
    listeners: Table = EMPTY
    routes: Table = EMPTY
    """RouteConfigurations. Envoys have one, `ROUTE_CONFIGURATION`, with all virtual hosts."""
    virtual_hosts: Mapping[str, Resource] = _NONE
    """Of that one."""
    retired: Mapping[str, Resource] = _NONE
    """Clusters of not long ago: a client that reconnects may still route to them until it has new routes."""
    retired_assignments: Mapping[str, Resource] = _NONE
    """Theirs: a client that was sent a cluster just before it went waits for its endpoints and answers nothing else."""
    problems: tuple[Problem, ...] = ()
    """Hosts claimed twice."""

    @cached_property
    def every_cluster(self) -> Table:
        """The retired ones too: what may be asked for by name."""
        return self.clusters.plus(self.retired)

    @cached_property
    def every_assignment(self) -> Table:
        """The retired ones too."""
        return self.assignments.plus(self.retired_assignments)

    @cached_property
    def version(self) -> str:
        """Content hash of all of it."""
        return Table(_NONE, sum(table.digest for table in self.tables)).version

    @property
    def tables(self) -> tuple[Table, Table, Table, Table]:
        return self.clusters, self.assignments, self.listeners, self.routes

    def changed(self, old: Snapshot) -> int:
        """How many resources differ from those of `old`."""
        pairs = zip(self.tables, old.tables, strict=True)
        changes = (new.since(before) for new, before in pairs)
        return sum(len(c.changed) + len(c.removed) for c in changes)


@dataclass(frozen=True)
class Group:
    """The clients of one group and flavour: their routes, and the newest snapshot of these."""

    flavour: Flavour
    routes: Mapping[RouteId, RouteResources | ClientResources] = field(default_factory=dict)
    claims: Mapping[str, tuple[RouteId, ...]] = field(default_factory=dict)
    """Who wants a host, in order; the first has it. Envoy refuses a whole RouteConfiguration for one host twice."""
    snapshot: Snapshot = field(default_factory=Snapshot)
    gone: tuple[tuple[Mapping[str, Resource], Mapping[str, Resource]], ...] = ()
    """Clusters and load assignments that the newest snapshots removed."""

    @classmethod
    @cache  # one object, so that nothing differs between those that nobody names
    def empty(cls, flavour: Flavour) -> Group:
        """Without routes. Envoys are told so: they answer 404, and are ready."""
        routes = Table.of([_configuration(_NONE)]) if flavour is Flavour.ENVOY else EMPTY
        return cls(flavour, snapshot=Snapshot(routes=routes))

    def updated(self, changed: Iterable[RouteResources], removed: Collection[RouteId] = ()) -> Group:
        """The group with `changed` routes put in and `removed` ones taken out; itself when that is nothing.

        Raises InconsistentError.
        """
        wanted = {route.route: self._flavoured(route) for route in changed}
        puts = {route: put for route, put in wanted.items() if put is not None and self.routes.get(route) is not put}
        drops = {r for r in (*removed, *(r for r, put in wanted.items() if put is None)) if r in self.routes}
        if not puts and not drops:
            return self
        routes = {**self.routes, **puts}
        for route in drops:
            del routes[route]
        claims = _claimed(self.claims, self.routes, routes, puts.keys() | drops)
        group = replace(self, routes=routes, claims=claims)
        return group.published_after(self, puts, drops)

    def _flavoured(self, route: RouteResources) -> RouteResources | ClientResources | None:
        """`route` in the resources of this flavour, None where it is not for it."""
        if self.flavour is Flavour.ENVOY:
            return route
        return None if route.plan is None else client_resources(route.plan)

    def published_after(
        self, old: Group, puts: Mapping[RouteId, RouteResources | ClientResources], drops: Collection[RouteId]
    ) -> Group:
        """With the snapshot that follows from that of `old`. Raises InconsistentError."""
        before = old.snapshot
        former = [old.routes[route] for route in (*puts, *drops) if route in old.routes]
        new_clusters, new_assignments = _merged(puts.values(), before.clusters, former)
        gone_clusters = [n for route in former for n in route.clusters if n not in new_clusters]
        clusters = before.clusters.replaced(new_clusters.values(), gone_clusters)
        assignments = before.assignments.replaced(new_assignments.values(), gone_clusters)
        gone = self.gone
        if lost := clusters.since(before.clusters).removed:
            kept = ({n: before.clusters[n] for n in lost}, {n: before.assignments[n] for n in lost})
            gone = (*gone, kept)[-RETIRED_KEPT:]
        retired, retired_assignments = (
            {name: r for one in gone for name, r in one[i].items() if name not in clusters} for i in (0, 1)
        )
        affected = _affected(old, self, puts.keys() | drops)
        hosts, listeners, tables = self._served(before, affected)
        snapshot = Snapshot(
            clusters,
            assignments,
            listeners,
            tables,
            hosts,
            retired,
            retired_assignments,
            before.problems if self.claims is old.claims else _problems(self.claims),
        )
        return replace(self, snapshot=snapshot, gone=gone)

    def _served(self, before: Snapshot, affected: Collection[RouteId]) -> tuple[Mapping[str, Resource], Table, Table]:
        """Virtual hosts, listeners and route configurations, after those of the `affected` routes may have changed."""
        if self.flavour is Flavour.ENVOY:
            hosts = self._virtual_hosts(before.virtual_hosts, affected)
            same = hosts is before.virtual_hosts
            return hosts, EMPTY, before.routes if same else before.routes.replaced([_configuration(hosts)])
        listeners, tables, lost = [], [], []
        for route in sorted(affected):
            found = self.routes.get(route)
            if isinstance(found, ClientResources):
                tables.append(found.routes)
                listeners += [listener(host, found.routes) for host in self._hosts_of(route)]
            else:
                lost.append(str(route))
        told = {r.name for r in listeners}
        silent = [host for host, r in before.listeners.items() if r.route in affected and host not in told]
        return _NONE, before.listeners.replaced(listeners, silent), before.routes.replaced(tables, lost)

    def _virtual_hosts(self, before: Mapping[str, Resource], affected: Collection[RouteId]) -> Mapping[str, Resource]:
        changed: dict[str, Resource] = {}
        for route in affected:
            found, domains = self.routes.get(route), self._hosts_of(route)
            if isinstance(found, RouteResources) and domains:
                changed[found.virtual_host.name] = with_domains(found.virtual_host, domains)
        same = all(name in before and before[name].digest == r.digest for name, r in changed.items())
        dropped = {str(route) for route in affected} - changed.keys()
        if same and dropped.isdisjoint(before):
            return before
        if changed.keys() <= before.keys() and dropped.isdisjoint(before):
            return {**before, **changed}
        kept = {name: r for name, r in before.items() if name not in dropped}
        return dict(sorted((kept | changed).items()))

    def _hosts_of(self, route: RouteId) -> tuple[str, ...]:
        """The hosts that are its own."""
        found = self.routes.get(route)
        return () if found is None else tuple(host for host in found.hosts if self.claims[host][0] == route)


def _configuration(hosts: Mapping[str, Resource]) -> Resource:
    """The one RouteConfiguration of all virtual hosts."""
    parts = tuple(hosts.values())
    needs = frozenset(chain.from_iterable(host.needs for host in parts))
    digest = sum(host.digest for host in parts) % MODULUS
    return Resource(ROUTE_CONFIGURATION, RouteId(""), route_configuration(parts), digest, needs, parts=parts)


def _claimed(
    claims: Mapping[str, tuple[RouteId, ...]],
    old: Mapping[RouteId, RouteResources | ClientResources],
    new: Mapping[RouteId, RouteResources | ClientResources],
    routes: Collection[RouteId],
) -> Mapping[str, tuple[RouteId, ...]]:
    """Who wants which host, after `routes` changed."""
    moved = [
        (route, hosts_before, hosts_after)
        for route in sorted(routes)
        if (hosts_before := _hosts(old, route)) != (hosts_after := _hosts(new, route))
    ]
    if not moved:
        return claims
    changed = dict(claims)
    for route, before, after in moved:
        for host in before - after:
            left = tuple(r for r in changed.pop(host) if r != route)
            if left:
                changed[host] = left
        for host in after - before:
            changed[host] = tuple(sorted((*changed.get(host, ()), route)))
    return changed


def _hosts(routes: Mapping[RouteId, RouteResources | ClientResources], route: RouteId) -> frozenset[str]:
    return frozenset(routes[route].hosts) if route in routes else frozenset()


def _affected(old: Group, new: Group, routes: Collection[RouteId]) -> set[RouteId]:
    """`routes`, and those whose hosts went to or came from one of them."""
    affected = set(routes)
    if old.claims is not new.claims:
        for route in routes:
            for host in _hosts(old.routes, route) ^ _hosts(new.routes, route):
                affected.update(old.claims.get(host, ()), new.claims.get(host, ()))
    return affected


def _problems(claims: Mapping[str, tuple[RouteId, ...]]) -> tuple[Problem, ...]:
    several = [(host, owners) for host, owners in claims.items() if len(owners) > 1]
    contested = sorted((route, host, owners[0]) for host, owners in several for route in owners[1:])
    return tuple(
        Problem(
            where=f"ModelRoute {route}",
            message=f"host {host!r} is already served by {owner}; remove it from one of the two routes",
            route=route,
        )
        for route, host, owner in contested
    )


def _merged(
    puts: Iterable[RouteResources | ClientResources],
    clusters: Table,
    former: Sequence[RouteResources | ClientResources],
) -> tuple[dict[str, Resource], dict[str, Resource]]:
    """The clusters and load assignments of `puts`, checked. Raises InconsistentError, naming what is wrong."""
    freed = {name for route in former for name in route.clusters}
    new_clusters: dict[str, Resource] = {}
    new_assignments: dict[str, Resource] = {}
    for route in puts:
        _check(route)
        for name, resource in route.clusters.items():
            other = new_clusters.get(name) or (None if name in freed else clusters.get(name))
            if other is not None:
                raise InconsistentError(f"cluster {name!r} is claimed by {other.route} and by {route.route}")
            new_clusters[name] = resource
        new_assignments.update(route.assignments)
    return new_clusters, new_assignments


def _check(route: RouteResources | ClientResources) -> None:
    """Raises InconsistentError, naming the first thing that is wrong."""
    host = route.virtual_host if isinstance(route, RouteResources) else route.routes
    missing = [name for name in host.needs if name not in route.clusters]
    if missing:
        raise InconsistentError(f"virtual host {host.name!r} names clusters that do not exist: {missing}")
    difference = sorted(route.clusters.keys() ^ route.assignments.keys())
    if difference:
        raise InconsistentError(f"clusters without load assignment, or the reverse: {difference[:5]}")
    for assignment in route.assignments.values():
        weights = assignment.weights
        if weights and (min(weights) < 1 or sum(weights) >= 2**32):
            raise InconsistentError(f"load assignment {assignment.name!r} has weights Envoy refuses: {weights}")
