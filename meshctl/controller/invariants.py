"""What must hold of every plan before it is published, whoever made it. Pure.

A route that breaks one keeps what was published of it before (`safe_plan`); the others go on. So a bug in a policy
costs a route its newest weights, never its traffic, and never another route's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from meshctl.model import DEFAULT_CLASS, WEIGHT_TOTAL, Plan, Problem, RouteId, RoutePlan


def violations(plan: RoutePlan) -> Iterator[str]:
    """Each broken invariant of `plan`, with both sides of it."""
    expected_sizes = {size.name for size in plan.route.spec.sizes} | {DEFAULT_CLASS}
    if plan.weights.keys() != expected_sizes:
        yield f"weights are given for the sizes {sorted(plan.weights)}, not for {sorted(expected_sizes)}"
    expected_ids = {endpoint.id for endpoint in plan.route.endpoints}
    for size, table in sorted(plan.weights.items()):
        if table.keys() != expected_ids:
            yield f"size {size} names the endpoints {sorted(table)}, not {sorted(expected_ids)}"
        if any(not isinstance(weight, int) or weight < 0 for weight in table.values()):
            yield f"size {size} has a weight that is not a whole number of at least 0: {dict(table)}"
        elif sum(table.values()) not in ({WEIGHT_TOTAL} if expected_ids else {0}):
            yield f"size {size} has weights that sum to {sum(table.values())}, not {WEIGHT_TOTAL}"
    numbers = {"load_rps": plan.load_rps}
    numbers |= {f"attainment of {size}": value for size, value in plan.attainment.items()}
    numbers |= {f"utilisation of {endpoint}": value for endpoint, value in plan.utilization.items()}
    for name, value in sorted(numbers.items()):
        if not math.isfinite(value):
            yield f"{name} is {value}"


def safe_plan(new: Plan, before: Plan) -> tuple[Plan, tuple[Problem, ...]]:
    """`new`, where each route that breaks an invariant is as it was in `before` (left out when it is new).

    A RoutePlan that is the same object as before was checked before: unchanged routes cost one comparison each.
    """
    routes: dict[RouteId, RoutePlan] = {}
    problems = []
    for route_id, plan in new.routes.items():
        last = before.routes.get(route_id)
        broken = [] if plan is last else list(violations(plan))
        if not broken:
            routes[route_id] = plan
            continue
        kept = "its last published weights stay" if last is not None else "it is not published"
        message = f"the decision breaks an invariant: {'; '.join(broken)}; {kept}; please report this as a bug"
        problems.append(Problem(f"route {route_id}", message, route_id))
        if last is not None:
            routes[route_id] = last
    return Plan(routes) if problems else new, tuple(problems)
