"""Rendering any plan, and reading it back."""

from __future__ import annotations

import dataclasses
import json
import re

from hypothesis import given
from hypothesis import strategies as st

from istio.analyze import Severity, check
from istio.names import DESTINATION_RULE, SERVICE_ENTRY, VIRTUAL_SERVICE, key_of
from istio.render import render, weights_of
from meshctl.core.guard import integers, normalised
from meshctl.model import (
    DEFAULT_CLASS,
    WEIGHT_TOTAL,
    DesiredRoute,
    Endpoint,
    EndpointId,
    LoadBalancer,
    Mechanism,
    Retry,
    RouteId,
    RoutePlan,
    RouteSpec,
    SizeClass,
    Workload,
)
from tests.harness.istio_plans import GATEWAY, objects
from xds.requests import LEGACY_HEADER, size_pattern

GPUS = st.sampled_from(["V100", "v100", "T4", "Tesla P100/16GB", ""])
BATCHES = st.lists(st.integers(1, 2**31 - 1), min_size=2, max_size=8, unique=True).map(sorted)
RETRIES = st.builds(
    Retry, attempts=st.integers(0, 5), per_try_timeout_s=st.none() | st.floats(0.001, 60), idempotent=st.booleans()
)
PODS = st.none() | st.builds(
    Workload,
    namespace=st.sampled_from(["team", "other"]),
    name=st.just("pod"),
    labels=st.sampled_from([(), (("security.istio.io/tlsMode", "istio"), ("x", "y"))]),
    service_account=st.sampled_from(["", "triton"]),
)


@st.composite
def endpoint_lists(draw: st.DrawFn) -> tuple[Endpoint, ...]:
    """Up to 12, over IPv4 and IPv6, ordered by id as in a DesiredRoute."""
    found = []
    for i in range(draw(st.integers(0, 12))):
        address = draw(st.sampled_from([f"192.0.2.{i}", f"2001:db8::{i:x}"]))
        host = f"[{address}]" if ":" in address else address
        found.append(
            Endpoint(
                EndpointId(f"{host}:8000"),
                address,
                8000,
                draw(GPUS),
                "",
                ready=draw(st.booleans()),
                workload=draw(PODS),
            )
        )
    return tuple(sorted(found, key=lambda e: e.id))


@st.composite
def plans(draw: st.DrawFn) -> RoutePlan:
    """Any plan that the core could make: sums of WEIGHT_TOTAL, zeros included; and rows of zeros."""
    ends = draw(BATCHES)
    sizes = tuple(
        SizeClass(f"s{i}", low, high, low, 0.1)
        for i, (low, high) in enumerate(zip(ends[::2], ends[1::2], strict=False))
    )
    delegate = draw(st.booleans())
    spec = RouteSpec(
        RouteId(f"team/{draw(st.sampled_from(['r', 'a.b', 'x' * 200]))}"),
        ("model.example", "*.models.example"),
        "m",
        0.1,
        0.99,
        draw(st.sampled_from([("x-batch-size",), ("x-batch-size", "batch_size", LEGACY_HEADER)])),
        sizes,
        mechanism=draw(st.sampled_from(Mechanism)),
        timeout_s=draw(st.floats(0.001, 3600)),
        gateways=() if delegate else (GATEWAY,),
        delegate=delegate,
        retry=draw(RETRIES),
        warm_up_s=draw(st.sampled_from([0.0, 0.5, 10.0])),
    )
    endpoints = draw(endpoint_lists())
    shares = st.fixed_dictionaries({e.id: st.sampled_from([0.0, 0.0, 0.001, 1.0, 1.0, 7.3]) for e in endpoints})
    names = [*(s.name for s in sizes), DEFAULT_CLASS]
    weights = {name: integers(normalised(draw(shares)), walk=False) for name in names}
    route = DesiredRoute(spec, endpoints, {})
    return RoutePlan(route, weights, LoadBalancer(), {}, {}, 0.0, True, frozenset(), ())


@given(plans())
def test_what_was_read_back_is_rendered_as_it_was(plan: RoutePlan) -> None:
    """So neither a restart nor a fail-over writes anything. What is read is a table as the core makes it."""
    rendered = render(plan)
    weights = weights_of(plan.route, objects(rendered))
    if weights is None:
        assert not any(e.ready for e in plan.route.endpoints)
        return
    for row in weights.values():
        assert list(row) == [e.id for e in plan.route.endpoints]
        assert sum(row.values()) == (WEIGHT_TOTAL if row else 0)
        assert all(e.ready or row[e.id] == 0 for e in plan.route.endpoints)
    again = render(dataclasses.replace(plan, weights=weights))
    assert json.dumps(objects(again)) == json.dumps(objects(rendered))


@given(plans())
def test_weights_of_endpoints_are_read_exactly(plan: RoutePlan) -> None:
    """Where everybody is ready, the table that was rendered is the table that is read, zeros included."""
    spec = dataclasses.replace(plan.route.spec, mechanism=Mechanism.ENDPOINTS)
    ready = tuple(dataclasses.replace(e, ready=True) for e in plan.route.endpoints)
    plan = dataclasses.replace(plan, route=dataclasses.replace(plan.route, spec=spec, endpoints=ready))
    read = weights_of(plan.route, objects(render(plan)))
    assert read is not None
    for size, row in plan.weights.items():
        if any(row.values()):
            assert read[size] == row


@given(plans())
def test_nothing_is_named_that_is_not_there(plan: RoutePlan) -> None:
    """Every host and subset of the VirtualService is among the backends; names are unique."""
    rendered = render(plan)
    keys = [key_of(value) for value in objects(rendered)]
    assert len(set(keys)) == len(keys)
    hosts = {h for v in rendered.backends if v["kind"] == SERVICE_ENTRY for h in v["spec"]["hosts"]}
    subsets = {
        s["name"] for v in rendered.backends if v["kind"] == DESTINATION_RULE for s in v["spec"].get("subsets", ())
    }
    for rule in rendered.virtual_service["spec"]["http"]:
        for destination in rule["route"]:
            assert destination["destination"]["host"] in hosts
            assert destination["destination"].get("subset") in {None, *subsets}


@given(plans())
def test_our_own_analysis_finds_no_error(plan: RoutePlan) -> None:
    """It runs before every write: what is rendered must pass."""
    found = check(objects(render(plan)), (), complete={SERVICE_ENTRY, DESTINATION_RULE, VIRTUAL_SERVICE})
    assert [finding for finding in found if finding.severity is Severity.ERROR] == []


@given(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1), st.sampled_from(["x-batch-size", LEGACY_HEADER]))
def test_patterns_fit_and_agree_with_the_range(one: int, two: int, header: str) -> None:
    """1024 characters at most, and full matches of exactly the sizes of the class."""
    size = SizeClass("s", min(one, two), max(one, two), 1, 1)
    pattern = size_pattern(header, size)
    assert len(pattern) < 1024
    before = "id:7 batch_size: " if header == LEGACY_HEADER else ""
    for batch in (one - 1, one, one + 1, two - 1, two, two + 1):
        assert bool(re.fullmatch(pattern, f"{before}{batch}")) == (size.min_batch <= batch <= size.max_batch)
