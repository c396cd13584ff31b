"""The plans that the xDS bench publishes. Pure; the same arguments give the same plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from meshctl.model import DEFAULT_CLASS, EndpointId, LoadBalancer, Plan, RoutePlan, SizeClass
from tests.harness.envoy import SIZES, route_plan

FIRST_PORT = 10_000
PUSHED = "bench/r0000"
"""The route that changes."""


def addresses(count: int, first: int = 0) -> list[str]:
    """Distinct, of 10.0.0.0/8 with ports; nobody connects to them."""
    return [f"10.{n >> 14 & 255}.{n >> 6 & 255}.{n & 63}:{FIRST_PORT + n % 7}" for n in range(first, first + count)]


def weighted(
    name: str, members: Sequence[str], seed: int, *, hosts: Sequence[str] = ("*",), sizes: Sequence[SizeClass] = SIZES
) -> RoutePlan:
    """A route over `members` with weights 1 to 200, drawn for each size class; by name, as decisions have them."""
    random, members = np.random.default_rng(seed), sorted(members)
    tables = {
        size: dict(zip(members, random.integers(1, 200, len(members)).tolist(), strict=True))
        for size in (*(s.name for s in sizes), DEFAULT_CLASS)
    }
    return route_plan(name, tables, hosts=hosts, sizes=sizes, balancer=LoadBalancer())


def reweighted(plan: RoutePlan, seed: int) -> RoutePlan:
    """Every weight of `plan` is another one, the endpoints are the same objects: what a decision gives."""
    random = np.random.default_rng(seed)
    tables = {size: _moved(table, random.integers(1, 100, len(table)).tolist()) for size, table in plan.weights.items()}
    return replace(plan, weights=tables)


def one_weight(plan: RoutePlan) -> RoutePlan:
    """One endpoint's weight in one class is another one."""
    size = max(plan.weights)
    table = plan.weights[size]
    first = min(table)
    return replace(plan, weights={**plan.weights, size: {**table, first: table[first] % 200 + 1}})


def _moved(table: Mapping[EndpointId, int], steps: Sequence[int]) -> dict[EndpointId, int]:
    """Weights of 1 to 200, each moved by 1 to 99: none stays."""
    return {name: (weight - 1 + step) % 200 + 1 for (name, weight), step in zip(table.items(), steps, strict=True)}


def many_routes(count: int, endpoints: int, *, first: Sequence[str] = ()) -> Plan:
    """`count` routes of four clusters each, every one with a host and `endpoints` endpoints of its own; the route
    `PUSHED` has `first` where given."""
    found = []
    for number in range(count):
        members = first if first and number == 0 else addresses(endpoints, number * endpoints)
        found.append(weighted(f"bench/r{number:04}", members, number, hosts=(f"r{number:04}.example",)))
    return Plan({route.route.spec.id: route for route in found})


def with_route(plan: Plan, route: RoutePlan) -> Plan:
    """`plan`, with `route` in place of the one of its name; the others are the same objects."""
    return Plan({**plan.routes, route.route.spec.id: route})


def with_host(route: RoutePlan, host: str) -> RoutePlan:
    """`route`, served under one more host."""
    spec = replace(route.route.spec, hosts=(*route.route.spec.hosts, host))
    return replace(route, route=replace(route.route, spec=spec))
