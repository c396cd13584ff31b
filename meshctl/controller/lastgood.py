"""Which routes of the run before stay in force although no manifest that can be read asks for them so. Pure.

A source keeps the last good version of an object while it runs; across a restart only the state file has it. A route
that is missing for a good reason (its manifest is gone and everything else reads well) is dropped; a route that may be
missing, or may have lost a profile, because of a problem in the input is kept as it was until the input is good again.
Rejected: dropping it, which would turn a typo plus a restart into an outage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from meshctl.model import DesiredRoute, Problem, RouteId
from meshctl.ports import Desired


def with_last_good(desired: Desired, saved: Mapping[RouteId, DesiredRoute]) -> Desired:
    """`desired` with the routes of `saved` that a problem may be hiding, each with a Problem that says so.

    Returns `desired` itself when there are none; a route that is kept is the very object of `saved`.
    """
    kept: dict[RouteId, DesiredRoute] = {}
    problems = []
    for route_id, before in sorted(saved.items()):
        if not _weaker(desired.routes.get(route_id), before):
            continue
        hiding = next((p for p in desired.problems if p.route in (None, route_id)), None)
        if hiding is None:
            continue
        kept[route_id] = before
        message = f"served as before the restart, because of a manifest that can't be used: {hiding.where}"
        problems.append(Problem(f"route {route_id}", message, route_id))
    if not kept:
        return desired
    return Desired({**desired.routes, **kept}, (*desired.problems, *problems))


def _weaker(now: DesiredRoute | None, before: DesiredRoute) -> bool:
    """`now` is `before` less what other files would add: everything, or some profiles."""
    if now is None:
        return True
    spec = dataclasses.replace(now.spec, generation=before.spec.generation)
    return (spec, now.endpoints) == (before.spec, before.endpoints) and now.profiles.items() < before.profiles.items()
