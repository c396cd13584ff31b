"""A consistent snapshot: everything published at one instant, with the versions that name it. Pure.

Invariant (`check`, run before each publish): every cluster a virtual host names exists and has its load assignment,
every load assignment has its cluster, names and domains are unique, and a load assignment with endpoints has weights
Envoy accepts. What is inconsistent is an error and is never published; the last good snapshot stays.

A version is a content hash: the sum, modulo 2**128, of the resources' digests. A sum needs no order, and the version of
any SUBSET of the resources (what one proxy subscribed to) comes from the same digests. Counters were rejected: after a
restart the same content must have the same version, so that a reconnecting proxy is sent nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from meshctl.errors import MeshctlError
from meshctl.model import Problem
from xds.translate import Resource, RouteResources, claim_hosts, route_configuration, with_domains


class InconsistentError(MeshctlError):
    """Resources that name what does not exist. They were not published; this is a bug of the translation."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What proxies are sent. By name; mappings are never changed after the snapshot is made."""

    clusters: Mapping[str, Resource]
    assignments: Mapping[str, Resource]
    virtual_hosts: Mapping[str, Resource]
    retired: Mapping[str, Resource]
    """Clusters published not long ago: a proxy that reconnects may still route to them until it has new routes."""
    retired_assignments: Mapping[str, Resource]
    """Theirs: a proxy that was sent a cluster just before it went waits for its endpoints, and answers nothing else."""
    problems: tuple[Problem, ...] = ()
    """Hosts claimed twice."""
    clusters_version: str = ""
    routes_version: str = ""
    version: str = ""
    """Of all of it."""
    _bodies: dict[str, bytes] = field(default_factory=dict, compare=False)

    def clusters_body(self) -> bytes:
        """The clusters as they stand in a response, joined once for all proxies."""
        if "clusters" not in self._bodies:
            self._bodies["clusters"] = body_of(self.clusters.values())
        return self._bodies["clusters"]

    def routes_body(self) -> bytes:
        """The RouteConfiguration as it stands in a response, joined once for all proxies."""
        if "routes" not in self._bodies:
            self._bodies["routes"] = route_configuration(self.virtual_hosts.values())
        return self._bodies["routes"]


EMPTY: Mapping[str, Resource] = {}


def version_of(resources: Iterable[Resource]) -> str:
    """The content hash of a set of resources; independent of their order."""
    return f"{sum(r.digest for r in resources) % 2**128:032x}"


def body_of(resources: Iterable[Resource]) -> bytes:
    """Resources as they stand in a response."""
    return b"".join(r.packed for r in resources)


def build(
    routes: Iterable[RouteResources],
    retired: Mapping[str, Resource] = EMPTY,
    retired_assignments: Mapping[str, Resource] = EMPTY,
) -> Snapshot:
    """The checked snapshot of `routes`, and what was published before. Raises InconsistentError."""
    ordered = sorted(routes, key=lambda r: r.route)
    domains, problems = claim_hosts(ordered)
    clusters: dict[str, Resource] = {}
    assignments: dict[str, Resource] = {}
    for route in ordered:
        _merge(clusters, route.clusters, "cluster")
        _merge(assignments, route.assignments, "load assignment")
    hosts = {r.virtual_host.name: with_domains(r.virtual_host, domains[r.route]) for r in ordered if r.route in domains}
    snapshot = Snapshot(
        clusters,
        assignments,
        hosts,
        {name: resource for name, resource in retired.items() if name not in clusters},
        {name: resource for name, resource in retired_assignments.items() if name not in clusters},
        problems,
        clusters_version=version_of(clusters.values()),
        routes_version=version_of(hosts.values()),
        version=version_of((*clusters.values(), *assignments.values(), *hosts.values())),
    )
    check(snapshot)
    return snapshot


def _merge(into: dict[str, Resource], more: Mapping[str, Resource], kind: str) -> None:
    for name, resource in more.items():
        if name in into:
            raise InconsistentError(f"{kind} {name!r} is claimed by {into[name].route} and by {resource.route}")
        into[name] = resource


def check(snapshot: Snapshot) -> None:
    """Raises InconsistentError, naming the first thing that is wrong."""
    for host in snapshot.virtual_hosts.values():
        missing = [name for name in host.needs if name not in snapshot.clusters]
        if missing:
            raise InconsistentError(f"virtual host {host.name!r} names clusters that do not exist: {missing}")
    difference = sorted(snapshot.clusters.keys() ^ snapshot.assignments.keys())
    if difference:
        raise InconsistentError(f"clusters without load assignment, or the reverse: {difference[:5]}")
    for assignment in snapshot.assignments.values():
        weights = assignment.weights
        if weights and (min(weights) < 1 or sum(weights) >= 2**32):
            raise InconsistentError(f"load assignment {assignment.name!r} has weights Envoy refuses: {weights}")


def changed(old: Snapshot | None, new: Snapshot) -> int:
    """How many resources differ: clusters, load assignments, and the one RouteConfiguration."""
    if old is None:
        return len(new.clusters) + len(new.assignments) + 1
    count = _differences(old.clusters, new.clusters) + _differences(old.assignments, new.assignments)
    return count + bool(_differences(old.virtual_hosts, new.virtual_hosts))


def _differences(old: Mapping[str, Resource], new: Mapping[str, Resource]) -> int:
    gone = sum(1 for name in old if name not in new)
    return gone + sum(1 for name, r in new.items() if name not in old or old[name].digest != r.digest)
