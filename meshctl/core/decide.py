"""decide(snapshot, memory, now) -> (Plan, Memory): the one place where traffic is decided. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from meshctl.model import (
    DEFAULT_CLASS,
    WEIGHT_TOTAL,
    DesiredRoute,
    LoadBalancer,
    Plan,
    Reason,
    ReasonCode,
    RouteId,
    RoutePlan,
    Snapshot,
)


@dataclass(frozen=True, slots=True)
class Memory:
    """What one decision leaves to the next. `to_json`/`from_json` let a restart go on where it stopped."""

    plans: Mapping[RouteId, RoutePlan] = field(default_factory=lambda: MappingProxyType({}))

    def to_json(self, now_s: float) -> dict[str, object]:
        """Plain data, times as ages before `now_s`."""
        return {}

    @staticmethod
    def from_json(data: Mapping[str, object], now_s: float) -> Memory:
        """Raises ValueError, naming the field, when `data` was not written by `to_json`."""
        return Memory()


def decide(snapshot: Snapshot, memory: Memory, now_s: float) -> tuple[Plan, Memory]:
    """Weights for every route of `snapshot`.

    A route whose decision does not change keeps the SAME RoutePlan object, so that an identity check finds what
    changed. Never raises on bad signals: they become Reasons.
    """
    plans = {}
    for route_id, route in snapshot.routes.items():
        before = memory.plans.get(route_id)
        plans[route_id] = before if before is not None and before.route is route else _equal(route)
    return Plan(plans), Memory(plans)


def _equal(route: DesiredRoute) -> RoutePlan:
    n = len(route.endpoints)
    table = {e.id: WEIGHT_TOTAL // n + (1 if i < WEIGHT_TOTAL % n else 0) for i, e in enumerate(route.endpoints)}
    names = [c.name for c in route.spec.sizes] + [DEFAULT_CLASS]
    return RoutePlan(
        route=route,
        weights=dict.fromkeys(names, table),
        load_balancer=LoadBalancer(),
        attainment={},
        utilization={},
        load_rps=0.0,
        feasible=True,
        drained=frozenset(),
        reasons=(Reason(ReasonCode.CLOSED_FORM, str(route.spec.id), "equal weights"),),
    )
