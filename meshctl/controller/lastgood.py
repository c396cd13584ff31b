"""Which routes of the run before stay in force although no manifest that can be read asks for them. Pure.

A source keeps the last good version of an object while it runs; across a restart only the state file has it. A route
that is missing for a good reason (its manifest is gone and everything else reads well) is dropped; a route that may be
missing because of a problem in the input is kept until the input is good again. Rejected: dropping it, which would turn
a typo plus a restart into an outage.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshctl.model import DesiredRoute, Problem, RouteId
from meshctl.ports import Desired


def with_last_good(desired: Desired, saved: Mapping[RouteId, DesiredRoute]) -> Desired:
    """`desired` and the routes of `saved` that a problem may be hiding, each with a Problem that says so.

    Returns `desired` itself when there are none.
    """
    kept: dict[RouteId, DesiredRoute] = {}
    problems = []
    for route_id in sorted(saved.keys() - desired.routes.keys()):
        hiding = next((p for p in desired.problems if p.route in (None, route_id)), None)
        if hiding is None:
            continue
        kept[route_id] = saved[route_id]
        message = (
            f"served as before the restart, because its manifest may be the one that can't be used: {hiding.where}"
        )
        problems.append(Problem(f"route {route_id}", message, route_id))
    if not kept:
        return desired
    return Desired({**desired.routes, **kept}, (*desired.problems, *problems))
