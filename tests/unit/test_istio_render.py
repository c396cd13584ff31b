"""What a plan looks like as Istio's objects."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from istio.endpoints import gpu_classes
from istio.names import (
    DESTINATION_RULE,
    ROUTE_API,
    SERVICE_ENTRY,
    VIRTUAL_SERVICE,
    backend_name,
    key_of,
    route_of,
    size_host,
    sizes_host,
    subsets_host,
)
from istio.render import render, weights_of
from meshctl.api.base import API_VERSION
from meshctl.model import (
    DEFAULT_CLASS,
    Endpoint,
    EndpointId,
    LbPolicy,
    LoadBalancer,
    Mechanism,
    Origin,
    Protocol,
    Retry,
    RouteId,
    RoutePlan,
    Workload,
)
from tests.harness.istio_plans import GATEWAY, meshed, objects, with_endpoints

A, B, C = "192.0.2.1:8000", "192.0.2.2:8000", "192.0.2.3:9000"
ROUTE = RouteId("team/resnet")
SIZES = ("small", "medium", "large", DEFAULT_CLASS)


def spec_of(plan: RoutePlan, kind: str, name: str) -> Any:
    """The spec of one rendered object."""
    (found,) = [v for v in objects(render(plan)) if key_of(v) == (kind, "team", name)]
    return found["spec"]


def endpoints_of(plan: RoutePlan, size: str = "small") -> dict[str, int | None]:
    """Address -> weight in the ServiceEntry of a size class."""
    spec = spec_of(plan, SERVICE_ENTRY, f"resnet.{size}.size")
    return {e["address"]: e.get("weight") for e in spec["endpoints"]}


def test_every_object_is_named_and_owned() -> None:
    """Names, labels and annotation say whose it is; the owner reference has it collected with its route."""
    plan = meshed(ROUTE, {A: 300, B: 700}, origin=Origin("uid-1", 3, "2026-01-02T03:04:05Z"))
    found = objects(render(plan))
    assert [key_of(v)[0::2] for v in found] == [
        *((SERVICE_ENTRY, f"resnet.{size}.size") for size in SIZES),
        (DESTINATION_RULE, "resnet.size"),
        (VIRTUAL_SERVICE, "resnet"),
    ]
    for value in found:
        metadata = value["metadata"]
        assert route_of(value) == ROUTE
        assert metadata["namespace"] == "team"
        assert metadata["annotations"]["meshctl.io/resumed-at"] == "2026-01-02T03:04:05Z"
        owner = {"apiVersion": ROUTE_API, "kind": "ModelRoute", "name": "resnet", "uid": "uid-1", "controller": True}
        assert metadata["ownerReferences"] == [owner]
    assert ROUTE_API == API_VERSION
    assert "ownerReferences" not in objects(render(meshed(ROUTE, {A: 1000})))[0]["metadata"]


def test_a_service_entry_has_the_endpoints_with_a_weight() -> None:
    """Weight 0 is left out (Istio reads it as 1), and so is what is not ready; the rest is scaled to what it had."""
    assert endpoints_of(meshed(ROUTE, {A: 300, B: 700, C: 0})) == {"192.0.2.1": 300, "192.0.2.2": 700}
    gone = meshed(ROUTE, {A: 300, B: 200, C: 500}, not_ready=(C,))
    assert endpoints_of(gone) == {"192.0.2.1": 600, "192.0.2.2": 400}
    spec = spec_of(gone, SERVICE_ENTRY, "resnet.small.size")
    assert spec["hosts"] == [size_host(ROUTE, "small")]
    assert (spec["resolution"], spec["location"]) == ("STATIC", "MESH_INTERNAL")
    assert spec["endpoints"][0]["ports"] == {"http": 8000}


@pytest.mark.parametrize("mechanism", Mechanism)
def test_grpc_servers_are_said_to_be_so(mechanism: Mechanism) -> None:
    """The port's protocol and name; weights are read back also where what is live still says HTTP."""
    plan = meshed(ROUTE, {A: 300, B: 700}, protocol=Protocol.GRPC, mechanism=mechanism)
    rendered = objects(render(plan))
    for entry in (value["spec"] for value in rendered if value["kind"] == SERVICE_ENTRY):
        assert [(port["name"], port["protocol"]) for port in entry["ports"]] == [("grpc", "GRPC")]
        assert [endpoint["ports"] for endpoint in entry["endpoints"]] == [{"grpc": 8000}, {"grpc": 8000}]
    before = objects(render(meshed(ROUTE, {A: 300, B: 700}, mechanism=mechanism)))
    assert weights_of(plan.route, before) == weights_of(plan.route, rendered) is not None


def test_no_size_class_has_zeros_only_while_something_is_ready() -> None:
    """A request that may be late is better than a 503; with nobody ready the host stays, without endpoints."""
    assert endpoints_of(meshed(ROUTE, {A: 0, B: 0})) == {"192.0.2.1": 500, "192.0.2.2": 500}
    assert endpoints_of(meshed(ROUTE, {A: 1000, B: 0}, not_ready=(A,))) == {"192.0.2.2": 1000}
    assert endpoints_of(meshed(ROUTE, {A: 1000}, not_ready=(A,))) == {}
    assert endpoints_of(with_endpoints(meshed(ROUTE, {A: 1000}), ())) == {}


def test_one_wildcard_rule_covers_all_size_classes() -> None:
    """Every host of the route is below it, and of no other route."""
    host = spec_of(meshed(ROUTE, {A: 1000}), DESTINATION_RULE, "resnet.size")["host"]
    assert host == sizes_host(ROUTE) == "*.resnet.team.sizes.meshctl.internal"
    assert all(size_host(ROUTE, size).endswith(host[1:]) for size in SIZES)
    assert not size_host(RouteId("team/other"), "small").endswith(host[1:])


def test_the_rules_find_the_size_class_by_the_first_header_present() -> None:
    """A rule per size class, a match per header that asks for the absence of those before; the last takes the rest."""
    rules = spec_of(meshed(ROUTE, {A: 1000}), VIRTUAL_SERVICE, "resnet")["http"]
    assert [rule["name"] for rule in rules] == list(SIZES)
    assert [rule["route"][0]["destination"]["host"] for rule in rules] == [size_host(ROUTE, size) for size in SIZES]
    medium = rules[1]["match"]
    assert [m["name"] for m in medium] == ["x-batch-size", "batch_size", "nv-inferrequest"]
    assert medium[0]["headers"] == {"x-batch-size": {"regex": r"\+?0*([8-9]|[1-2][0-9]|3[0-2])"}}
    assert [set(m.get("withoutHeaders", ())) for m in medium] == [
        set(),
        {"x-batch-size"},
        {"x-batch-size", "batch_size"},
    ]
    assert "match" not in rules[-1]


def test_who_owns_the_root_decides_hosts_and_gateways() -> None:
    """A root has both, hosts as Istio takes them (no ports, each once); a delegate has neither."""
    root = spec_of(
        meshed(ROUTE, {A: 1000}, hosts=("M.example:80", "m.example", "n.example")), VIRTUAL_SERVICE, "resnet"
    )
    assert (root["hosts"], root["gateways"]) == (["m.example", "n.example"], [GATEWAY])
    assert set(spec_of(meshed(ROUTE, {A: 1000}, delegate=True), VIRTUAL_SERVICE, "resnet")) == {"http"}


@pytest.mark.parametrize(
    ("retry", "expected"),
    [
        (Retry(), {"attempts": 2, "retryOn": "connect-failure,refused-stream,reset-before-request"}),
        (Retry(attempts=0), {"attempts": 0}),
        (Retry(attempts=0, per_try_timeout_s=1.0, idempotent=True), {"attempts": 0}),
        (
            Retry(attempts=3, per_try_timeout_s=0.25, idempotent=True),
            {
                "attempts": 3,
                "retryOn": "connect-failure,refused-stream,reset-before-request,reset,gateway-error",
                "perTryTimeout": "0.25s",
            },
        ),
    ],
)
def test_retries_are_always_explicit(retry: Retry, expected: dict[str, Any]) -> None:
    """Istio retries by default, and more than what no server has begun: that is said away, not left out."""
    plan = meshed(ROUTE, {A: 1000}, retry=retry, timeout_s=1.5)
    rules = spec_of(plan, VIRTUAL_SERVICE, "resnet")["http"]
    assert [(rule["retries"], rule["timeout"]) for rule in rules] == [(expected, "1.5s")] * 4
    policy = spec_of(plan, DESTINATION_RULE, "resnet.size")["trafficPolicy"]
    assert ("retryBudget" in policy) == retry.idempotent


@pytest.mark.parametrize(
    ("balancer", "warm_up_s", "expected"),
    [
        (LoadBalancer(), 10.0, {"simple": "LEAST_REQUEST", "warmup": {"duration": "10s"}}),
        (LoadBalancer(), 0.0, {"simple": "LEAST_REQUEST"}),
        (LoadBalancer(LbPolicy.ROUND_ROBIN), 0.0, {"simple": "ROUND_ROBIN"}),
        (LoadBalancer(active_request_bias=0.0), 0.0, {"simple": "ROUND_ROBIN"}),
    ],
)
def test_balancing(balancer: LoadBalancer, warm_up_s: float, expected: dict[str, Any]) -> None:
    """Zones never decide; a balancer that follows the table exactly is round robin, Istio has no bias."""
    plan = meshed(ROUTE, {A: 1000}, balancer=balancer, warm_up_s=warm_up_s)
    policy = spec_of(plan, DESTINATION_RULE, "resnet.size")["trafficPolicy"]
    assert policy["loadBalancer"] == {**expected, "localityLbSetting": {"enabled": False}}
    assert policy["outlierDetection"]["minHealthPercent"] == 0


def test_a_pods_identity_is_kept() -> None:
    """What the mesh reads of a pod is copied, nothing else; a pod without a sidecar is said to take no TLS."""
    labels = (("pod-template-hash", "5d8"), ("security.istio.io/tlsMode", "istio"), ("version", "v2"))
    pod = Workload("team", "triton-0", "node-1", labels, "triton")
    plan = meshed(ROUTE, {A: 500, B: 250, C: 250})
    first, second, third = plan.route.endpoints
    plan = with_endpoints(
        plan,
        (
            dataclasses.replace(first, workload=pod, locality="region/zone"),
            dataclasses.replace(second, workload=dataclasses.replace(pod, labels=())),
            dataclasses.replace(third, workload=dataclasses.replace(pod, namespace="elsewhere")),
        ),
    )
    a, b, c = spec_of(plan, SERVICE_ENTRY, "resnet.small.size")["endpoints"]
    assert a["labels"] == {"meshctl.io/gpu": "v100", "security.istio.io/tlsMode": "istio", "version": "v2"}
    assert (a["serviceAccount"], b["serviceAccount"]) == ("triton", "triton")
    assert b["labels"] == {"meshctl.io/gpu": "v100", "security.istio.io/tlsMode": "disabled"}
    assert "serviceAccount" not in c, "istiod would take it for one of the ServiceEntry's namespace"
    assert all("locality" not in e for e in (a, b, c))


def test_gpu_products_as_labels_and_subsets() -> None:
    """DNS labels whatever the product is called, told apart where two come out the same, up to 63 characters."""
    products = ["Tesla V100-SXM2/16GB", "T4", "", "a b", "a-b", "x" * 80, "y" * 80]
    made = gpu_classes(Endpoint(EndpointId(p), "", 1, p, "") for p in products)
    assert (made["Tesla V100-SXM2/16GB"], made["T4"], made[""]) == ("tesla-v100-sxm2-16gb", "t4", "unknown")
    assert len(set(made.values())) == len(products)
    assert all(0 < len(name) <= 63 for name in made.values())
    assert made["a b"].startswith("a-b-")


def on(plan: RoutePlan, *gpus: str) -> RoutePlan:
    """`plan` by subsets, its endpoints on `gpus`, in order."""
    endpoints = (dataclasses.replace(e, gpu=gpu) for e, gpu in zip(plan.route.endpoints, gpus, strict=True))
    spec = dataclasses.replace(plan.route.spec, mechanism=Mechanism.SUBSETS)
    plan = with_endpoints(plan, endpoints)
    return dataclasses.replace(plan, route=dataclasses.replace(plan.route, spec=spec))


def default_route(plan: RoutePlan) -> list[dict[str, Any]]:
    """Destinations of the default rule."""
    route: list[dict[str, Any]] = render(plan).virtual_service["spec"]["http"][-1]["route"]
    return route


def test_subsets_weigh_gpu_classes() -> None:
    """One ServiceEntry without weights, a subset per GPU class, weighted destinations with explicit zeros."""
    plan = on(
        meshed(ROUTE, {**{s: {A: 300, B: 300, C: 400} for s in SIZES}, "large": {A: 0, B: 0, C: 1000}}), "V", "V", "T"
    )
    entry, rule, service = objects(render(plan))
    assert entry["spec"]["hosts"] == [subsets_host(ROUTE)] == [rule["spec"]["host"]]
    assert [(e["address"], e["labels"]["meshctl.io/gpu"], "weight" in e) for e in entry["spec"]["endpoints"]] == [
        ("192.0.2.1", "v", False),
        ("192.0.2.2", "v", False),
        ("192.0.2.3", "t", False),
    ]
    assert rule["spec"]["subsets"] == [{"name": g, "labels": {"meshctl.io/gpu": g}} for g in ("t", "v")]
    shares = {r["name"]: {d["destination"]["subset"]: d["weight"] for d in r["route"]} for r in service["spec"]["http"]}
    assert shares == {**{s: {"t": 400, "v": 600} for s in SIZES}, "large": {"t": 1000, "v": 0}}


def test_subsets_leave_out_what_no_size_class_uses() -> None:
    """Single endpoints have no weight there: one that is drained must not stand among its class. Its class stays."""
    drained = on(meshed(ROUTE, {A: 0, B: 400, C: 600}), "V", "V", "T")
    entry, rule, _ = objects(render(drained))
    assert [e["address"] for e in entry["spec"]["endpoints"]] == ["192.0.2.2", "192.0.2.3"]
    entry, rule, service = objects(render(on(meshed(ROUTE, {A: 500, B: 500, C: 0}), "V", "V", "T")))
    assert [s["name"] for s in rule["spec"]["subsets"]] == ["t", "v"]
    assert [d["weight"] for d in service["spec"]["http"][0]["route"]] == [0, 1000]


def test_subsets_without_anybody_ready_are_still_valid() -> None:
    """Istio refuses zeros only, and a rule without a destination."""
    nobody = on(meshed(ROUTE, {A: 1000, B: 0}, not_ready=(A, B)), "V", "T")
    assert [d["weight"] for d in default_route(nobody)] == [1, 1]
    empty = on(with_endpoints(meshed(ROUTE, {A: 1000}), ()))
    assert [d["destination"]["host"] for d in default_route(empty)] == [subsets_host(ROUTE)]
    assert "subsets" not in render(empty).backends[1]["spec"]


@pytest.mark.parametrize("mechanism", Mechanism)
def test_a_weight_changes_nothing_else(mechanism: Mechanism) -> None:
    """Only what carries the weights differs: one ServiceEntry, or the VirtualService."""
    before = {s: {A: 300, B: 700} for s in SIZES}
    after = {**before, "large": {A: 400, B: 600}}
    plans = [meshed(ROUTE, weights, mechanism=mechanism) for weights in (before, after)]
    if mechanism is Mechanism.SUBSETS:
        plans = [on(plan, "V", "T") for plan in plans]
    old, new = (objects(render(plan)) for plan in plans)
    changed = [key_of(b)[0::2] for a, b in zip(old, new, strict=True) if a != b]
    carrier = (VIRTUAL_SERVICE, "resnet") if mechanism is Mechanism.SUBSETS else (SERVICE_ENTRY, "resnet.large.size")
    assert changed == [carrier]


def test_the_same_plan_gives_the_same_bytes() -> None:
    """The order of keys included."""
    plan = meshed(ROUTE, {A: 300, B: 700})
    assert json.dumps(objects(render(plan))) == json.dumps(objects(render(copy.deepcopy(plan))))


def test_names_that_are_too_long_for_a_host_still_make_one() -> None:
    """A ModelRoute's name may have 253 characters; hosts and names of objects then have a hash of it."""
    for name in ("a" * 253, "a" * 64, "x." * 60 + "x"):
        route = RouteId(f"{'n' * 63}/{name}")
        host = size_host(route, "s" * 63)
        assert len(host) <= 253
        assert all(len(label) <= 63 for label in host.split("."))
        assert len(backend_name(route, f"{'s' * 63}.size")) <= 253
    assert size_host(RouteId("n/a.b"), "small") == "small.a.b.n.sizes.meshctl.internal"


def test_weights_are_read_from_what_the_virtual_service_names() -> None:
    """After a change of mechanism it is the old one's objects; a new size class has the default's, which serves it."""
    plan = meshed(ROUTE, {**{s: {A: 300, B: 700} for s in SIZES}, "large": {A: 0, B: 1000}})
    live = objects(render(plan))
    weights = {size: {A: 300, B: 700} for size in SIZES} | {"large": {A: 0, B: 1000}}
    assert weights_of(plan.route, live) == weights
    other = dataclasses.replace(plan.route.spec, mechanism=Mechanism.SUBSETS)
    assert weights_of(dataclasses.replace(plan.route, spec=other), live) == weights
    large = dataclasses.replace(plan.route.spec.sizes[2], name="huge")
    sizes = (*plan.route.spec.sizes[:2], large)
    renamed = dataclasses.replace(plan.route, spec=dataclasses.replace(plan.route.spec, sizes=sizes))
    assert (weights_of(renamed, live) or {})["huge"] == {A: 300, B: 700}


def test_endpoints_that_came_or_went_since() -> None:
    """A new one has weight 0, one that is gone gives its share to the others."""
    plan = meshed(ROUTE, {A: 200, B: 300, C: 500})
    live = objects(render(plan))
    a, b, c = plan.route.endpoints
    new = dataclasses.replace(c, id=EndpointId("192.0.2.9:8000"), address="192.0.2.9")
    now = dataclasses.replace(plan.route, endpoints=(a, b, new))
    assert (weights_of(now, live) or {})["small"] == {a.id: 400, b.id: 600, new.id: 0}


@pytest.mark.parametrize("mechanism", Mechanism)
def test_what_is_not_all_there_has_no_weights(mechanism: Mechanism) -> None:
    """Nothing to take over: no VirtualService, a backend it names is missing, or all endpoints are gone."""
    plan = meshed(ROUTE, {A: 300, B: 700}, mechanism=mechanism)
    live = objects(render(plan))
    assert weights_of(plan.route, live) is not None
    assert weights_of(plan.route, live[:-1]) is None
    assert weights_of(plan.route, live[1:]) is None
    assert weights_of(plan.route, []) is None
    gone = meshed(ROUTE, {C: 1000}, mechanism=mechanism)
    assert weights_of(gone.route, live) is None
