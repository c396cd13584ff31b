"""The conditions of a route, as Kubernetes has them: what is true of it now, why, and in words. Pure.

| type | True | False | Unknown |
|------|------|-------|---------|
| Resolved | endpoints and profiles found, input is good | newer input is bad, or no endpoint | |
| MetricsFresh | every endpoint measured lately | some are stale or never measured | nothing measured yet |
| SLOFeasible | every size class should meet it | some can't; best figure in the message | no endpoint; load guessed |
| Programmed | every proxy acknowledged everything | refused, held up, or not acknowledged yet | no proxy is known |
| Conflict | somebody else owns or changed an object | nobody does | |
| Ready | served as decided | can't be served as decided | no proxy connected |

A missed SLO or missing metrics do not make a route unready: it is served, only less well. Neither does a mesh whose
proxies can't be asked: what was written is as good as served, and the reason says that nobody has confirmed it. A
proxy counts for the routes that it can serve: one that istiod configures for the meshed ones, ours for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from meshctl.model import (
    DEFAULT_CLASS,
    NO_SIGNALS,
    DataPlaneStatus,
    EndpointSignals,
    Problem,
    ReasonCode,
    RoutePlan,
    RouteSignals,
    Signal,
    SignalState,
)


class ConditionType(StrEnum):
    READY = "Ready"
    RESOLVED = "Resolved"
    METRICS_FRESH = "MetricsFresh"
    SLO_FEASIBLE = "SLOFeasible"
    PROGRAMMED = "Programmed"
    CONFLICT = "Conflict"


class Status(StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


INVALID_INPUT = "InvalidInput"
FOREIGN_CHANGE = "ForeignChange"
PENDING = "Pending"
NOT_CONFIRMED = "NotConfirmed"


DRAINED = frozenset({ReasonCode.DRAINED_ERRORS, ReasonCode.DRAINED_HANG})
"""Reasons that say of an endpoint why it is drained."""


@dataclass(frozen=True, slots=True)
class Condition:
    type: ConditionType
    status: Status
    reason: str
    """CamelCase, for programs."""
    message: str


def conditions(
    plan: RoutePlan,
    signals: RouteSignals | None,
    dataplane: DataPlaneStatus,
    problems: Sequence[Problem],
    now_s: float,
) -> tuple[Condition, ...]:
    """All conditions of one route, Ready first. `problems` are those of the input (other routes' are ignored)."""
    resolved = _resolved(plan, [p for p in problems if p.route == plan.route.spec.id])
    programmed = _programmed(plan, dataplane)
    return (
        _ready(plan, resolved, programmed),
        resolved,
        _metrics_fresh(plan, signals or NO_SIGNALS, now_s),
        _slo_feasible(plan),
        programmed,
        _conflict(plan, dataplane),
    )


def unusable(problems: Sequence[Problem]) -> tuple[Condition, ...]:
    """The conditions of a route of which no version could ever be used. `problems` are its own."""
    said = "; ".join(f"{problem.where}: {problem.message}" for problem in problems)
    return (
        Condition(ConditionType.READY, Status.FALSE, INVALID_INPUT, "not served: see Resolved"),
        Condition(ConditionType.RESOLVED, Status.FALSE, INVALID_INPUT, said),
    )


def newest(signals: EndpointSignals) -> Signal:
    """The endpoint's newest signal: how lately it was heard of at all; Signal.ABSENT when never."""
    every = [getattr(signals, name) for name in EndpointSignals.__slots__]
    measured = [signal for signal in every if signal.at_s is not None]
    return max(measured, key=lambda signal: signal.at_s, default=Signal.ABSENT)


def endpoint_states(plan: RoutePlan, signals: RouteSignals, now_s: float) -> dict[str, SignalState]:
    """For each endpoint, whether it was heard of lately; no traffic is fresh news too."""
    states: dict[str, SignalState] = {}
    for endpoint in plan.route.endpoints:
        measured = signals.endpoints.get(endpoint.id)
        signal = newest(measured) if measured else Signal.ABSENT
        state = signal.state(now_s, plan.route.spec.guard.stale_after_s)
        states[str(endpoint.id)] = SignalState.FRESH if state is SignalState.NO_TRAFFIC else state
    return states


def _resolved(plan: RoutePlan, problems: Sequence[Problem]) -> Condition:
    def condition(status: Status, reason: str, message: str) -> Condition:
        return Condition(ConditionType.RESOLVED, status, reason, message)

    route = plan.route
    said = "".join(f"; {_words(problem)}" for problem in problems if not _of_profiles(problem))
    if not route.endpoints:
        return condition(Status.FALSE, ReasonCode.NO_ENDPOINTS, f"the backend has no endpoint{said}")
    missing = sorted({endpoint.gpu or "unknown GPU" for endpoint in route.endpoints} - route.profiles.keys())
    if missing:
        text = f"no ModelProfile for {route.spec.model} on {', '.join(missing)}: a guess stands in for it"
        return condition(Status.FALSE, ReasonCode.NO_PROFILE, text + said)
    if said:
        return condition(Status.FALSE, INVALID_INPUT, f"the last good version is in force{said}")
    return condition(Status.TRUE, "Resolved", f"{len(route.endpoints)} endpoints, {len(route.profiles)} profiles")


def _words(problem: Problem) -> str:
    """Without the route's own name, beside which it is read."""
    own = problem.where == f"ModelRoute {problem.route}"
    return problem.message if own else f"{problem.where}: {problem.message}"


def _of_profiles(problem: Problem) -> bool:
    """`meshctl.api.resolve` says per GPU product what the condition says of all."""
    return "no ModelProfile for" in problem.message


def _metrics_fresh(plan: RoutePlan, signals: RouteSignals, now_s: float) -> Condition:
    def condition(status: Status, reason: str, message: str) -> Condition:
        return Condition(ConditionType.METRICS_FRESH, status, reason, message)

    states = endpoint_states(plan, signals, now_s)
    stale = sorted(name for name, state in states.items() if state is SignalState.STALE)
    absent = sorted(name for name, state in states.items() if state is SignalState.ABSENT)
    if len(absent) == len(states):
        return condition(Status.UNKNOWN, ReasonCode.SIGNAL_ABSENT, "no endpoint has been measured")
    if stale:
        return condition(Status.FALSE, ReasonCode.SIGNAL_STALE, f"no news lately from {_few(stale)}")
    if absent:
        return condition(Status.FALSE, ReasonCode.SIGNAL_ABSENT, f"never measured: {_few(absent)}")
    return condition(Status.TRUE, "Fresh", f"all {len(states)} endpoints were measured lately")


def _slo_feasible(plan: RoutePlan) -> Condition:
    def condition(status: Status, reason: str, message: str) -> Condition:
        return Condition(ConditionType.SLO_FEASIBLE, status, reason, message)

    if not plan.route.endpoints:
        return condition(Status.UNKNOWN, ReasonCode.NO_ENDPOINTS, "there is nothing to solve for")
    spec = plan.route.spec
    goal = f"{spec.percentile:.2%} within {spec.slo_s * 1000:g} ms at {plan.load_rps:.1f} requests/s"
    sized = {size: value for size, value in plan.attainment.items() if size != DEFAULT_CLASS}
    worst = min(sized.items(), key=lambda item: (item[1], item[0]), default=None)
    expected = f"; expected of the worst size, {worst[0]}: {worst[1]:.2%}" if worst else ""
    if plan.feasible and worst and worst[1] < spec.percentile:
        unknown = "the load is a guess from the capacity until it is observed, or declared (spec.expectedLoad)"
        return condition(Status.UNKNOWN, "LoadUnknown", f"goal: {goal}{expected}; {unknown}")
    if plan.feasible:
        return condition(Status.TRUE, "Feasible", f"goal: {goal}{expected}")
    return condition(Status.FALSE, ReasonCode.INFEASIBLE, f"goal: {goal}{expected}; add endpoints or relax the SLO")


def _programmed(plan: RoutePlan, dataplane: DataPlaneStatus) -> Condition:
    def condition(status: Status, reason: str, message: str) -> Condition:
        return Condition(ConditionType.PROGRAMMED, status, reason, message)

    spec = plan.route.spec
    refused = dataplane.quarantined.get(spec.id)
    if refused is not None:
        return condition(Status.FALSE, ReasonCode.QUARANTINED, f"the newest state was refused: {refused}")
    if spec.id in dataplane.conflicts:
        return condition(Status.FALSE, FOREIGN_CHANGE, "nothing is written while the conflict lasts")
    waiting = dataplane.waiting.get(spec.id)
    if waiting is not None:
        return condition(Status.FALSE, PENDING, f"not in force yet: {waiting}")
    proxies = [proxy for proxy in dataplane.proxies if proxy.serves(spec)]
    if not proxies:
        if spec.meshed:
            return condition(Status.UNKNOWN, NOT_CONFIRMED, "written, but no gateway is known that could confirm it")
        groups = " or ".join(spec.proxy_groups)
        return condition(Status.UNKNOWN, "NoProxies", f"no proxy of group {groups} is connected")
    late = sorted(proxy.node for proxy in proxies if not proxy.synced)
    if late and not spec.meshed:  # what a gateway lacks of a meshed route is in `waiting`
        return condition(Status.FALSE, PENDING, f"not acknowledged yet by {_few(late)}")
    return condition(Status.TRUE, "Acknowledged", f"by {len(proxies)} {'proxy' if len(proxies) == 1 else 'proxies'}")


def _conflict(plan: RoutePlan, dataplane: DataPlaneStatus) -> Condition:
    said = dataplane.conflicts.get(plan.route.spec.id)
    if said is not None:
        return Condition(ConditionType.CONFLICT, Status.TRUE, FOREIGN_CHANGE, said)
    return Condition(ConditionType.CONFLICT, Status.FALSE, "NoConflict", "nobody else owns or changed its objects")


def _ready(plan: RoutePlan, resolved: Condition, programmed: Condition) -> Condition:
    def condition(status: Status, reason: str, message: str) -> Condition:
        return Condition(ConditionType.READY, status, reason, message)

    if not plan.route.endpoints:
        return condition(Status.FALSE, resolved.reason, resolved.message)
    if plan.drained.issuperset(endpoint.id for endpoint in plan.route.endpoints):
        return condition(Status.FALSE, ReasonCode.ALL_DRAINED, "every endpoint fails or hangs")
    if programmed.reason == FOREIGN_CHANGE:
        return condition(Status.FALSE, FOREIGN_CHANGE, "served as the live objects say, not as decided: see Conflict")
    if programmed.status is not Status.TRUE and programmed.reason != NOT_CONFIRMED:
        return condition(programmed.status, programmed.reason, programmed.message)
    without = _without(plan)
    if plan.route.spec.suspend:
        held = "served with the weights held: spec.suspend is true"
        return condition(Status.TRUE, ReasonCode.SUSPENDED, held + without)
    if programmed.status is not Status.TRUE:
        return condition(Status.TRUE, NOT_CONFIRMED, f"weights are {programmed.message}{without}")
    return condition(Status.TRUE, "Served", f"weights are in force in every proxy{without}")


def _without(plan: RoutePlan) -> str:
    """Which endpoints get no requests, and why."""
    why = {r.subject: r.message for r in plan.reasons if r.code in DRAINED}
    drained = [f"{id_} ({why.get(id_, 'drained')})" for id_ in sorted(plan.drained)]
    return f"; without {_few(drained)}" if drained else ""


def _few(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and how many more: a message must stay readable for 1000 endpoints."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
