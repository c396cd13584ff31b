"""What is published: the newest plan where proxies take it, the last good resources where they refused it.

Invariants
- A route is published whole: its clusters, load assignments and virtual host are all of one plan.
- Each group of clients is served the routes that name it, and no others; a group is made when a route or a client first
  names it, and nothing is kept of the names that clients make up.
- A resource that a gateway refused (NACK) is quarantined by content: nothing with that content is published again. Its
  route goes back to the last resources that a proxy accepted in full; the other routes go on.
- What some proxy did accept is not quarantined when another one refuses it: then that proxy differs, not the resource.
- A publish that fails (InconsistentError) changes nothing, in no group.

A RoutePlan that is the SAME object as before costs nothing; of the others, what has the same bytes keeps its object.
Messages are dropped once encoded: 1000 routes of 10 endpoints are a few MB.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from meshctl.model import PROXY_GROUP, Plan, Problem, RouteId, RoutePlan
from xds.channel import meant
from xds.snapshot import Group, Snapshot
from xds.subscription import Nack
from xds.table import Table
from xds.translate import Resource, RouteResources, translate_route
from xds.wire import Flavour

REFUSED_KEPT = 256
"""Resources remembered per route that were refused, the newest: more than one plan of a route has."""
GOOD_KEPT = 3
"""Accepted states remembered per route: the newest may still be refused by a proxy that is slower."""
Key = tuple[str, Flavour]
"""A group by name, in the resources of one kind of client."""


@dataclass(slots=True)
class _Route:
    """What is known of one route."""

    plan: RoutePlan | None
    wanted: RouteResources
    published: RouteResources | None = None
    good: deque[RouteResources] = field(default_factory=lambda: deque(maxlen=GOOD_KEPT))
    """Accepted in full by some proxy; the newest last."""
    refused: dict[int, str] = field(default_factory=dict)
    """By the digest of a resource: the proxy's words."""

    def error(self, resources: RouteResources) -> str | None:
        """Why `resources` may not be published, None when they may."""
        if not self.refused:
            return None
        return next((self.refused[r.own_digest] for r in resources_of(resources) if r.own_digest in self.refused), None)

    def refuse(self, resource: Resource, words: str) -> None:
        self.refused.pop(resource.own_digest, None)
        self.refused[resource.own_digest] = words
        if len(self.refused) > REFUSED_KEPT:
            del self.refused[next(iter(self.refused))]

    def best(self) -> RouteResources | None:
        """The newest resources that were not refused."""
        return next((r for r in (self.wanted, *reversed(self.good)) if self.error(r) is None), None)


class Cache:
    """See the module."""

    def __init__(self) -> None:
        self._routes: dict[RouteId, _Route] = {}
        self._groups: dict[Key, Group] = {}
        """None before the first plan: a restart says nothing before it knows."""
        self._unproven: set[RouteId] = set()
        """Routes published since a proxy last accepted all that was published."""

    @property
    def snapshot(self) -> Snapshot | None:
        """What the Envoys of the default group should have; None until the first plan."""
        return self.snapshot_of(PROXY_GROUP, Flavour.ENVOY)

    def snapshot_of(self, group: str, flavour: Flavour) -> Snapshot | None:
        """What the clients of a group should have; None until the first plan."""
        if not self._groups:
            return None
        found = self._groups.get((group, flavour))
        if found is None:
            found = Group.empty(flavour)
            if (group, Flavour.ENVOY) in self._groups:  # there is one of each group that a route names
                found = self._groups[group, flavour] = found.updated(self._members(group))
        return found.snapshot

    @property
    def version(self) -> str:
        """Content hash of what all groups of Envoys are served; "" before the first plan."""
        tables = [
            table for key, group in self._groups.items() if key[1] is Flavour.ENVOY for table in group.snapshot.tables
        ]
        return Table({}, sum(table.digest for table in tables)).version if tables else ""

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Hosts that two routes of one group claim."""
        found = [p for key, g in self._groups.items() if key[1] is Flavour.ENVOY for p in g.snapshot.problems]
        return tuple(sorted(set(found), key=lambda p: (p.where, p.message)))

    @property
    def quarantined(self) -> Mapping[RouteId, str]:
        """Routes whose newest resources were refused, with the proxy's words."""
        errors = {route: state.error(state.wanted) for route, state in self._routes.items() if state.refused}
        return MappingProxyType({route: error for route, error in sorted(errors.items()) if error is not None})

    def apply(self, plan: Plan) -> int:
        """Publishes `plan`; how many resources changed. Raises InconsistentError, and then publishes nothing."""
        known = self._routes
        gone = known.keys() - plan.routes.keys()
        changed = [
            (route, routed)
            for route, routed in plan.routes.items()
            if (state := known.get(route)) is None or state.plan is not routed
        ]
        if self._groups and not changed and not gone:
            return 0
        return self._publish({route: self._translated(route, routed) for route, routed in changed}, gone)

    def put(self, wanted: Mapping[RouteId, RouteResources]) -> int:
        """Publishes resources as they are: what `apply` does with a plan's."""
        known = self._routes
        new = {route: self._merged(known.get(route), resources, None) for route, resources in wanted.items()}
        return self._publish(new, known.keys() - wanted.keys())

    def refuse(self, nack: Nack) -> bool:
        """Quarantines what `nack` was about; whether that changed what is published.

        A response is refused as a whole. The suspects in it are the resources that no proxy has accepted, and of those
        the ones that the proxy names, if it names any.
        """
        parts = [part for resource in nack.contents for part in resource.parts or (resource,)]
        suspects = [r for r in parts if not self.proven(r)]
        named = meant(nack.error, suspects)
        states = {r.route: self._routes[r.route] for r in named if r.route in self._routes}
        for resource in named:
            if resource.route in states:
                states[resource.route].refuse(resource, f"{nack.node.id}: {nack.error}")
        return bool(states) and self._publish(states) > 0

    def accept(self, snapshot: Snapshot) -> None:
        """A proxy has accepted all of `snapshot`."""
        if not self._unproven:
            return
        for group in self._groups.values():
            if group.snapshot is not snapshot:
                continue
            for route in [r for r in self._unproven if r in group.routes]:
                state = self._routes[route]
                if state.published is group.routes[route]:
                    state.good.append(state.published)
                    self._unproven.discard(route)

    def _translated(self, route: RouteId, plan: RoutePlan) -> _Route:
        """Built on the translation of the plan before it, if the resources were one: `put` takes any."""
        known = self._routes.get(route)
        before = known.wanted if known is not None and known.plan is not None else None
        return self._merged(known, translate_route(plan, before), plan)

    def _merged(self, known: _Route | None, wanted: RouteResources, plan: RoutePlan | None) -> _Route:
        """A new state, so that a publish that fails leaves the old one as it was."""
        if known is None:
            return _Route(plan, wanted)
        return _Route(plan, _shared(known.wanted, wanted), known.published, known.good, known.refused)

    def proven(self, resource: Resource) -> bool:
        """Whether some proxy has accepted it, or its virtual hosts."""
        if resource.parts:
            return all(self.proven(part) for part in resource.parts)
        state = self._routes.get(resource.route)
        if state is None:
            return False
        return any(resource.own_digest == r.own_digest for good in state.good for r in resources_of(good))

    def _members(self, group: str) -> list[RouteResources]:
        states = self._routes.values()
        return [s.published for s in states if s.published is not None and group in s.published.groups]

    def _publish(self, new: Mapping[RouteId, _Route], gone: Collection[RouteId] = ()) -> int:
        """Puts `new` states in and takes `gone` ones out, in every group or in none; how many resources changed."""
        best = {route: state.best() for route, state in new.items()}
        groups = self._updated(best, gone)
        keys = self._groups.keys() | groups.keys()
        count = sum(_snapshot(groups, key).changed(_snapshot(self._groups, key)) for key in keys)
        for route in gone:
            del self._routes[route]
        self._routes.update(new)
        for route, resources in best.items():
            state = self._routes[route]
            if resources is not None and (not state.good or state.good[-1] is not resources):
                self._unproven.add(route)
            state.published = resources
        self._unproven.difference_update(gone)
        self._groups = groups
        return count

    def _updated(self, best: Mapping[RouteId, RouteResources | None], gone: Collection[RouteId]) -> dict[Key, Group]:
        """All groups after the change. Raises InconsistentError."""
        groups = dict(self._groups)
        named = {PROXY_GROUP, *(name for r in best.values() if r is not None for name in r.groups)}
        for name in sorted(named):
            if (name, Flavour.ENVOY) not in groups:
                groups[name, Flavour.ENVOY] = Group.empty(Flavour.ENVOY).updated(self._members(name))
        for key, group in groups.items():
            changed = [r for r in best.values() if r is not None and key[0] in r.groups]
            left = [route for route, r in best.items() if r is None or key[0] not in r.groups]
            groups[key] = group.updated(changed, (*gone, *left))
        return {key: group for key, group in groups.items() if group.routes or key == (PROXY_GROUP, Flavour.ENVOY)}


def _snapshot(groups: Mapping[Key, Group], key: Key) -> Snapshot:
    return groups[key].snapshot if key in groups else Snapshot()


def resources_of(route: RouteResources) -> Iterator[Resource]:
    """All resources of one route."""
    yield from route.clusters.values()
    yield from route.assignments.values()
    yield route.virtual_host


def _shared(old: RouteResources, new: RouteResources) -> RouteResources:
    """`new`, with the objects of `old` where they are the same: a weight change copies nothing but the weights."""
    if old == new and _products(old) == _products(new):
        return old
    return replace(
        new,
        clusters={name: _reused(old.clusters.get(name), r) for name, r in new.clusters.items()},
        assignments={name: _reused(old.assignments.get(name), r) for name, r in new.assignments.items()},
        virtual_host=_reused(old.virtual_host, new.virtual_host),
    )


def _products(route: RouteResources) -> tuple[str, ...]:
    """The GPUs behind the endpoints, which Envoy is not told of and gRPC clients are."""
    return () if route.plan is None else tuple(e.gpu for e in route.plan.route.endpoints)


def _reused(old: Resource | None, new: Resource) -> Resource:
    return old if old is not None and old.digest == new.digest else new
