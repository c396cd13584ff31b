"""Objects -> desired routes: what takes several objects to see.

Decides which profile serves a route (same namespace, same model, by GPU product) and who gets a host that two routes
want: the first by id, whatever was written first, so that two readers of the same objects agree.
Invariant: a DesiredRoute that did not change is the SAME object as before, and only then keeps its generation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshctl.api.document import Fault, Severity
from meshctl.api.modelprofile import ModelProfile
from meshctl.api.modelroute import ModelRoute
from meshctl.api.objects import Declared, Key
from meshctl.model import DesiredRoute, RouteId, RouteSpec, ServiceProfile


@dataclass(frozen=True, slots=True)
class Resolved:
    """Routes by id, sorted, and what is wrong between objects."""

    routes: Mapping[RouteId, DesiredRoute]
    faults: tuple[Fault, ...]


def resolve(objects: Mapping[Key, Declared], previous: Mapping[RouteId, DesiredRoute]) -> Resolved:
    """The routes that `objects` ask for; equal ones are taken from `previous`."""
    ordered = [objects[key] for key in sorted(objects)]
    profiles, faults = _profiles(ordered)
    routes: dict[RouteId, DesiredRoute] = {}
    owners: dict[str, RouteId] = {}
    for declared in ordered:
        route = declared.value
        if not isinstance(route, ModelRoute):
            continue
        hosts, taken = _free_hosts(declared, route, owners)
        faults += taken
        if not hosts:
            continue
        namespace, model = route.metadata.namespace, route.spec.model
        endpoints = route.endpoints()
        products = sorted({endpoint.gpu for endpoint in endpoints})
        found = {gpu: profiles[namespace, model, gpu] for gpu in products if (namespace, model, gpu) in profiles}
        faults += _without_profile(declared, model, [gpu for gpu in products if gpu not in found])
        spec = dataclasses.replace(route.route_spec(), hosts=hosts)
        routes[route.id] = _kept(DesiredRoute(spec, endpoints, found), previous.get(route.id))
    return Resolved(routes, tuple(faults))


def _profiles(ordered: Iterable[Declared]) -> tuple[dict[tuple[str, str, str], ServiceProfile], list[Fault]]:
    found: dict[tuple[str, str, str], ServiceProfile] = {}
    owners: dict[tuple[str, str, str], Declared] = {}
    faults: list[Fault] = []
    for declared in ordered:
        profile = declared.value
        if not isinstance(profile, ModelProfile):
            continue
        slot = (profile.metadata.namespace, profile.spec.model, profile.spec.gpu)
        if slot in owners:
            owner = owners[slot]
            what = f"{owner.key} ({owner.place}) already describes model {slot[1]} on {slot[2]}, and is used"
            faults.append(declared.fault("spec", f"{what}; remove one of the two"))
            continue
        owners[slot] = declared
        found[slot] = profile.spec.service.profile()
    return found, faults


def _free_hosts(
    declared: Declared, route: ModelRoute, owners: dict[str, RouteId]
) -> tuple[tuple[str, ...], list[Fault]]:
    """The route's hosts that no route before it has (these are now its own), and a fault for each that one has."""
    free = tuple(host for host in route.spec.hosts if host not in owners)
    faults = [
        declared.fault(
            f"spec.hosts[{index}]",
            f"{host!r} is served by ModelRoute {owners[host]}, which comes first by name; "
            + ("choose other hosts" if free else "this route serves nothing until it has a host of its own"),
        )
        for index, host in enumerate(route.spec.hosts)
        if host in owners
    ]
    owners.update(dict.fromkeys(free, route.id))
    return free, faults


def _without_profile(declared: Declared, model: str, products: list[str]) -> list[Fault]:
    return [
        dataclasses.replace(
            declared.fault(
                "spec.backend.endpoints",
                f"no ModelProfile for model {model} on {gpu}: a prior is used until times are observed; add one",
            ),
            severity=Severity.WARNING,
        )
        for gpu in products
    ]


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
