"""What the admin API says, as types: made from a State here, read back by the CLI. Pure.

JSON fields are the attributes, names carry units, a time is an age in seconds, unknown is null. A view has only plain
values, so that a reader needs nothing of the model. Rejected: sending the model itself, whose times mean nothing
outside this process and whose shape would then be an API.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from meshctl.controller.conditions import Condition, ConditionType, Status, conditions, endpoint_states
from meshctl.controller.state import State
from meshctl.model import (
    DEFAULT_CLASS,
    NO_SIGNALS,
    EndpointSignals,
    Input,
    Problem,
    Reason,
    RouteId,
    RoutePlan,
    RouteSignals,
    Signal,
)


@dataclass(frozen=True, slots=True)
class ProblemView:
    where: str
    message: str
    route: str | None


@dataclass(frozen=True, slots=True)
class InputView:
    name: str
    value: float | str | None
    unit: str
    age_s: float | None
    state: str | None


@dataclass(frozen=True, slots=True)
class ReasonView:
    code: str
    subject: str
    message: str
    inputs: tuple[InputView, ...]


@dataclass(frozen=True, slots=True)
class SizeView:
    """One size class; the class of requests without a usable size has no bounds."""

    size: str
    min_batch: int | None
    max_batch: int | None
    attainment: float | None
    arrivals: InputView | None
    reasons: tuple[ReasonView, ...]


@dataclass(frozen=True, slots=True)
class GpuView:
    gpu: str
    reasons: tuple[ReasonView, ...]


@dataclass(frozen=True, slots=True)
class EndpointView:
    endpoint: str
    gpu: str
    ready: bool
    drained: bool
    weights: Mapping[str, int]
    """By size class, of 1000."""
    utilization: float | None
    signals: tuple[InputView, ...]
    reasons: tuple[ReasonView, ...]


@dataclass(frozen=True, slots=True)
class RouteView:
    """Everything about one route; each Reason stands at its subject."""

    route: str
    generation: int
    hosts: tuple[str, ...]
    model: str
    policy: str
    suspended: bool
    slo_s: float
    percentile: float
    load_rps: float
    feasible: bool
    conditions: tuple[Condition, ...]
    problems: tuple[ProblemView, ...]
    reasons: tuple[ReasonView, ...]
    """Those about the route as a whole."""
    sizes: tuple[SizeView, ...]
    gpus: tuple[GpuView, ...]
    endpoints: tuple[EndpointView, ...]


@dataclass(frozen=True, slots=True)
class RouteSummary:
    """One line per route."""

    route: str
    hosts: tuple[str, ...]
    model: str
    policy: str
    slo_s: float
    load_rps: float
    attainment: float | None
    """Of the worst size class."""
    feasible: bool
    endpoints: int
    drained: int
    ready: Status
    reason: str
    """Of the Ready condition."""


@dataclass(frozen=True, slots=True)
class ProxyView:
    node: str
    admin: str
    synced: bool
    error: str


@dataclass(frozen=True, slots=True)
class StatusView:
    """The controller as a whole."""

    version: str
    uptime_s: float
    ready: bool
    """The first plan has been published."""
    degraded: bool
    """The controller could not do something just now; the last good plan is in force."""
    gateways: int
    dataplane_version: str
    proxies: tuple[ProxyView, ...]
    problems: Mapping[str, tuple[ProblemView, ...]]
    """By source: controller, dataplane, manifests, signals."""
    signals: Mapping[str, int]
    """Endpoints by the state of their newest signal: fresh, stale, absent."""
    routes: tuple[RouteSummary, ...]


def status_view(state: State, version: str) -> StatusView:
    counts = {"fresh": 0, "stale": 0, "absent": 0}
    for route_id, plan in state.plan.routes.items():
        for signal_state in endpoint_states(plan, _signals(state, route_id), state.now_s).values():
            counts[signal_state] += 1
    return StatusView(
        version=version,
        uptime_s=max(0.0, state.now_s - state.started_s),
        ready=state.published,
        degraded=bool(state.failures),
        gateways=state.gateways,
        dataplane_version=state.dataplane.version,
        proxies=tuple(ProxyView(p.node, p.admin, p.synced, p.error) for p in state.dataplane.proxies),
        problems={source: _problems(found) for source, found in state.problems().items()},
        signals=counts,
        routes=route_summaries(state),
    )


def route_summaries(state: State) -> tuple[RouteSummary, ...]:
    return tuple(_summary(state, plan) for _, plan in sorted(state.plan.routes.items()))


def route_view(state: State, route_id: RouteId) -> RouteView:
    """Raises KeyError when no such route is served."""
    plan = state.plan.routes[route_id]
    spec = plan.route.spec
    by_subject = _by_subject(plan, state.now_s)
    gpus = sorted({endpoint.gpu for endpoint in plan.route.endpoints} & by_subject.keys())
    return RouteView(
        route=route_id,
        generation=spec.generation,
        hosts=spec.hosts,
        model=spec.model,
        policy=spec.policy,
        suspended=spec.suspend,
        slo_s=spec.slo_s,
        percentile=spec.percentile,
        load_rps=plan.load_rps,
        feasible=plan.feasible,
        conditions=_conditions(state, plan),
        problems=_problems(p for p in state.desired.problems if p.route == route_id),
        reasons=tuple(by_subject.get(str(route_id), ())),
        sizes=_sizes(state, plan, by_subject),
        gpus=tuple(GpuView(gpu, tuple(by_subject[gpu])) for gpu in gpus),
        endpoints=_endpoints(state, plan, by_subject),
    )


def _summary(state: State, plan: RoutePlan) -> RouteSummary:
    spec = plan.route.spec
    ready = next(c for c in _conditions(state, plan) if c.type is ConditionType.READY)
    return RouteSummary(
        route=spec.id,
        hosts=spec.hosts,
        model=spec.model,
        policy=spec.policy,
        slo_s=spec.slo_s,
        load_rps=plan.load_rps,
        attainment=min(plan.attainment.values(), default=None),
        feasible=plan.feasible,
        endpoints=len(plan.route.endpoints),
        drained=len(plan.drained),
        ready=ready.status,
        reason=ready.reason,
    )


def _conditions(state: State, plan: RoutePlan) -> tuple[Condition, ...]:
    signals = _signals(state, plan.route.spec.id)
    return conditions(plan, signals, state.dataplane, state.desired.problems, state.now_s)


def _signals(state: State, route_id: RouteId) -> RouteSignals:
    return state.observed.routes.get(route_id, NO_SIGNALS)


def _by_subject(plan: RoutePlan, now_s: float) -> dict[str, list[ReasonView]]:
    """Reasons by what they are about; a subject that the view does not show counts as the route."""
    route_id = str(plan.route.spec.id)
    shown = {*plan.weights, *(e.id for e in plan.route.endpoints), *(e.gpu for e in plan.route.endpoints)}
    found: dict[str, list[ReasonView]] = {}
    for reason in plan.reasons:
        subject = reason.subject if reason.subject in shown else route_id
        found.setdefault(subject, []).append(_reason(reason, now_s))
    return found


def _reason(reason: Reason, now_s: float) -> ReasonView:
    inputs = tuple(_input(item, now_s) for item in reason.inputs)
    return ReasonView(reason.code, reason.subject, reason.message, inputs)


def _input(item: Input, now_s: float) -> InputView:
    age_s = None if item.at_s is None else max(0.0, now_s - item.at_s)
    return InputView(item.name, item.value, item.unit, age_s, item.state)


def _sizes(state: State, plan: RoutePlan, by_subject: Mapping[str, Sequence[ReasonView]]) -> tuple[SizeView, ...]:
    bounds: dict[str, tuple[int | None, int | None]] = {
        size.name: (size.min_batch, size.max_batch) for size in plan.route.spec.sizes
    }
    bounds[DEFAULT_CLASS] = (None, None)
    arrivals = _signals(state, plan.route.spec.id).arrivals_rps
    return tuple(
        SizeView(
            size=name,
            min_batch=low,
            max_batch=high,
            attainment=plan.attainment.get(name),
            arrivals=_signal("arrivals_rps", arrivals[name], plan, state.now_s) if name in arrivals else None,
            reasons=tuple(by_subject.get(name, ())),
        )
        for name, (low, high) in bounds.items()
    )


def _endpoints(
    state: State, plan: RoutePlan, by_subject: Mapping[str, Sequence[ReasonView]]
) -> tuple[EndpointView, ...]:
    measured = _signals(state, plan.route.spec.id).endpoints
    return tuple(
        EndpointView(
            endpoint=endpoint.id,
            gpu=endpoint.gpu,
            ready=endpoint.ready,
            drained=endpoint.id in plan.drained,
            weights={size: table[endpoint.id] for size, table in plan.weights.items()},
            utilization=plan.utilization.get(endpoint.id),
            signals=_endpoint_signals(measured[endpoint.id], plan, state.now_s) if endpoint.id in measured else (),
            reasons=tuple(by_subject.get(endpoint.id, ())),
        )
        for endpoint in plan.route.endpoints
    )


def _endpoint_signals(signals: EndpointSignals, plan: RoutePlan, now_s: float) -> tuple[InputView, ...]:
    return tuple(_signal(name, getattr(signals, name), plan, now_s) for name in EndpointSignals.__slots__)


_UNITS = {"_ratio": "ratio", "_rps": "requests/s", "_s": "s", "batch": "items"}
"""By the end of a signal's name (the model's habit); the others count requests. `_rps` stands before `_s`."""


def _signal(name: str, signal: Signal, plan: RoutePlan, now_s: float) -> InputView:
    unit = next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "requests")
    state = signal.state(now_s, plan.route.spec.guard.stale_after_s)
    return InputView(name, signal.value, unit, signal.age_s(now_s), state)


def _problems(problems: Iterable[Problem]) -> tuple[ProblemView, ...]:
    return tuple(ProblemView(p.where, p.message, p.route) for p in problems)
