"""Objects -> desired routes: what takes several objects to see.

Decides which servers a route has (static ones, or those found behind its Service), which profile serves it (same
namespace, same model, by GPU product) and who gets a host that two routes want on the same gateway, or for the same
group of proxies: the first by id, whatever was written first, so that two readers of the same objects agree. Routes
that Git's own VirtualService delegates to want no hosts, so they never collide.
Invariant: a DesiredRoute that did not change is the SAME object as before, and only then keeps its generation.

A `Resolver` remembers what each route was made from, and looks again only at routes of which a part is another object
now: of 1000 routes with 10 endpoints each, a pod that changes costs a walk over 1000 identities. Rejected: telling it
which objects changed (whoever forgets one serves the past).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from meshctl.api.document import Fault, Severity
from meshctl.api.modelprofile import ModelProfile
from meshctl.api.modelroute import ModelRoute
from meshctl.api.objects import Declared, Key
from meshctl.model import PROXY_GROUP, DesiredRoute, Endpoint, RouteId, RouteSpec, ServiceProfile

Slot = tuple[str, str, str]
"""Namespace, model, GPU product."""


class ServiceRef(NamedTuple):
    """What a route says of the Service that answers it."""

    namespace: str
    name: str
    port: int | str
    metrics_port: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class Servers:
    """What was found behind a Service."""

    endpoints: tuple[Endpoint, ...] = ()
    """Ordered by id."""
    remarks: tuple[str, ...] = ()
    """What is wrong, and what to do."""


Backends = Callable[[ServiceRef], Servers]
"""The servers behind a Service: the SAME object as long as nothing changed."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Routes by id, sorted, and what is wrong between objects."""

    routes: Mapping[RouteId, DesiredRoute]
    faults: tuple[Fault, ...]


def resolve(objects: Mapping[Key, Declared], previous: Mapping[RouteId, DesiredRoute]) -> Resolved:
    """The routes that `objects` ask for, without a cluster: Services have no servers. Equal ones are of `previous`."""
    return Resolver(previous).resolve(objects)


@dataclass(frozen=True, slots=True)
class _Claim:
    """A route that has a host, or needs none."""

    declared: Declared
    spec: RouteSpec
    """With the hosts that it got."""
    service: ServiceRef | None
    static: Servers

    def with_hosts(self, hosts: tuple[str, ...]) -> _Claim:
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, hosts=hosts))


@dataclass(frozen=True, slots=True)
class _Survey:
    """What can be said of the objects without looking for servers."""

    objects: Mapping[Key, Declared] = field(default_factory=dict)
    claims: Mapping[RouteId, _Claim] = field(default_factory=dict)
    """Ordered by id."""
    profiles: Mapping[Slot, ServiceProfile] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """A route, and what it was made from."""

    claim: _Claim
    servers: Servers
    profiles: Mapping[Slot, ServiceProfile]
    route: DesiredRoute
    faults: tuple[Fault, ...]


def _nowhere(_: ServiceRef) -> Servers:
    return _NOBODY


_NOBODY = Servers()


class Resolver:
    """Resolves again and again. The mappings it is given must not change; others are given instead."""

    def __init__(self, previous: Mapping[RouteId, DesiredRoute] | None = None) -> None:
        self._routes = previous or {}
        self._survey = _Survey()
        self._parts: dict[RouteId, _Part] = {}

    @property
    def services(self) -> frozenset[ServiceRef]:
        """What was asked of `backends` at the last call."""
        return frozenset(claim.service for claim in self._survey.claims.values() if claim.service is not None)

    def resolve(self, objects: Mapping[Key, Declared], backends: Backends = _nowhere) -> Resolved:
        """The routes that `objects` ask for now. What did not change is the same object as at the last call."""
        if objects is not self._survey.objects:
            self._survey = _survey(objects, self._survey)
        profiles, parts = self._survey.profiles, {}
        faults = list(self._survey.faults)
        for route_id, claim in self._survey.claims.items():
            servers = claim.static if claim.service is None else backends(claim.service)
            part = self._parts.get(route_id)
            if part is None or part.servers is not servers or part.claim is not claim or part.profiles is not profiles:
                part = _part(claim, servers, profiles, self._routes.get(route_id))
            parts[route_id] = part
            faults += part.faults
        self._parts = parts
        self._routes = {route_id: part.route for route_id, part in parts.items()}
        return Resolved(self._routes, tuple(faults))


# ------------------------------------------------------------------------------------------------ what is asked for


def _survey(objects: Mapping[Key, Declared], before: _Survey) -> _Survey:
    ordered = [objects[key] for key in sorted(objects, key=lambda key: (_created(objects[key]), key))]
    profiles, faults = _profiles(ordered)
    claims: dict[RouteId, _Claim] = {}
    owners: dict[tuple[str, str], Declared] = {}
    for declared in ordered:
        route = declared.value
        if not isinstance(route, ModelRoute):
            continue
        known = before.claims.get(route.id)
        claim = known if known is not None and known.declared is declared else _claim(declared, route)
        hosts, taken = _free_hosts(declared, route.spec.hosts, claim.spec, owners)
        faults += taken
        if hosts:
            claims[route.id] = claim if hosts == claim.spec.hosts else claim.with_hosts(hosts)
    claims = {route_id: claims[route_id] for route_id in sorted(claims)}
    return _Survey(objects, claims, before.profiles if profiles == before.profiles else profiles, tuple(faults))


def _created(declared: Declared) -> str:
    """What is oldest goes first, so that no new object takes anything from one that is in use; files have no age."""
    return declared.value.metadata.creation_timestamp


def _claim(declared: Declared, route: ModelRoute) -> _Claim:
    service = route.spec.backend.service
    if service is None:
        return _Claim(declared, route.route_spec(), None, Servers(route.endpoints()))
    namespace = route.metadata.namespace
    ref = ServiceRef(namespace, service.name, service.port, service.metrics_port, service.concurrency)
    return _Claim(declared, route.route_spec(), ref, _NOBODY)


def _profiles(ordered: Iterable[Declared]) -> tuple[dict[Slot, ServiceProfile], list[Fault]]:
    found: dict[Slot, ServiceProfile] = {}
    owners: dict[Slot, Declared] = {}
    faults: list[Fault] = []
    for declared in ordered:
        profile = declared.value
        if not isinstance(profile, ModelProfile):
            continue
        slot = (profile.metadata.namespace, profile.spec.model, profile.spec.gpu)
        if slot in owners:
            what = f"{_named(owners[slot])} already describes model {slot[1]} on {slot[2]}, and is used"
            faults.append(declared.fault("spec", f"{what}; remove one of the two"))
            continue
        owners[slot] = declared
        found[slot] = profile.spec.service.profile()
    return found, faults


def _named(declared: Declared) -> str:
    """The object, and where it stands if that is elsewhere."""
    name, place = str(declared.key), str(declared.place)
    return name if place == name else f"{name} ({place})"


def _free_hosts(
    declared: Declared, wanted: tuple[str, ...], spec: RouteSpec, owners: dict[tuple[str, str], Declared]
) -> tuple[tuple[str, ...], list[Fault]]:
    """The hosts that no route before it has where it wants them (these are now its own), and a fault for each that
    one has."""
    if spec.delegate:
        return wanted, []
    places = _places(spec)
    taken: dict[str, tuple[str, Declared]] = {}
    for place, host in itertools.product(places, wanted):
        if (place, host) in owners:
            taken.setdefault(host, (place, owners[place, host]))
    free = tuple(host for host in wanted if host not in taken)
    faults = [
        declared.fault(
            f"spec.hosts[{index}]",
            f"{host!r} is served by {taken[host][1].key}{taken[host][0]}"
            f", which {'comes first by name' if _created(taken[host][1]) == _created(declared) else 'is older'}; "
            + ("choose other hosts" if free else "this route serves nothing until it has a host of its own"),
        )
        for index, host in enumerate(wanted)
        if host in taken
    ]
    owners.update({(place, host): declared for place in places for host in free})
    return free, faults


def _places(spec: RouteSpec) -> tuple[str, ...]:
    """Where a host belongs to one route only, in the words of a fault: on each gateway, or, for a route outside of the
    mesh, for each group of our own proxies."""
    if spec.gateways:
        return tuple(f" on gateway {gateway}" for gateway in spec.gateways)
    return tuple("" if group == PROXY_GROUP else f" for proxy group {group}" for group in spec.proxy_groups)


# ----------------------------------------------------------------------------------------------- what is made of it


def _part(
    claim: _Claim, servers: Servers, profiles: Mapping[Slot, ServiceProfile], before: DesiredRoute | None
) -> _Part:
    namespace, model = claim.declared.key.namespace, claim.spec.model
    products = sorted({endpoint.gpu for endpoint in servers.endpoints} - {""})
    found = {gpu: profiles[namespace, model, gpu] for gpu in products if (namespace, model, gpu) in profiles}
    where = "spec.backend.endpoints" if claim.service is None else "spec.backend.service"
    remarks = [
        *servers.remarks,
        *(
            f"no ModelProfile for model {model} on {gpu}: a prior is used until times are observed; add one"
            for gpu in products
            if gpu not in found
        ),
    ]
    faults = tuple(
        dataclasses.replace(claim.declared.fault(where, remark), severity=Severity.WARNING) for remark in remarks
    )
    return _Part(claim, servers, profiles, _kept(DesiredRoute(claim.spec, servers.endpoints, found), before), faults)


def _kept(new: DesiredRoute, old: DesiredRoute | None) -> DesiredRoute:
    """`old` itself where nothing changed; else `new`, one generation on where the spec or the endpoints changed."""
    if old is None:
        return new
    generation = old.spec.generation
    same = dataclasses.replace(new, spec=_at(new.spec, generation))
    if same == old:
        return old
    changed = (same.spec, same.endpoints) != (old.spec, old.endpoints)
    return dataclasses.replace(new, spec=_at(new.spec, generation + 1)) if changed else same


def _at(spec: RouteSpec, generation: int) -> RouteSpec:
    return dataclasses.replace(spec, generation=generation)
