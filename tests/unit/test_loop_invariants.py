"""What is checked of every plan before it is published, and how the proxies are counted."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshctl.controller.gateways import HOLD_S, GatewayCount
from meshctl.controller.invariants import safe_plan, violations
from meshctl.core.decide import Memory, decide
from meshctl.model import EndpointId, Plan, RoutePlan, Snapshot
from tests.harness.controller import desired_route, routes

GOOD = decide(Snapshot(routes(desired_route()), {}), Memory(), 0.0)[0].routes[desired_route().spec.id]
FIRST, SECOND = (endpoint.id for endpoint in GOOD.route.endpoints)


def _with_table(table: dict[EndpointId, Any]) -> RoutePlan:
    return dataclasses.replace(GOOD, weights={**GOOD.weights, "small": table})


def test_a_decision_keeps_every_invariant() -> None:
    """The real decision breaks none, with endpoints and without."""
    assert not list(violations(GOOD))
    none = decide(Snapshot(routes(desired_route(endpoints=0)), {}), Memory(), 0.0)[0]
    assert not [broken for plan in none.routes.values() for broken in violations(plan)]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        pytest.param(_with_table({FIRST: 500, SECOND: 499}), "sum to 999, not 1000", id="sum"),
        pytest.param(_with_table({FIRST: 1000}), "not .*127.0.0.1:9002", id="endpoint not named"),
        pytest.param(_with_table({FIRST: 1001, SECOND: -1}), "whole number of at least 0", id="negative"),
        pytest.param(_with_table({FIRST: 500.5, SECOND: 499.5}), "whole number of at least 0", id="not whole"),
        pytest.param(_with_table({FIRST: math.nan, SECOND: 0}), "whole number of at least 0", id="weight NaN"),
        pytest.param(dataclasses.replace(GOOD, weights={"small": GOOD.weights["small"]}), "sizes", id="size missing"),
        pytest.param(dataclasses.replace(GOOD, load_rps=math.inf), "load_rps is inf", id="infinite load"),
        pytest.param(dataclasses.replace(GOOD, attainment={"small": math.nan}), "attainment of small", id="NaN"),
        pytest.param(dataclasses.replace(GOOD, utilization={FIRST: math.nan}), "utilisation of", id="utilisation NaN"),
    ],
)
def test_a_broken_plan_is_refused_with_both_sides(plan: RoutePlan, said: str) -> None:
    """The message has what is and what should be; the last good plan stays, a new route is left out."""
    route_id = plan.route.spec.id
    kept, (problem,) = safe_plan(Plan({route_id: plan}), Plan({route_id: GOOD}))
    assert kept.routes[route_id] is GOOD
    assert re.search(said, problem.message)
    assert problem.route == route_id
    left_out, _ = safe_plan(Plan({route_id: plan}), Plan({}))
    assert not left_out.routes


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0.01, 100.0)), max_size=30))
def test_the_count_of_proxies_never_dips_for_less_than_the_hold(steps: list[tuple[int, float]]) -> None:
    """It is at least 1, and else the most that was connected at any look within the hold."""
    now_s, count, seen = 0.0, GatewayCount(), [(0.0, 0)]
    for connected, pause_s in steps:
        now_s += pause_s
        seen.append((now_s, connected))
        count = count.observe(connected, now_s)
        recent = [c for at_s, c in seen if now_s - at_s <= HOLD_S]
        assert count.count == max([1, *recent])
