"""decide(snapshot, memory, now) -> (Plan, Memory): the one place where traffic is decided. Pure.

For each route: look (update what is believed of demand, speeds and health), solve (when what was solved for no longer
holds), guard (how far to move now), explain. Invariants, for every input: each size class's weights sum to
WEIGHT_TOTAL and name every endpoint; a route whose decision stays keeps the SAME RoutePlan object, and with the same
inputs costs a dictionary look-up; the same arguments give the same result.

A route whose signals are ALL lost is frozen: what is in force stays, nothing decays (the observer is blind, not the
GPUs gone). One endpoint's loss is its own: held, then decayed to its profile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from meshctl.core import capacity, demand, guard, health, weights
from meshctl.core.capacity import Speed
from meshctl.core.health import Health, State
from meshctl.core.memory import Memory, RouteMemory, Solved
from meshctl.core.queueing import Array
from meshctl.model import (
    DEFAULT_CLASS,
    NO_SIGNALS,
    DesiredRoute,
    Endpoint,
    EndpointId,
    EndpointSignals,
    Input,
    LbPolicy,
    LoadBalancer,
    Plan,
    Policy,
    Reason,
    ReasonCode,
    RoutePlan,
    RouteSignals,
    ServiceProfile,
    SignalState,
    SizeClass,
    Snapshot,
)

__all__ = ["Memory", "decide"]

_RECHECK_S = 1.0
"""How soon to look again while something is under way (a shift, a rest, a decay)."""
_WORK_BAND = 0.04
"""The table is solved anew when demand moved by more than this part of the work."""
_PROBATION = 0.1
"""Part of its fair share that an endpoint on probation gets."""
_SOLVES = 25
"""Tables solved in one call, about 20 ms each from cold: a thousand new routes must not hold up everybody's tick. The
others start from equal utilisation, which is stable, and get their table in the next calls."""
_NOTHING = EndpointSignals()


def decide(snapshot: Snapshot, memory: Memory, now_s: float) -> tuple[Plan, Memory]:
    """Weights for every route of `snapshot`. Never raises on bad signals: they become Reasons."""
    plans, routes = {}, {}
    gateways = max(1, snapshot.gateways)
    budget = _Budget(_SOLVES)
    for route_id, route in snapshot.routes.items():
        before = memory.routes.get(route_id, _NEW)
        signals = snapshot.signals.get(route_id, NO_SIGNALS)
        after = before
        if not (
            before.route is route and before.signals is signals and before.gateways == gateways and now_s < before.due_s
        ):
            after = _decide_route(route, signals, gateways, before, now_s, budget)
        if after.plan is None:
            raise AssertionError(f"{route_id}: decided nothing")
        routes[route_id], plans[route_id] = after, after.plan
    return Plan(plans), Memory(routes)


_NEW = RouteMemory()


@dataclass(slots=True)
class _Budget:
    """Solves left in this call."""

    left: int

    def spend(self) -> bool:
        self.left -= 1
        return self.left >= 0


@dataclass(frozen=True, slots=True)
class _Look:
    """What is believed of a route at one instant."""

    route: DesiredRoute
    profiles: Mapping[EndpointId, ServiceProfile]
    speeds: Mapping[EndpointId, Speed]
    health: Mapping[EndpointId, Health]
    arrivals: demand.Arrivals
    usable: tuple[Endpoint, ...]
    """Endpoints that may get traffic, by id."""
    frozen: bool
    reasons: tuple[Reason, ...]


def _decide_route(
    route: DesiredRoute, signals: RouteSignals, gateways: int, before: RouteMemory, now_s: float, budget: _Budget
) -> RouteMemory:
    look = _look(route, signals, before, now_s)
    suspended = route.spec.suspend and bool(before.current)
    solved, reasons = _solve(look, gateways, before, budget, suspended=suspended)
    move = _move(look, solved, before, now_s, suspended=suspended)
    plan = _plan(look, solved, move.table, before, (*reasons, *move.reasons, *look.reasons))
    settled = move.table is solved.target or guard.distance(move.table, solved.target) < 1e-9
    calm = (
        settled
        and solved.key != _INTERIM
        and all(h.state is State.HEALTHY and h.stuck_since_s is None for h in look.health.values())
    )
    return RouteMemory(
        current=move.table,
        solved=solved,
        stepped_s=now_s if move.moved else before.stepped_s,
        shifting=move.shifting,
        speeds=look.speeds,
        health=look.health,
        arrivals=look.arrivals,
        observed=before.observed or _anything_fresh(signals, route, now_s),
        route=route,
        signals=signals,
        gateways=gateways,
        due_s=_due(look, signals, now_s) if calm or look.frozen else now_s + _RECHECK_S,
        plan=plan,
    )


# ------------------------------------------------------------------------------------------------------------- look


def _times(signals: RouteSignals, route: DesiredRoute) -> list[float]:
    """When the signals that freshness is judged by were measured."""
    of = [signals.endpoints.get(e.id, _NOTHING) for e in route.endpoints]
    judged = [s for x in of for s in (x.completed_rps, x.service_s, x.gpu_utilization_ratio, x.proxy_rps)]
    return [s.at_s for s in (*signals.arrivals_rps.values(), *judged) if s.at_s is not None]


def _anything_fresh(signals: RouteSignals, route: DesiredRoute, now_s: float) -> bool:
    stale = route.spec.guard.stale_after_s
    return any(now_s - at <= stale for at in _times(signals, route))


def _due(look: _Look, signals: RouteSignals, now_s: float) -> float:
    """When the first signal turns stale; nothing changes by itself before. A frozen route waits for signals."""
    if look.frozen:
        return math.inf
    stale = look.route.spec.guard.stale_after_s
    turns = [at + stale for at in _times(signals, look.route)]
    later = [t for t in turns if t >= now_s]
    if len(later) == len(turns):
        return min(later, default=math.inf) + 1e-6
    return now_s + _RECHECK_S


def _look(route: DesiredRoute, signals: RouteSignals, before: RouteMemory, now_s: float) -> _Look:
    spec = route.spec
    frozen = before.observed and not _anything_fresh(signals, route, now_s)
    held = frozen or (spec.suspend and bool(before.current))  # suspended: nobody is drained, nobody comes back
    profiles, speeds, states = {}, {}, {}
    reasons: list[Reason] = []
    for e in route.endpoints:
        of = signals.endpoints.get(e.id, _NOTHING)
        profiles[e.id], reason = capacity.profile_for(e, route.profiles)
        speed = capacity.update(before.speeds.get(e.id, _SPEED), profiles[e.id], of, spec.guard, now_s, frozen=frozen)
        longest = speed.slowdown * capacity.service_s(profiles[e.id], max(c.batch for c in spec.sizes))
        ill = before.health.get(e.id, _HEALTH)
        states[e.id] = ill if held else health.update(ill, e, of, spec.guard, longest, now_s)
        speeds[e.id] = speed
        reasons += [reason, *capacity.explain(e, speed, of, spec.guard, now_s), *_health_reasons(e, states[e.id])]
    arrivals = before.arrivals if frozen else demand.update(before.arrivals, signals, spec.guard)
    if frozen:
        reasons.insert(0, _frozen(route, signals))
    usable, why = _usable(route, states)
    return _Look(route, profiles, speeds, states, arrivals, usable, frozen, (*why, *reasons))


_SPEED, _HEALTH = Speed(), Health()


def _frozen(route: DesiredRoute, signals: RouteSignals) -> Reason:
    times = _times(signals, route)
    state = SignalState.STALE if times else SignalState.ABSENT
    inputs = (Input("newest signal", None, "", max(times, default=None), state),)
    return Reason(ReasonCode.FROZEN, str(route.spec.id), "every signal of the route is lost: all stays", inputs)


def _health_reasons(endpoint: Endpoint, state: Health) -> list[Reason]:
    if not endpoint.ready:
        return [Reason(ReasonCode.NOT_READY, endpoint.id, "not ready, or terminating: no new requests")]
    if state.state is State.DRAINED and state.reason is not None:
        return [state.reason]
    if state.state is State.PROBATION:
        inputs = (Input("part of its fair share", _PROBATION, "ratio"), Input("since", None, "", state.since_s))
        return [Reason(ReasonCode.PROBATION, endpoint.id, "was drained, is tried again", inputs)]
    return []


def _usable(route: DesiredRoute, states: Mapping[EndpointId, Health]) -> tuple[tuple[Endpoint, ...], list[Reason]]:
    """Ready and not drained; when that is nobody, everybody who is ready (a slow answer beats a refused one)."""
    ready = tuple(e for e in route.endpoints if e.ready)
    usable = tuple(e for e in ready if states[e.id].state is not State.DRAINED)
    subject = str(route.spec.id)
    if not ready:
        message = "no endpoint is ready" if route.endpoints else "no endpoints: add some to spec.backend"
        return (), [Reason(ReasonCode.NO_ENDPOINTS, subject, message)]
    if not usable:
        return ready, [Reason(ReasonCode.ALL_DRAINED, subject, "every endpoint fails: all are used rather than none")]
    return usable, []


# ------------------------------------------------------------------------------------------------------------ solve


_INTERIM = "interim"
"""Key of a table that was not solved for lack of time; no fleet's key equals it."""


def _solve(
    look: _Look, gateways: int, before: RouteMemory, budget: _Budget, *, suspended: bool
) -> tuple[Solved, tuple[Reason, ...]]:
    """The table to aim at, and why: the last one while what it was solved for holds."""
    spec, last = look.route.spec, before.solved
    names = (*(c.name for c in spec.sizes), DEFAULT_CLASS)
    if not look.usable:
        return Solved("", {}, {n: {e.id: 0.0 for e in look.route.endpoints} for n in names}, {}, {}), ()
    groups = _groups(look)
    fleet, kinds = _fleet(look, groups), _kinds(spec.sizes)
    asked = demand.forecast(spec, look.arrivals, fleet.capacity_rps(kinds[-1]))
    proxies = 1 << (gateways - 1).bit_length()  # the next power of two: a proxy more or less is no reason to move
    key = _key(look, groups, proxies)
    stay = suspended or look.frozen
    if last is not None and not (
        _names_fit(last, names, look)
        and (stay or (last.key == key and _work_moved(last, asked.rates, fleet, kinds) < _WORK_BAND))
    ):
        warm = _warm(last, names, groups) if last.key == key else None
        last = None
    else:
        warm = None
    if last is None:
        rates = np.array([asked.rates.get(n, 0.0) for n in names])
        wanted = weights.Demand(rates, kinds)
        if budget.spend():
            table = weights.solve(spec.policy, fleet, wanted, spec.slo_s, proxies, warm)
        else:
            table = weights.evaluate(fleet, wanted, spec.slo_s, proxies, weights.equal_mix(fleet, wanted))
            key = _INTERIM
        last = _spread(look, names, groups, table, key, asked.rates)
    return last, (*asked.reasons, _verdict(spec.policy, spec.percentile, last, proxies, known=asked.known))


def _key(look: _Look, groups: Mapping[tuple[str, int, float], tuple[EndpointId, ...]], proxies: int) -> str:
    """What a table was solved for, other than the demand."""
    spec = look.route.spec
    trial = sorted(e.id for e in look.usable if look.health[e.id].state is State.PROBATION)
    sizes = [(c.name, c.batch) for c in spec.sizes]
    return repr((spec.policy.value, spec.slo_s, proxies, sizes, sorted(groups.items()), trial))


def _groups(look: _Look) -> dict[tuple[str, int, float], tuple[EndpointId, ...]]:
    """Usable endpoints that the solver cannot tell apart: product, concurrency, slowdown."""
    groups: dict[tuple[str, int, float], list[EndpointId]] = {}
    for e in look.usable:
        groups.setdefault((e.gpu, e.concurrency, round(look.speeds[e.id].slowdown, 4)), []).append(e.id)
    return {key: tuple(groups[key]) for key in sorted(groups)}


def _fleet(look: _Look, groups: Mapping[tuple[str, int, float], tuple[EndpointId, ...]]) -> weights.Fleet:
    batches = [c.batch for c in look.route.spec.sizes]
    service = [
        [key[2] * capacity.service_s(look.profiles[members[0]], b) for b in batches] for key, members in groups.items()
    ]
    counts = [float(len(m)) for m in groups.values()]
    return weights.Fleet(np.array(service), np.array(counts), np.array([float(key[1]) for key in groups]))


def _kinds(sizes: tuple[SizeClass, ...]) -> Array:
    """(J, K): each size class is one kind, the default class the declared mix."""
    shares = np.array([c.share for c in sizes])
    return np.vstack([np.eye(len(sizes)), shares / shares.sum()])


def _names_fit(solved: Solved, names: tuple[str, ...], look: _Look) -> bool:
    everyone = {e.id for e in look.route.endpoints}
    return set(solved.target) == set(names) and all(set(row) == everyone for row in solved.target.values())


def _work_moved(last: Solved, rates: Mapping[str, float], fleet: weights.Fleet, kinds: Array) -> float:
    """How much of the work (requests times their mean service time) is other than what was solved for, 0..1."""
    per_class = kinds @ fleet.service_s.mean(axis=0)
    work = [(last.rates.get(n, 0.0) * s, rates[n] * s) for n, s in zip(rates, per_class, strict=True)]
    total = max(sum(old for old, _ in work), 1e-12)
    return float(sum(abs(new - old) for old, new in work) / total)


def _warm(
    last: Solved, names: tuple[str, ...], groups: Mapping[tuple[str, int, float], tuple[EndpointId, ...]]
) -> Array:
    rows = [[sum(last.target[n].get(e, 0.0) for e in members) for members in groups.values()] for n in names]
    table = np.maximum(np.array(rows), 1e-9)
    warm: Array = table / table.sum(axis=1, keepdims=True)
    return warm


def _spread(
    look: _Look,
    names: tuple[str, ...],
    groups: Mapping[tuple[str, int, float], tuple[EndpointId, ...]],
    table: weights.Table,
    key: str,
    rates: Mapping[str, float],
) -> Solved:
    """From classes to endpoints: evenly inside a class, less for those on probation."""
    part = {e.id: _PROBATION if look.health[e.id].state is State.PROBATION else 1.0 for e in look.usable}
    target = {}
    for j, name in enumerate(names):
        row = {e.id: 0.0 for e in look.route.endpoints}
        for i, members in enumerate(groups.values()):
            row.update({e: float(table.shares[j, i]) / len(members) * part[e] for e in members})
        target[name] = guard.normalised(row)
    used = {e: float(table.utilization[i]) for i, members in enumerate(groups.values()) for e in members}
    attained = {n: float(a) for n, a in zip(names, table.attainment, strict=True)}
    return Solved(key, dict(rates), target, attained, used)


def _verdict(policy: Policy, percentile: float, solved: Solved, gateways: int, *, known: bool) -> Reason:
    worst = min((n for n in solved.attainment if n != DEFAULT_CLASS), key=lambda n: (solved.attainment[n], n))
    busiest = max(solved.utilization.values(), default=0.0)
    inputs = (
        Input("worst size class", worst),
        Input("its attainment", solved.attainment[worst], "ratio"),
        Input("percentile", percentile, "ratio"),
        Input("solved for", sum(solved.rates.values()), "requests/s"),
        Input("highest utilisation", busiest, "ratio"),
        Input("proxies", float(gateways)),
    )
    if known and solved.attainment[worst] < percentile:
        message = f"no table meets the SLO: at best {solved.attainment[worst]:.1%} of {worst} in time"
        return Reason(ReasonCode.INFEASIBLE, worst, message, inputs)
    code = ReasonCode.SOLVED if policy is Policy.BALANCED else ReasonCode.CLOSED_FORM
    return Reason(code, policy.value, f"{solved.attainment[worst]:.2%} of {worst}, the worst class, in time", inputs)


# ------------------------------------------------------------------------------------------------------------ guard


@dataclass(frozen=True, slots=True)
class _Move:
    """The shares to put in force now, and what held them back."""

    table: guard.Table
    moved: bool
    reasons: tuple[Reason, ...] = ()
    shifting: bool = False


def _move(look: _Look, solved: Solved, before: RouteMemory, now_s: float, *, suspended: bool) -> _Move:
    spec, target = look.route.spec, solved.target
    if not before.current or not look.usable:
        return _Move(target, moved=before.current != target)
    now = _repaired(look, before, target)
    repaired = guard.distance(now, before.current) > 1e-9
    subject = str(spec.id)
    if suspended:
        why = Reason(ReasonCode.SUSPENDED, subject, "spec.suspend: weights stay as they are")
        return _Move(now, repaired, (why,))
    if look.frozen:  # blind: also in mid-shift, and after a restart until the first signals
        return _Move(now, repaired, shifting=before.shifting)
    apart = guard.largest_change(now, target)
    if apart <= spec.guard.dead_band_ratio:
        inputs = (
            Input("largest change wanted", apart, "ratio"),
            Input("dead band", spec.guard.dead_band_ratio, "ratio"),
        )
        held = (Reason(ReasonCode.DEAD_BAND, subject, "the rest is within it", inputs),) if apart > 1e-9 else ()
        return _Move(now, repaired, held)
    rested = now_s - before.stepped_s
    going_on = before.shifting and before.solved is not None and before.solved.target is target
    limited = Reason(
        ReasonCode.STEP_LIMITED,
        subject,
        "on its way to the table, a step at a time",
        (Input("largest step", spec.guard.max_step_ratio, "ratio"),),
    )
    if going_on and rested < _RECHECK_S / 2:
        return _Move(now, repaired, (limited,), shifting=True)
    if not (repaired or going_on or _urgent(look, before)) and rested < spec.guard.dwell_s:
        inputs = (Input("since the last move", rested, "s"), Input("dwell", spec.guard.dwell_s, "s"))
        return _Move(now, repaired, (Reason(ReasonCode.DWELL, subject, "moved a moment ago", inputs),))
    table, cut = guard.step(now, target, spec.guard.max_step_ratio)
    return _Move(table, moved=True, reasons=(limited,) if cut else (), shifting=cut)


def _repaired(look: _Look, before: RouteMemory, target: guard.Table) -> guard.Table:
    """What is in force, less what must not get traffic: no guard holds that back. A size class that is new, or had
    nobody to go to, takes its target at once."""
    allowed = frozenset(e.id for e in look.usable)
    everyone = tuple(e.id for e in look.route.endpoints)
    held = guard.restrict({n: before.current.get(n, {}) for n in target}, allowed, everyone)
    return {n: row if any(before.current.get(n, {}).values()) else target[n] for n, row in held.items()}


def _urgent(look: _Look, before: RouteMemory) -> bool:
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
    look: _Look,
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
        feasible=bool(sized) and not any(r.code is ReasonCode.INFEASIBLE for r in reasons),
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
