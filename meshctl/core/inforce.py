"""Taking over what the mesh serves already: after a restart, and for as long as another replica leads. Pure.

What is in force is read back from the mesh, so neither a restart nor a fail-over moves a weight: the decision goes on
from the table that is live, and leaves it only for one that is worth moving to (`weights.solve` with a warm start).
Invariant: a leader's own memory is never overruled. Rejected: replicas that hand their memory over through a shared
object (a write per tick, for estimates that any replica has within seconds), and followers that decide on their own
(two replicas' estimates differ, and a fail-over would move every route a little).
"""

from __future__ import annotations

import dataclasses

from meshctl.core import guard
from meshctl.core.memory import RouteMemory, Solved
from meshctl.model import DEFAULT_CLASS, WEIGHT_TOTAL, DesiredRoute, Weights

IN_FORCE = "in force"
"""Key of a table that nobody here solved; no fleet's key equals it. Its attainment is not known until evaluated."""


def adopted(
    before: RouteMemory, route: DesiredRoute, live: Weights | None, now_s: float, *, leads: bool
) -> RouteMemory:
    """`before` with the table `live` in force; `before` itself when it leads already, or has that table."""
    if live is None or (leads and before.current):
        return before
    if before.plan is not None and _same(before.plan.weights, live):
        return before
    names = (*(c.name for c in route.spec.sizes), DEFAULT_CLASS)
    everyone = [e.id for e in route.endpoints]
    rows = {n: {e: live[n].get(e, 0) / WEIGHT_TOTAL for e in everyone} for n in names if n in live}
    current = {n: guard.normalised(row) for n, row in rows.items() if sum(row.values()) > 0}
    if not current:
        return before
    # only a whole table can be aimed at; a class that is missing takes the solver's row
    solved = Solved(IN_FORCE, {}, current, {}, {}) if current.keys() == set(names) else before.solved
    return dataclasses.replace(before, current=current, solved=solved, stepped_s=now_s, shifting=False, due_s=now_s)


def _same(weights: Weights, live: Weights) -> bool:
    """Endpoints that one of them leaves out have weight 0."""
    if weights.keys() != live.keys():
        return False
    return all(
        {e: w for e, w in row.items() if w} == {e: w for e, w in live[n].items() if w} for n, row in weights.items()
    )
