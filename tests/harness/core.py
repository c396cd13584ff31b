"""The reference fleet as the core sees it: a route, what would be measured of it, and rounds of decisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from meshctl.core import weights
from meshctl.core.capacity import service_s
from meshctl.core.decide import Memory, decide
from meshctl.model import (
    DEFAULT_CLASS,
    DesiredRoute,
    Endpoint,
    EndpointId,
    EndpointSignals,
    Plan,
    Reason,
    ReasonCode,
    RouteId,
    RoutePlan,
    RouteSignals,
    RouteSpec,
    Signal,
    Snapshot,
)
from meshctl.sim import reference

ROUTE = RouteId("default/reference")
CAPACITY_RPS = reference.capacity_rps()
MEAN_BATCH = sum(c.share * c.batch for c in reference.SIZES)
_NOBODY: Mapping[EndpointId, float] = MappingProxyType({})


def fleet(servers_per_gpu: int = reference.SERVERS_PER_GPU) -> weights.Fleet:
    """The reference fleet for the solver: classes in the order of `reference.SERVICE_S`."""
    times = [[service_s(p, c.batch) for c in reference.SIZES] for p in reference.PROFILES.values()]
    return weights.Fleet(np.array(times), np.full(len(times), float(servers_per_gpu)), np.ones(len(times)))


def demand(load_ratio: float, servers_per_gpu: int = reference.SERVERS_PER_GPU) -> weights.Demand:
    """The reference mix at `load_ratio` of the capacity."""
    load = load_ratio * CAPACITY_RPS * servers_per_gpu / reference.SERVERS_PER_GPU
    return weights.Demand(load * np.array([c.share for c in reference.SIZES]), np.eye(len(reference.SIZES)))


def route(per_gpu: int = reference.SERVERS_PER_GPU, name: RouteId = ROUTE, **spec: Any) -> DesiredRoute:
    """`per_gpu` endpoints on each GPU product of the reference fleet; `endpoint(i)` names them."""
    endpoints = [
        Endpoint(endpoint(i), "127.0.0.1", 9000 + i, gpu, f"127.0.0.1:{9000 + i}", f"GPU-{i}")
        for i, gpu in enumerate(g for g in reference.SERVICE_S for _ in range(per_gpu))
    ]
    options: dict[str, Any] = {"sizes": reference.SIZES, "slo_s": reference.SLO_S, "percentile": 0.99, **spec}
    wanted = RouteSpec(id=name, hosts=("*",), model=reference.MODEL, headers=("x-batch-size",), **options)
    return DesiredRoute(wanted, tuple(endpoints), reference.PROFILES)


def endpoint(index: int) -> EndpointId:
    """V100s are 0 to 2, P100s 3 to 5, T4s 6 to 8, K40s 9 to 11."""
    return EndpointId(f"127.0.0.1:{9000 + index}")


def healthy(e: Endpoint, at_s: float, slowdown: float = 1.0, foreign_ratio: float = 0.0) -> EndpointSignals:
    """All that is measured of an endpoint that answers 40 requests/s of the reference mix and is half busy."""
    profile = reference.PROFILES[e.gpu]

    def of(value: float) -> Signal:
        return Signal(value, at_s)

    return EndpointSignals(
        gpu_utilization_ratio=of(min(1.0, 0.5 + foreign_ratio)),
        busy_ratio=of(0.5),
        service_s=of(slowdown * service_s(profile, MEAN_BATCH)),
        batch=of(MEAN_BATCH),
        queue_s=of(0.001),
        pending=of(1.0),
        completed_rps=of(40.0),
        failed_rps=of(0.0),
        proxy_rps=of(40.0),
        proxy_failed_rps=of(0.0),
        proxy_active=of(1.0),
    )


def measured(
    of: DesiredRoute,
    at_s: float,
    load_ratio: float = 0.7,
    slow: Mapping[EndpointId, float] = _NOBODY,
    foreign: Mapping[EndpointId, float] = _NOBODY,
    changed: Mapping[EndpointId, EndpointSignals] = MappingProxyType({}),
) -> RouteSignals:
    """Signals of a fleet that is well but for `slow` (factor), `foreign` (share) and `changed` (signals as given)."""
    arrivals = {c.name: Signal(load_ratio * CAPACITY_RPS * c.share, at_s) for c in of.spec.sizes}
    endpoints = {e.id: healthy(e, at_s, slow.get(e.id, 1.0), foreign.get(e.id, 0.0)) for e in of.endpoints}
    return RouteSignals({**arrivals, DEFAULT_CLASS: Signal(0.0, at_s)}, {**endpoints, **changed})


Weights = dict[str, dict[EndpointId, int]]


@dataclass
class Rounds:
    """Decisions about one route, one after the other, on a clock that the test moves."""

    route: DesiredRoute
    now_s: float = 0.0
    gateways: int = 1
    memory: Memory = field(default_factory=Memory)
    plan: RoutePlan | None = None
    moves: int = 0
    in_force: Weights | None = None
    """What the mesh serves; None: nothing is read back from it."""
    leading: bool = True

    def decide(self, signals: RouteSignals, after_s: float = 1.0) -> RoutePlan:
        """One round, `after_s` after the last."""
        self.now_s += after_s
        route_id = self.route.spec.id
        in_force = {} if self.in_force is None else {route_id: self.in_force}
        snapshot = Snapshot({route_id: self.route}, {route_id: signals}, self.gateways, in_force, self.leading)
        plan, self.memory = decide(snapshot, self.memory, self.now_s)
        new = plan.routes[route_id]
        check(new)
        self.moves += self.plan is not None and weights_of(new) != weights_of(self.plan)
        self.plan = new
        return new

    def run(self, seconds: int, signals: Callable[[float], RouteSignals]) -> RoutePlan:
        """A round a second, with `signals` of each moment."""
        for _ in range(seconds):
            plan = self.decide(signals(self.now_s + 1.0))
        return plan

    def well(self, seconds: int = 30, **changes: Any) -> RoutePlan:
        """`seconds` with `measured` signals."""
        return self.run(seconds, lambda now_s: measured(self.route, now_s, **changes))


def check(plan: RoutePlan) -> None:
    """What must hold of every plan."""
    names = {c.name for c in plan.route.spec.sizes} | {DEFAULT_CLASS}
    everyone = {e.id for e in plan.route.endpoints}
    assert set(plan.weights) == names
    for row in plan.weights.values():
        assert set(row) == everyone
        assert all(isinstance(w, int) and w >= 0 for w in row.values())
        assert sum(row.values()) == (1000 if everyone else 0)
    assert plan.reasons, "no decision without a reason"
    assert all(0 <= a <= 1 for a in plan.attainment.values())
    assert all(u >= 0 for u in plan.utilization.values())


def weights_of(plan: RoutePlan) -> Weights:
    return {size: dict(row) for size, row in plan.weights.items()}


def work_of(plan: RoutePlan, e: EndpointId) -> float:
    """Part of the route's work, 0..1000, that the endpoint gets: its weights, each with what that size costs there."""
    cost = {c.name: c.share * service_s(reference.PROFILES["V100"], c.batch) for c in reference.SIZES}
    total = sum(cost.values())
    return sum(plan.weights[size][e] * cost[size] / total for size in cost)


def reasons(plan: RoutePlan, code: ReasonCode, subject: str | None = None) -> list[Reason]:
    return [r for r in plan.reasons if r.code is code and subject in (None, r.subject)]


def text(plan: Plan) -> str:
    """Every byte of a plan that anybody could act on or show."""
    return repr([(r, dataclasses.astuple(p.load_balancer), p.weights, p.reasons) for r, p in plan.routes.items()])


V100, P100, K40 = endpoint(0), endpoint(3), endpoint(11)
"""One of each GPU."""


def settled(**spec: Any) -> Rounds:
    """A fleet that has been well for half a minute."""
    rounds = Rounds(route(**spec))
    rounds.well()
    return rounds


def only(index: int, **fields: Signal) -> Callable[[Rounds, float], RouteSignals]:
    """Signals of a fleet that is well but for some of endpoint `index`."""

    def signals(rounds: Rounds, at_s: float) -> RouteSignals:
        e = rounds.route.endpoints[index]
        return measured(rounds.route, at_s, changed={e.id: dataclasses.replace(healthy(e, at_s), **fields)})

    return signals


def failing(rounds: Rounds, at_s: float, who: str = "failed_rps", part: float = 0.9) -> RouteSignals:
    """A fleet whose first endpoint fails `part` of its requests, by the word of `who`."""
    fields = {who: Signal(40.0 * part, at_s)}
    if who == "failed_rps":
        fields["completed_rps"] = Signal(40.0 * (1 - part), at_s)
    return only(0, **fields)(rounds, at_s)
