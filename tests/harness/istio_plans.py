"""Plans of routes that are served through Istio."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from istio.render import Rendered
from meshctl.model import LoadBalancer, RoutePlan
from meshctl.ports import KubeObject
from tests.harness.envoy import route_plan

GATEWAY = "istio-system/ingress"


def meshed(name: str, weights: Any, *, hosts: tuple[str, ...] = ("model.example",), **changes: Any) -> RoutePlan:
    """`route_plan` for the gateway `GATEWAY`; `changes` of its spec, `not_ready` addresses, or a `balancer`."""
    options = {key: changes.pop(key) for key in ("not_ready", "balancer", "sizes", "headers") if key in changes}
    plan = route_plan(name, weights, hosts=hosts, **{"balancer": LoadBalancer(), **options})
    gateways = () if changes.get("delegate") else (GATEWAY,)
    spec = dataclasses.replace(plan.route.spec, gateways=gateways, **changes)
    return dataclasses.replace(plan, route=dataclasses.replace(plan.route, spec=spec))


def with_endpoints(plan: RoutePlan, endpoints: Iterable[Any]) -> RoutePlan:
    """`plan` with other endpoints, the weights as they are."""
    return dataclasses.replace(plan, route=dataclasses.replace(plan.route, endpoints=tuple(endpoints)))


def objects(rendered: Rendered) -> list[KubeObject]:
    """All of them, in the order of make-before-break."""
    return [*rendered.backends, rendered.virtual_service]
