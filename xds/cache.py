"""What is published: the newest plan where proxies take it, the last good resources where they refused it.

Invariants
- A route is published whole: its clusters, load assignments and virtual host are all of one plan.
- A resource that a gateway refused (NACK) is quarantined by content: nothing with that content is published again. Its
  route goes back to the last resources that a proxy accepted in full; the other routes go on.
- What some proxy did accept is not quarantined when another one refuses it: then that proxy differs, not the resource.

A RoutePlan that is the SAME object as before costs nothing; of the others, what has the same bytes keeps its object.
Messages are dropped once encoded: 1000 routes of 10 endpoints are a few MB.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from meshctl.model import Plan, RouteId, RoutePlan
from xds.snapshot import Snapshot, build, changed
from xds.subscription import Nack
from xds.translate import Resource, RouteResources, translate_route

RETIRED_KEPT = 8
"""Publishes for which a removed cluster is remembered, for proxies that reconnect with routes to it."""
GOOD_KEPT = 3
"""Accepted states remembered per route: the newest may still be refused by a proxy that is slower."""


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

    def best(self) -> RouteResources | None:
        """The newest resources that were not refused."""
        return next((r for r in (self.wanted, *reversed(self.good)) if self.error(r) is None), None)


class Cache:
    """See the module."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        """What proxies should have; None until the first plan: a restart says nothing before it knows."""
        self._routes: dict[RouteId, _Route] = {}
        self._retired: deque[tuple[Mapping[str, Resource], Mapping[str, Resource]]] = deque(maxlen=RETIRED_KEPT)
        """Clusters and load assignments that a publish removed."""

    @property
    def quarantined(self) -> Mapping[RouteId, str]:
        """Routes whose newest resources were refused, with the proxy's words."""
        errors = {route: state.error(state.wanted) for route, state in sorted(self._routes.items()) if state.refused}
        return MappingProxyType({route: error for route, error in errors.items() if error is not None})

    def apply(self, plan: Plan) -> int:
        """Publishes `plan`; how many resources changed. Raises InconsistentError, and then publishes nothing."""
        if self.snapshot is not None and self._unchanged(plan):
            return 0
        wanted = {route: self._translated(route, plan.routes[route]) for route in sorted(plan.routes)}
        return self.put(wanted, plan.routes)

    def put(
        self, wanted: Mapping[RouteId, RouteResources], plans: Mapping[RouteId, RoutePlan] = MappingProxyType({})
    ) -> int:
        """Publishes resources as they are: what `apply` does with a plan's."""
        before = self._routes
        self._routes = {route: self._merged(route, wanted[route], plans.get(route)) for route in sorted(wanted)}
        try:
            return self._publish()
        except Exception:
            self._routes = before
            raise

    def refuse(self, nack: Nack) -> bool:
        """Quarantines what `nack` was about; whether that changed what is published.

        A response is refused as a whole. The suspects in it are the resources that no proxy has accepted, and of those
        the ones that the proxy names, if it names any.
        """
        suspects = [r for r in nack.contents.values() if not self._accepted(r)]
        named = [r for r in suspects if r.name in nack.error]
        for resource in named or suspects:
            state = self._routes.get(resource.route)
            if state is not None:
                state.refused[resource.own_digest] = f"{nack.node.id}: {nack.error}"
        return bool(suspects) and self._publish() > 0

    def accept(self, snapshot: Snapshot) -> None:
        """A proxy has accepted all of `snapshot`."""
        if snapshot is not self.snapshot:
            return
        for state in self._routes.values():
            if state.published is not None and (not state.good or state.good[-1] is not state.published):
                state.good.append(state.published)

    def _unchanged(self, plan: Plan) -> bool:
        if len(plan.routes) != len(self._routes):
            return False
        known = self._routes
        return all(route in known and known[route].plan is routed for route, routed in plan.routes.items())

    def _translated(self, route: RouteId, plan: RoutePlan) -> RouteResources:
        known = self._routes.get(route)
        return known.wanted if known is not None and known.plan is plan else translate_route(plan)

    def _merged(self, route: RouteId, wanted: RouteResources, plan: RoutePlan | None) -> _Route:
        """A new state, so that a publish that fails leaves the old one as it was."""
        known = self._routes.get(route)
        if known is None:
            return _Route(plan, wanted)
        return _Route(plan, _shared(known.wanted, wanted), known.published, known.good, known.refused)

    def _accepted(self, resource: Resource) -> bool:
        state = self._routes.get(resource.route)
        if state is None:
            return False
        return any(resource.own_digest == r.own_digest for good in state.good for r in resources_of(good))

    def _publish(self) -> int:
        chosen = {route: state.best() for route, state in self._routes.items()}
        resources = [best for best in chosen.values() if best is not None]
        old = self.snapshot
        if old is not None:
            self._retire(old, {name for r in resources for name in r.clusters})
        clusters, assignments = ({n: r for gone in self._retired for n, r in gone[i].items()} for i in (0, 1))
        snapshot = build(resources, clusters, assignments)
        for route, best in chosen.items():
            self._routes[route].published = best
        self.snapshot = snapshot
        return changed(old, snapshot)

    def _retire(self, old: Snapshot, kept: set[str]) -> None:
        gone = [name for name in old.clusters if name not in kept]
        if gone:
            self._retired.append(({n: old.clusters[n] for n in gone}, {n: old.assignments[n] for n in gone}))


def resources_of(route: RouteResources) -> Iterator[Resource]:
    """All resources of one route."""
    yield from route.clusters.values()
    yield from route.assignments.values()
    yield route.virtual_host


def _shared(old: RouteResources, new: RouteResources) -> RouteResources:
    """`new`, with the objects of `old` where they are the same: a weight change copies nothing but the weights."""
    if old == new:
        return old
    return RouteResources(
        new.route,
        new.hosts,
        {name: _reused(old.clusters.get(name), r) for name, r in new.clusters.items()},
        {name: _reused(old.assignments.get(name), r) for name, r in new.assignments.items()},
        _reused(old.virtual_host, new.virtual_host),
    )


def _reused(old: Resource | None, new: Resource) -> Resource:
    return old if old is not None and old.digest == new.digest else new
