"""The conditions of a route: a table from what is so to what is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from meshctl.controller.conditions import (
    FOREIGN_CHANGE,
    INVALID_INPUT,
    NOT_CONFIRMED,
    PENDING,
    ConditionType,
    Status,
    conditions,
    unusable,
)
from meshctl.core.decide import Memory, decide
from meshctl.model import (
    DataPlaneStatus,
    EndpointSignals,
    Problem,
    ProxyStatus,
    Reason,
    ReasonCode,
    RouteId,
    RoutePlan,
    RouteSignals,
    Signal,
    Snapshot,
)
from tests.harness.controller import desired_route, routes

NOW_S = 100.0
SYNCED = DataPlaneStatus((ProxyStatus("a", "", synced=True),))
ONE_IS_LATE = DataPlaneStatus((ProxyStatus("a", "", synced=True), ProxyStatus("b", "", synced=False)))
REFUSED = DataPlaneStatus((ProxyStatus("a", "", synced=True),), quarantined={RouteId("demo/resnet"): "bad [weight]"})


def _plan(endpoints: int = 2, **changes: Any) -> RoutePlan:
    desired = routes(desired_route(endpoints=endpoints))
    plan, _ = decide(Snapshot(desired, {}), Memory(), NOW_S)
    return dataclasses.replace(next(iter(plan.routes.values())), **changes)


def _measured(*at_s: float | None) -> RouteSignals:
    """One endpoint's signals per time; None is never measured."""
    ids = [endpoint.id for endpoint in _plan().route.endpoints]
    return RouteSignals(
        endpoints={
            id_: EndpointSignals(pending=Signal.ABSENT if t is None else Signal(0.0, t))
            for id_, t in zip(ids, at_s, strict=True)
        }
    )


FRESH = _measured(NOW_S, NOW_S - 1)
READY, RESOLVED, METRICS = ConditionType.READY, ConditionType.RESOLVED, ConditionType.METRICS_FRESH
FEASIBLE, PROGRAMMED = ConditionType.SLO_FEASIBLE, ConditionType.PROGRAMMED
CONFLICT, ROUTE = ConditionType.CONFLICT, RouteId("demo/resnet")
BROKEN = Problem("a.yaml:3:1", "unknown field", RouteId("demo/resnet"))
FOREIGN = Problem("b.yaml:1:1", "unknown field", RouteId("demo/other"))


def _meshed(**told: Any) -> dict[str, Any]:
    """A route behind one gateway that has acknowledged everything, of which the data plane tells this."""
    gateway = ProxyStatus("gw-0.istio-system", "", synced=True, mesh=True)
    plan = _plan(route=desired_route(gateways=("istio-system/gateway",)))
    return {"plan": plan, "dataplane": DataPlaneStatus((gateway,), **told)}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        pytest.param({}, {**dict.fromkeys(ConditionType, (Status.TRUE, None)), CONFLICT: (Status.FALSE, "NoConflict")},
                     id="all is well"),
        pytest.param({"problems": [FOREIGN]}, {RESOLVED: (Status.TRUE, None)}, id="another route's problem"),
        pytest.param({"problems": [BROKEN]}, {RESOLVED: (Status.FALSE, "InvalidInput"), READY: (Status.TRUE, None)},
                     id="newer input is bad, the last good one is served"),
        pytest.param({"plan": _plan(endpoints=0)},
                     {RESOLVED: (Status.FALSE, "NoEndpoints"), READY: (Status.FALSE, "NoEndpoints"),
                      FEASIBLE: (Status.UNKNOWN, "NoEndpoints")}, id="no endpoint"),
        pytest.param({"signals": _measured(NOW_S - 60, NOW_S)},
                     {METRICS: (Status.FALSE, "SignalStale"), READY: (Status.TRUE, None)}, id="one endpoint stale"),
        pytest.param({"signals": _measured(None, NOW_S)}, {METRICS: (Status.FALSE, "SignalAbsent")},
                     id="one endpoint never measured"),
        pytest.param({"signals": None}, {METRICS: (Status.UNKNOWN, "SignalAbsent")}, id="nothing measured"),
        pytest.param({"plan": _plan(attainment={"small": 0.9, "large": 0.2})},
                     {FEASIBLE: (Status.UNKNOWN, "LoadUnknown"), READY: (Status.TRUE, None)}, id="load unknown"),
        pytest.param({"plan": _plan(feasible=False, attainment={"small": 0.9, "large": 0.2})},
                     {FEASIBLE: (Status.FALSE, "Infeasible"), READY: (Status.TRUE, None)}, id="infeasible"),
        pytest.param({"dataplane": DataPlaneStatus()},
                     {PROGRAMMED: (Status.UNKNOWN, "NoProxies"), READY: (Status.UNKNOWN, "NoProxies")},
                     id="no proxy"),
        pytest.param({"dataplane": ONE_IS_LATE}, {PROGRAMMED: (Status.FALSE, "Pending"), READY: (Status.FALSE, None)},
                     id="one proxy has not answered"),
        pytest.param({"dataplane": REFUSED},
                     {PROGRAMMED: (Status.FALSE, "Quarantined"), READY: (Status.FALSE, "Quarantined")}, id="refused"),
        pytest.param({"plan": _plan(drained=frozenset(e.id for e in _plan().route.endpoints))},
                     {READY: (Status.FALSE, "AllDrained")}, id="every endpoint drained"),
        pytest.param(_meshed(), {PROGRAMMED: (Status.TRUE, "Acknowledged"), CONFLICT: (Status.FALSE, "NoConflict"),
                     READY: (Status.TRUE, "Served")}, id="a mesh has it"),
        pytest.param({**_meshed(), "dataplane": SYNCED},
                     {PROGRAMMED: (Status.UNKNOWN, "NotConfirmed"), READY: (Status.TRUE, "NotConfirmed")},
                     id="written, and no gateway can be asked; our own proxies do not serve it"),
        pytest.param({"dataplane": _meshed()["dataplane"]}, {PROGRAMMED: (Status.UNKNOWN, "NoProxies")},
                     id="a gateway does not serve what is not meshed"),
        pytest.param(_meshed(waiting={ROUTE: "istiod's word"}),
                     {PROGRAMMED: (Status.FALSE, "Pending"), READY: (Status.FALSE, "Pending")}, id="held up"),
        pytest.param(_meshed(waiting={RouteId("demo/other"): "x"}), {PROGRAMMED: (Status.TRUE, None)},
                     id="another route is held up"),
        pytest.param(_meshed(conflicts={ROUTE: "kubectl-edit has it"}),
                     {CONFLICT: (Status.TRUE, "ForeignChange"), PROGRAMMED: (Status.FALSE, "ForeignChange"),
                      READY: (Status.FALSE, "ForeignChange"), RESOLVED: (Status.TRUE, None)},
                     id="somebody else's change"),
        pytest.param({"plan": _plan(route=desired_route(suspend=True))}, {READY: (Status.TRUE, "Suspended")},
                     id="suspended"),
    ],
)  # fmt: skip
def test_conditions_say_what_is_so(
    case: dict[str, Any], expected: Mapping[ConditionType, tuple[Status, str | None]]
) -> None:
    """Each fault turns its own condition; Ready only turns when the route can't be served as decided."""
    asked = MappingProxyType({"plan": _plan(), "signals": FRESH, "dataplane": SYNCED, "problems": [], **case})
    found = {c.type: c for c in conditions(**asked, now_s=NOW_S)}
    assert set(found) == set(ConditionType)
    for type_, (status, reason) in expected.items():
        assert found[type_].status == status, found[type_]
        assert reason in (None, found[type_].reason)


def test_the_message_of_a_refusal_has_the_proxys_words() -> None:
    """What the proxy said is what a person needs."""
    found = {c.type: c for c in conditions(_plan(), FRESH, REFUSED, [], NOW_S)}
    assert "bad [weight]" in found[PROGRAMMED].message


def test_a_conflict_is_told_in_the_writers_words_and_what_is_served_meanwhile() -> None:
    """Who and what stands in Conflict; Ready says that what is live is served."""
    case = _meshed(conflicts={ROUTE: "kubectl-edit changed spec.http"})
    found = {c.type: c for c in conditions(case["plan"], FRESH, case["dataplane"], [], NOW_S)}
    assert found[CONFLICT].message == "kubectl-edit changed spec.http"
    assert "served as the live objects say" in found[READY].message


def test_every_condition_and_its_causes_are_documented() -> None:
    """docs/reference/status.md has each condition, and each reason that is not the name of a good state."""
    text = (Path(__file__).parents[2] / "docs" / "reference" / "status.md").read_text()
    causes = {INVALID_INPUT, FOREIGN_CHANGE, PENDING, NOT_CONFIRMED, ReasonCode.QUARANTINED, ReasonCode.ALL_DRAINED}
    assert sorted(name for name in {*ConditionType, *causes} if f"`{name}`" not in text) == []


def test_ready_names_the_endpoints_that_get_no_requests() -> None:
    """Events are forgotten after an hour; which server is left out, and why, stays to be read."""
    first = _plan().route.endpoints[0].id
    why = Reason(ReasonCode.DRAINED_ERRORS, first, "62% of its requests fail")
    plan = _plan(drained=frozenset({first}), reasons=(why,))
    ready, *_ = conditions(plan, FRESH, SYNCED, [], NOW_S)
    assert (ready.status, ready.message) == (
        Status.TRUE,
        f"weights are in force in every proxy; without {first} (62% of its requests fail)",
    )


def test_a_route_that_was_never_valid_has_its_faults_in_words() -> None:
    """There is no plan to speak of: Ready and Resolved say why."""
    ready, resolved = unusable([BROKEN])
    assert (ready.type, ready.status, ready.reason) == (READY, Status.FALSE, "InvalidInput")
    assert (resolved.type, resolved.status, resolved.message) == (RESOLVED, Status.FALSE, "a.yaml:3:1: unknown field")


def test_an_unmet_slo_names_the_worst_size_and_its_figure() -> None:
    """The best attainable figure stands in the condition."""
    plan = _plan(feasible=False, attainment={"small": 0.9, "large": 0.205})
    found = {c.type: c for c in conditions(plan, FRESH, SYNCED, [], NOW_S)}
    assert "large: 20.50%" in found[FEASIBLE].message


@pytest.mark.parametrize(
    ("proxy", "serves"),
    [
        (ProxyStatus("a", "", synced=True, group="edge"), True),
        (ProxyStatus("a", "", synced=True), False),
        (ProxyStatus("a", "", synced=True, group="edge", proxyless=True), False),
        (ProxyStatus("a", "", synced=True, mesh=True, group="edge"), False),
    ],
    ids=["of its group", "of another group", "a gRPC client of an HTTP route", "of the mesh"],
)
def test_only_proxies_that_serve_a_route_speak_for_it(proxy: ProxyStatus, serves: bool) -> None:
    """Another group's acknowledge other routes."""
    plan = _plan(route=desired_route(proxy_groups=("edge",)))
    found = {c.type: c for c in conditions(plan, None, DataPlaneStatus((proxy,)), (), 0.0)}[PROGRAMMED]
    assert (found.status, found.reason) == ((Status.TRUE, "Acknowledged") if serves else (Status.UNKNOWN, "NoProxies"))
