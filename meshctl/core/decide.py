"""decide(snapshot, memory, now) -> (Plan, Memory): the one place where traffic is decided. Pure.

For each route: look (update what is believed of demand, speeds and health), solve (when what was solved for no longer
holds), guard (how far to move now), explain. Invariants, for every input: each size class's weights sum to
WEIGHT_TOTAL and name every endpoint; a route whose decision stays keeps the SAME RoutePlan object, and with the same
inputs costs a dictionary look-up; the same arguments give the same result.

What is believed is in `look`, which table to aim at in `solving`; here is how the two become weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshctl.core import guard
from meshctl.core.capacity import Speed
from meshctl.core.health import State
from meshctl.core.inforce import adopted
from meshctl.core.look import RECHECK_S, Look, anything_fresh, due_s, look_at
from meshctl.core.memory import Memory, RouteMemory, Solved
from meshctl.core.solving import INTERIM, SOLVES, Budget, solve
from meshctl.model import (
    DEFAULT_CLASS,
    NO_SIGNALS,
    DesiredRoute,
    Input,
    LbPolicy,
    LoadBalancer,
    Plan,
    Policy,
    Reason,
    ReasonCode,
    RouteId,
    RoutePlan,
    RouteSignals,
    Snapshot,
)

__all__ = ["Memory", "decide"]

_UNSERVED = frozenset({ReasonCode.INFEASIBLE, ReasonCode.NO_ENDPOINTS})
_SPEED = Speed()


def decide(snapshot: Snapshot, memory: Memory, now_s: float) -> tuple[Plan, Memory]:
    """Weights for every route of `snapshot`. Never raises on bad signals: they become Reasons."""
    decided: dict[RouteId, tuple[RouteMemory, RoutePlan]] = {}
    gateways = max(1, snapshot.gateways)
    budget = Budget(SOLVES)
    for route_id in sorted(snapshot.routes, key=lambda r: _waits(memory.routes.get(r, _NEW)), reverse=True):
        route, live = snapshot.routes[route_id], snapshot.in_force.get(route_id)
        before = adopted(memory.routes.get(route_id, _NEW), route, live, now_s, leads=snapshot.leading)
        follows = live is not None and not snapshot.leading
        signals = snapshot.signals.get(route_id, NO_SIGNALS)
        after, inputs = before, (gateways, follows)
        if not (
            before.route is route
            and before.signals is signals
            and (before.gateways, before.follows) == inputs
            and now_s < before.due_s
            and not (before.waits and budget.left > 0)
        ):
            after = _decide_route(route, signals, inputs, before, now_s, budget)
        if after.plan is None:
            raise AssertionError(f"{route_id}: decided nothing")
        decided[route_id] = after, after.plan
    ordered = [(route_id, *decided[route_id]) for route_id in snapshot.routes]
    return Plan({r: plan for r, _, plan in ordered}), Memory({r: after for r, after, _ in ordered})


_NEW = RouteMemory()


def _waits(before: RouteMemory) -> bool:
    """It had no turn at the solver: it comes first, so that routes which change all the time starve nobody."""
    return before.solved is not None and before.solved.key == INTERIM


def _hold(route: DesiredRoute, before: RouteMemory, *, follows: bool) -> Reason | None:
    """Why the weights stay as they are, whatever is seen; None when they may move."""
    if follows:
        return Reason(ReasonCode.FOLLOWING, str(route.spec.id), "another replica leads: what it put in force is kept")
    if route.spec.suspend and before.current:
        return Reason(ReasonCode.SUSPENDED, str(route.spec.id), "spec.suspend: weights stay as they are")
    return None


def _decide_route(
    route: DesiredRoute,
    signals: RouteSignals,
    inputs: tuple[int, bool],
    before: RouteMemory,
    now_s: float,
    budget: Budget,
) -> RouteMemory:
    """`inputs`: how many proxies there are, and whether another replica leads."""
    gateways, follows = inputs
    hold = _hold(route, before, follows=follows)
    look = look_at(route, signals, before, now_s)
    solved, reasons = solve(look, gateways, before, budget, now_s, suspended=hold is not None)
    move = _move(look, solved, before, now_s, hold)
    plan = _plan(look, solved, move.table, before, (*reasons, *move.reasons, *look.reasons))
    settled = guard.largest_change(move.table, solved.target) <= route.spec.guard.dead_band_ratio
    calm = settled and all(h.state is State.HEALTHY and h.stuck_since_s is None for h in look.health.values())
    return RouteMemory(
        current=move.table,
        solved=solved,
        stepped_s=now_s if move.moved else before.stepped_s,
        shifting=move.shifting,
        speeds=look.speeds,
        health=look.health,
        arrivals=look.arrivals,
        observed=before.observed or anything_fresh(signals, route, now_s),
        route=route,
        signals=signals,
        gateways=gateways,
        follows=follows,
        due_s=due_s(look, signals, now_s) if calm or look.frozen else now_s + RECHECK_S,
        waits=calm and solved.key == INTERIM and hold is None and not look.frozen,
        plan=plan,
    )


# ------------------------------------------------------------------------------------------------------------ guard


@dataclass(frozen=True, slots=True)
class _Move:
    """The shares to put in force now, and what held them back."""

    table: guard.Table
    moved: bool
    reasons: tuple[Reason, ...] = ()
    shifting: bool = False


def _move(look: Look, solved: Solved, before: RouteMemory, now_s: float, hold: Reason | None) -> _Move:
    spec, target = look.route.spec, solved.target
    if not before.current or not look.usable:
        return _Move(target, moved=before.current != target)
    now = _repaired(look, before, target)
    repaired = guard.distance(now, before.current) > 1e-9
    subject = str(spec.id)
    if hold is not None:
        return _Move(now, repaired, (hold,))
    # blind: also in mid-shift, and after a restart until the first signals; or just restarted, when all that may be
    # put in force is what was, however long the restart took
    if look.frozen or before.plan is None:
        return _Move(now, repaired, shifting=before.shifting)
    apart = guard.largest_change(now, target)
    going_on = before.shifting and before.solved is not None and before.solved.target is target
    if not going_on and apart <= spec.guard.dead_band_ratio:
        inputs = (
            Input("largest change wanted", apart, "ratio"),
            Input("dead band", spec.guard.dead_band_ratio, "ratio"),
        )
        held = (Reason(ReasonCode.DEAD_BAND, subject, "the rest is within it", inputs),) if apart > 1e-9 else ()
        return _Move(now, repaired, held)
    rested = now_s - before.stepped_s
    limited = Reason(
        ReasonCode.STEP_LIMITED,
        subject,
        "on its way to the table, a step at a time",
        (Input("largest step", spec.guard.max_step_ratio, "ratio"),),
    )
    if going_on and rested < RECHECK_S / 2:
        return _Move(now, repaired, (limited,), shifting=True)
    if not (repaired or going_on or _urgent(look, before)) and rested < spec.guard.dwell_s:
        inputs = (Input("since the last move", rested, "s"), Input("dwell", spec.guard.dwell_s, "s"))
        return _Move(now, repaired, (Reason(ReasonCode.DWELL, subject, "moved a moment ago", inputs),))
    table, cut = guard.step(now, target, spec.guard.max_step_ratio)
    return _Move(table, moved=True, reasons=(limited,) if cut else (), shifting=cut)


def _repaired(look: Look, before: RouteMemory, target: guard.Table) -> guard.Table:
    """What is in force, less what must not get traffic: no guard holds that back. A size class that is new, or has
    nobody left to go to, takes its target at once."""
    rows = {n: before.current.get(n, {}) for n in target}
    aims = {n: row if any(row.get(e.id, 0.0) > 0 for e in look.usable) else target[n] for n, row in rows.items()}
    # the target too: a table that is held (suspended, frozen) may name whom it must not
    return guard.restrict(aims, frozenset(e.id for e in look.usable), tuple(e.id for e in look.route.endpoints))


def _urgent(look: Look, before: RouteMemory) -> bool:
    """Some endpoint became slower, or there are other endpoints than before."""
    slower = any(s.slowdown > before.speeds.get(e, _SPEED).slowdown for e, s in look.speeds.items())
    return slower or set(look.speeds) != set(before.speeds)


# ------------------------------------------------------------------------------------------------------------- plan


def _balancer(policy: Policy, endpoints: int) -> LoadBalancer:
    match policy:
        case Policy.ROUND_ROBIN:
            return LoadBalancer(LbPolicy.ROUND_ROBIN)
        case Policy.LEAST_REQUEST:
            return LoadBalancer(choice_count=max(2, endpoints))
        case _:
            return LoadBalancer()


def _plan(
    look: Look,
    solved: Solved,
    current: guard.Table,
    before: RouteMemory,
    reasons: tuple[Reason, ...],
) -> RoutePlan:
    spec = look.route.spec
    walk = spec.policy not in (Policy.LEAST_REQUEST, Policy.ROUND_ROBIN)
    sized = [n for n in solved.attainment if n != DEFAULT_CLASS]
    plan = RoutePlan(
        route=look.route,
        weights={n: guard.integers(row, walk=walk) for n, row in current.items()},
        load_balancer=_balancer(spec.policy, len(look.route.endpoints)),
        attainment=solved.attainment,
        utilization=solved.utilization,
        load_rps=sum(solved.rates.values()),
        feasible=bool(sized) and not any(r.code in _UNSERVED for r in reasons),
        drained=frozenset(e for e, h in look.health.items() if h.state is State.DRAINED),
        reasons=reasons,
    )
    old = before.plan
    if old is not None and _same(old, plan):
        return old
    return plan


def _same(a: RoutePlan, b: RoutePlan) -> bool:
    """Nothing that anybody acts on differs; the numbers inside the reasons may."""
    return a.weights == b.weights and replace(a, weights={}, reasons=_codes(a)) == replace(
        b, weights={}, reasons=_codes(b)
    )


def _codes(plan: RoutePlan) -> tuple[Reason, ...]:
    return tuple(Reason(r.code, r.subject, "") for r in plan.reasons)
