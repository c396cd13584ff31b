"""A ModelRoute is strict in what it takes, and says where it is wrong; what it leaves out is the core's default."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from meshctl import model as core
from meshctl.api.base import validated
from meshctl.api.document import ManifestError
from meshctl.api.modelroute import ModelRoute
from meshctl.api.objects import Key, read_object
from tests.harness.manifests import ABSENT, changed, document, route

CLASSES = [
    {"name": "small", "min": 1, "max": 3, "share": 0.8},
    {"name": "medium", "min": 4, "max": 16, "share": 0.15},
    {"name": "large", "min": 32, "max": 128, "batch": 64, "share": 0.05},
]
FULL = route(
    hosts=["resnet.example.com"],
    requestSize={"classes": CLASSES},
    guard={"smoothing": "2s"},
    timeout="10s",
    expectedLoad=100,
)
C = "spec.requestSize.classes"
E = "spec.backend.endpoints"
S = "spec.backend.service"
SERVICE = {"name": "triton", "port": 8000}

BAD: list[tuple[str, str, Any, str, str]] = [
    # test id, path, value, field that is named, message
    ("unknown field", "spec.latency", "1s", "spec.latency", "is not a field here; known: backend, delegate"),
    ("misspelt field", "spec.slo.latncy", "1s", "spec.slo.latncy", "did you mean latency?"),
    ("misspelt in a list", f"{E}.0.adress", "x", f"{E}[0].adress", "did you mean address?"),
    ("snake case", f"{E}.0.metrics_port", 8002, f"{E}[0].metrics_port", "did you mean metricsPort?"),
    ("no model", "spec.model", ABSENT, "spec.model", "is required"),
    ("empty model", "spec.model", "", "spec.model", "at least 1 character"),
    ("no spec", "spec", ABSENT, "spec", "is required"),
    ("spec is a list", "spec", [], "spec", "must be a mapping"),
    ("spec is nothing", "spec", None, "spec", "is required; add it"),
    ("no SLO", "spec.slo", ABSENT, "spec.slo", "is required"),
    ("SLO without unit", "spec.slo.latency", 150, "spec.slo.latency", "150 has no unit; write a number with a unit"),
    ("SLO as text without unit", "spec.slo.latency", "150", "spec.slo.latency", "'150' has no unit"),
    ("SLO with a wrong unit", "spec.slo.latency", "150 msec", "spec.slo.latency", "'150 msec' is not a duration"),
    ("SLO zero", "spec.slo.latency", "0s", "spec.slo.latency", "must be longer than zero"),
    ("SLO negative", "spec.slo.latency", "-1s", "spec.slo.latency", "must not be negative"),
    ("SLO beyond the time-out", "spec.slo.latency", "11s", "spec.timeout", "10s is shorter than slo.latency, 11s"),
    ("percentile 100", "spec.slo.percentile", 100, "spec.slo.percentile", "must be less than 100, not 100"),
    ("percentile 0", "spec.slo.percentile", 0, "spec.slo.percentile", "must be greater than 0, not 0"),
    ("percentile as text", "spec.slo.percentile", "99%", "spec.slo.percentile", "must be a valid number, not '99%'"),
    ("percentile true", "spec.slo.percentile", True, "spec.slo.percentile", "must be a valid number, not true"),
    ("no backend", "spec.backend", ABSENT, "spec.backend", "is required"),
    ("backend without servers", "spec.backend", {}, "spec.backend", "give either service (a Service"),
    ("backend of another kind", "spec.backend.pods", {}, "spec.backend.pods", "known: endpoints, protocol, service"),
    ("backend of both kinds", "spec.backend.service", SERVICE, "spec.backend", "give either service (a Service"),
    ("Service port 0", "spec.backend", {"service": SERVICE | {"port": 0}}, f"{S}.port", "0 is neither a port (1 to"),
    ("Service port as text", "spec.backend", {"service": SERVICE | {"port": "80"}}, f"{S}.port", "without quotes"),
    ("Service port true", "spec.backend", {"service": SERVICE | {"port": True}}, f"{S}.port", "true is neither a port"),
    ("Service with capitals", "spec.backend", {"service": SERVICE | {"name": "A"}}, f"{S}.name", "does not match"),
    ("Service without a port", "spec.backend", {"service": {"name": "a"}}, f"{S}.port", "is required"),
    ("address with zeros", f"{E}.0.address", "fd00:0::1", f"{E}[0].address", "usually written; write fd00::1"),
    ("address with a zone", f"{E}.0.address", "fe80::1%eth0", f"{E}[0].address", "has a zone"),
    ("IPv4 in IPv6", f"{E}.0.address", "::ffff:1.2.3.4", f"{E}[0].address", "or an IPv4 address inside"),
    ("gateway with capitals", "spec.gateways", ["GW"], "spec.gateways[0]", "does not match"),
    ("gateway with two slashes", "spec.gateways", ["a/b/c"], "spec.gateways[0]", "does not match"),
    ("retries: 11", "spec.retry", {"attempts": 11}, "spec.retry.attempts", "less than or equal to 10, not 11"),
    ("retries: -1", "spec.retry", {"attempts": -1}, "spec.retry.attempts", "greater than or equal to 0"),
    ("try longer than all", "spec.retry.perTryTimeout", "11s", "spec.retry.perTryTimeout", "longer than timeout, 10s"),
    ("warm-up without unit", "spec.warmUp", 0, "spec.warmUp", "0 has no unit"),
    ("delegate for some hosts", "spec.delegate", True, "spec.hosts", "delegate excludes hosts: the VirtualService"),
    ("name of 64 characters", "metadata.name", "a" * 64, "metadata.name", "more than 63 characters"),
    ("annotation is a number", "metadata.annotations", {"a": 1}, "metadata.annotations.a", "must be a valid string"),
    ("unknown metadata", "metadata.nmae", "a", "metadata.nmae", "did you mean name?"),
    ("empty fleet", E, [], E, "is empty; give at least 1"),
    ("fleet is a mapping", E, {"a": 1}, E, "must be a list, not a mapping"),
    ("endpoint is text", f"{E}.0", "10.0.0.1:80", f"{E}[0]", "must be a mapping"),
    ("address is a name", f"{E}.0.address", "gpu-1", f"{E}[0].address", "'gpu-1' is not an IP address"),
    ("address out of range", f"{E}.0.address", "10.0.0.256", f"{E}[0].address", "is not an IP address"),
    ("port 0", f"{E}.0.port", 0, f"{E}[0].port", "greater than or equal to 1, not 0"),
    ("port 65536", f"{E}.0.port", 65536, f"{E}[0].port", "less than or equal to 65535"),
    ("port true", f"{E}.0.port", True, f"{E}[0].port", "must be a valid integer, not true"),
    ("port as text", f"{E}.0.port", "8000", f"{E}[0].port", "must be a valid integer, not '8000'"),
    ("port 8000.5", f"{E}.0.port", 8000.5, f"{E}[0].port", "must be a valid integer"),
    ("no GPU", f"{E}.0.gpu", ABSENT, f"{E}[0].gpu", "is required"),
    ("GPU with a line break", f"{E}.0.gpu", "V\n100", f"{E}[0].gpu", "does not match"),
    ("concurrency 0", f"{E}.0.concurrency", 0, f"{E}[0].concurrency", "greater than or equal to 1"),
    ("class named default", f"{C}.0.name", "default", f"{C}[0].name", "'default' is reserved"),
    ("class name with capitals", f"{C}.0.name", "Small", f"{C}[0].name", "does not match"),
    ("two classes of one name", f"{C}.1.name", "small", f"{C}[1].name", "'small' stands twice"),
    ("class starts at 0", f"{C}.0.min", 0, f"{C}[0].min", "greater than or equal to 1"),
    ("class starts below 0", f"{C}.0.min", -1, f"{C}[0].min", "greater than or equal to 1, not -1"),
    ("class ends before it starts", f"{C}.2.max", 31, f"{C}[2].max", "31 is less than min, 32"),
    ("classes overlap", f"{C}.1.max", 40, f"{C}[2]", "[32, 128] overlaps [4, 40] of class medium"),
    ("classes touch", f"{C}.0.max", 4, f"{C}[1]", "overlaps [1, 4] of class small"),
    ("batch outside its class", f"{C}.2.batch", 1, f"{C}[2].batch", "1 is outside [32, 128]"),
    ("share above 1", f"{C}.0.share", 1.5, f"{C}[0].share", "less than or equal to 1"),
    ("share negative", f"{C}.0.share", -0.1, f"{C}[0].share", "greater than or equal to 0"),
    ("share is a percentage", f"{C}.0.share", "80%", f"{C}[0].share", "must be a valid number, not '80%'"),
    ("shares sum to 0.9", f"{C}.0.share", 0.7, C, "the shares sum to 0.9; they must sum to 1"),
    ("one share missing", f"{C}.1.share", ABSENT, f"{C}[1].share", "is missing, but others have one"),
    ("no classes", C, [], C, "is empty; give at least 1"),
    ("no headers", "spec.requestSize.headers", [], "spec.requestSize.headers", "is empty; give at least 1"),
    ("header with a space", "spec.requestSize.headers", ["x y"], "spec.requestSize.headers[0]", "does not match"),
    ("header twice", "spec.requestSize.headers", ["A", "a"], "spec.requestSize.headers[1]", "a stands twice"),
    ("load 0", "spec.expectedLoad", 0, "spec.expectedLoad", "greater than 0"),
    ("load negative", "spec.expectedLoad", -5, "spec.expectedLoad", "greater than 0, not -5"),
    ("load as text", "spec.expectedLoad", "100", "spec.expectedLoad", "must be a valid number"),
    ("policy of another product", "spec.policy", "Random", "spec.policy", "'Balanced'"),
    ("policy in lower case", "spec.policy", "balanced", "spec.policy", "not 'balanced'"),
    ("mechanism unknown", "spec.mechanism", "Magic", "spec.mechanism", "'Endpoints' or 'Subsets'"),
    ("suspend yes", "spec.suspend", "yes", "spec.suspend", "must be a valid boolean, not 'yes'"),
    ("host with a scheme", "spec.hosts", ["http://a"], "spec.hosts[0]", "does not match"),
    ("host twice", "spec.hosts", ["a", "a"], "spec.hosts[1]", "'a' stands twice"),
    ("group twice", "spec.proxyGroups", ["a", "b", "a"], "spec.proxyGroups[2]", "'a' stands twice"),
    ("group with capitals", "spec.proxyGroups", ["Edge"], "spec.proxyGroups[0]", "does not match"),
    ("protocol in lower case", "spec.backend.protocol", "grpc", "spec.backend.protocol", "'HTTP' or 'GRPC'"),
    ("no hosts", "spec.hosts", [], "spec.hosts", "is empty; give at least 1"),
    ("hosts is text", "spec.hosts", "a", "spec.hosts", "must be a list, not 'a'"),
    ("guard: step 0", "spec.guard.maxStep", 0, "spec.guard.maxStep", "greater than 0"),
    ("guard: step above 1", "spec.guard.maxStep", 25, "spec.guard.maxStep", "less than or equal to 1, not 25"),
    ("guard: no unit", "spec.guard.dwell", 5, "spec.guard.dwell", "5 has no unit"),
    ("guard: smoothing 0", "spec.guard.smoothing", "0s", "spec.guard.smoothing", "longer than zero"),
]


@pytest.mark.parametrize(("path", "value", "field", "message"), [case[1:] for case in BAD], ids=[c[0] for c in BAD])
def test_bad_field_is_named(path: str, value: object, field: str, message: str) -> None:
    """Exactly the wrong field is reported, with its value and what it must be, and nothing else is."""
    with pytest.raises(ManifestError) as caught:
        validated(ModelRoute, document(changed(FULL, path, value)))
    assert [fault.field for fault in caught.value.faults] == [field]
    assert message in caught.value.faults[0].message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", ".NaN", "1e999"])
@pytest.mark.parametrize("field", ["expectedLoad: ", "guard: {deadBand: ", "slo: {latency: 1s, percentile: "])
def test_numbers_are_finite(field: str, number: str) -> None:
    """NaN and infinity are refused in every number."""
    spec = "model: m\nbackend: {endpoints: [{address: 1.1.1.1, port: 1, gpu: T4}]}\nslo: {latency: 1s}\n"
    if field.startswith("slo"):
        spec = spec.replace("slo: {latency: 1s}\n", "")
    lines = spec + field + number + ("}" if "{" in field else "")
    with pytest.raises(ManifestError, match="finite"):
        validated(ModelRoute, _under_spec(lines))


def _under_spec(lines: str) -> Any:
    from meshctl.api.document import parse

    head = "apiVersion: meshctl.io/v1alpha1\nkind: ModelRoute\nmetadata: {name: a}\nspec:\n"
    (only,) = parse((head + "\n".join("  " + line for line in lines.splitlines())).encode(), "f.yaml")
    return only


def test_every_fault_is_reported_in_the_order_of_the_text() -> None:
    """One look shows all that is wrong, each with its own line."""
    lines = "slo: {latency: 5}\nmodel: 7\nbackend:\n  endpoints:\n    - {address: x, port: 1, gpu: T4}\n"
    with pytest.raises(ManifestError) as caught:
        validated(ModelRoute, _under_spec(lines))
    assert [(f.place.line, f.place.column, f.field) for f in caught.value.faults] == [
        (5, 9, "spec.slo.latency"),
        (6, 3, "spec.model"),
        (9, 10, "spec.backend.endpoints[0].address"),
    ]


def test_smallest_route_has_the_cores_defaults() -> None:
    """What is left out is what the core takes anyway; one class is every size, standing for batch 1."""
    found = validated(ModelRoute, document(route())).route_spec()
    assert found == core.RouteSpec(
        id=core.RouteId("default/resnet"),
        hosts=("*",),
        model="resnet50",
        slo_s=0.15,
        percentile=0.99,
        headers=("x-batch-size", "batch_size", "nv-inferrequest"),
        sizes=(core.SizeClass("all", 1, 1_000_000, 1.0, 1.0),),
    )


def test_full_route_is_converted() -> None:
    """Times are seconds, percentages ratios, headers lower case, classes in order of batch with shares of sum 1."""
    data = changed(FULL, "spec.requestSize.classes", [CLASSES[2], CLASSES[0], CLASSES[1]])
    data = changed(data, "spec.guard", {"smoothing": "2s", "dwell": "0s", "headroom": 0})
    found = validated(ModelRoute, document(data)).route_spec(generation=7)
    assert [s.name for s in found.sizes] == ["small", "medium", "large"]
    assert found.sizes[1].batch == 8.0  # the geometric mean of 4 and 16
    assert found.sizes[2].batch == 64.0
    assert sum(s.share for s in found.sizes) == pytest.approx(1, abs=1e-12)
    assert (found.timeout_s, found.expected_load_rps, found.generation) == (10.0, 100.0, 7)
    assert found.guard == core.Guard(smoothing_s=2.0, dwell_s=0.0, headroom_ratio=0.0)


def test_shares_are_equal_when_none_is_given() -> None:
    """Without a declared mix every class is as likely as the next."""
    classes = [{"name": n, "min": i, "max": i} for i, n in enumerate("abc", start=1)]
    found = validated(ModelRoute, document(route(requestSize={"classes": classes})))
    assert [s.share for s in found.spec.request_size.sizes()] == [1 / 3] * 3


def test_shares_written_with_three_digits_are_scaled() -> None:
    """0.333 three times means thirds."""
    classes = [{"name": n, "min": i, "max": i, "share": 0.333} for i, n in enumerate("abc", start=1)]
    found = validated(ModelRoute, document(route(requestSize={"classes": classes})))
    assert sum(s.share for s in found.spec.request_size.sizes()) == pytest.approx(1, abs=1e-12)


def test_endpoints_are_ordered_and_addressed() -> None:
    """Endpoints come by id, IPv6 in brackets, metrics on the port given or Triton's."""
    endpoints = [
        {"address": "fd00::1", "port": 8000, "gpu": "T4"},
        {"address": "10.0.0.2", "port": 8000, "gpu": "V100", "metricsPort": 9, "gpuUUID": "GPU-1", "concurrency": 2},
    ]
    first, second = validated(ModelRoute, document(route(backend={"endpoints": endpoints}))).endpoints()
    assert (first.id, first.metrics, first.gpu_uuid, first.concurrency) == ("10.0.0.2:8000", "10.0.0.2:9", "GPU-1", 2)
    assert (second.id, second.metrics, second.ready) == ("[fd00::1]:8000", "[fd00::1]:8002", True)


def test_endpoint_twice_is_named() -> None:
    """The same address and port stands once; the same address with another port is another server."""
    endpoints = [{"address": "::1", "port": port, "gpu": "T4"} for port in (1, 2, 1)]
    with pytest.raises(ManifestError, match=r"endpoints\[2\]: \[::1\]:1 stands twice"):
        validated(ModelRoute, document(route(backend={"endpoints": endpoints})))


def test_service_needs_no_endpoints() -> None:
    """Behind a Service the servers are found, not listed."""
    found = validated(ModelRoute, document(route(backend={"service": {"name": "triton", "port": "http"}})))
    assert found.endpoints() == ()
    service = found.spec.backend.service
    assert service is not None
    assert (service.name, service.port, service.metrics_port, service.concurrency) == ("triton", "http", 8002, 1)


def test_mesh_fields_are_converted() -> None:
    """Gateways get the route's namespace where they name none, each once; retries and warm-up are in seconds."""
    data = changed(FULL, "metadata.namespace", "ml")
    data = changed(data, "spec.gateways", ["gw", "istio-system/public", "mesh", "ml/gw"])
    data = changed(data, "spec.retry", {"attempts": 1, "perTryTimeout": "500ms", "idempotent": True})
    found = validated(ModelRoute, document(changed(data, "spec.warmUp", "0s"))).route_spec()
    assert found.gateways == ("ml/gw", "istio-system/public", "mesh")
    assert (found.retry, found.warm_up_s, found.meshed) == (core.Retry(1, 0.5, idempotent=True), 0.0, True)


def test_whom_our_own_server_serves_is_converted() -> None:
    """Groups as they stand, none of them too; the servers' protocol is the core's."""
    data = changed(FULL, "spec.backend.protocol", "GRPC")
    found = validated(ModelRoute, document(changed(data, "spec.proxyGroups", ["edge", "batch"]))).route_spec()
    assert (found.protocol, found.proxy_groups) == (core.Protocol.GRPC, ("edge", "batch"))
    assert validated(ModelRoute, document(route(proxyGroups=[]))).route_spec().proxy_groups == ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"delegate": True, "gateways": ["gw"]}, "delegate excludes gateways"),
        ({"gateways": ["gw"], "hosts": ["a.example.com:80"]}, "'a.example.com:80' has a port, which the Gateway says"),
        ({"gateways": ["mesh"]}, "gateway mesh needs hosts of its own"),
    ],
    ids=["delegate with gateways", "host with a port", "all requests of all sidecars"],
)
def test_what_istio_would_refuse_is_refused(spec: dict[str, Any], message: str) -> None:
    """Hosts and gateways that contradict each other are named before anything is written."""
    with pytest.raises(ManifestError, match=message):
        validated(ModelRoute, document(route(**spec)))


def test_delegate_has_neither_hosts_nor_gateways() -> None:
    """A delegate is in the mesh all the same."""
    found = validated(ModelRoute, document(route(delegate=True))).route_spec()
    assert (found.delegate, found.gateways, found.hosts, found.meshed) == (True, (), ("*",), True)


def test_null_is_absent() -> None:
    """`field: null` (or nothing after the colon) is the default, as for the API server."""
    data = route(gateways=None, retry={"perTryTimeout": None}, expectedLoad=None, guard=None)
    assert validated(ModelRoute, document(data)) == validated(ModelRoute, document(route()))


AS_STORED: dict[str, Any] = {
    "uid": "0c5f3d2e",
    "generation": 3,
    "resourceVersion": "42",
    "creationTimestamp": "2026-01-01T00:00:00Z",
    "labels": {"app.kubernetes.io/part-of": "ml"},
    "annotations": {"meshctl.io/resumed-at": "2026-01-02T00:00:00Z"},
    "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
    "ownerReferences": [{"name": "x"}],
}


def as_stored(data: dict[str, Any]) -> dict[str, Any]:
    """As `kubectl get -o yaml` prints it."""
    status = {"conditions": [], "observedGeneration": 3, "fieldOfALaterVersion": 1}
    return data | {"metadata": data["metadata"] | AS_STORED, "status": status}


def test_manifest_read_back_from_kubernetes_is_valid() -> None:
    """What the API server adds to metadata, and the status, do not make an object invalid; the origin is known."""
    found = validated(ModelRoute, document(as_stored(FULL))).route_spec()
    assert found.origin == core.Origin("0c5f3d2e", 3, "2026-01-02T00:00:00Z")
    assert dataclasses.replace(found, origin=None) == validated(ModelRoute, document(FULL)).route_spec()


def test_what_is_written_by_others_changes_nothing() -> None:
    """A new status or resourceVersion gives an equal object, so that nothing is decided anew."""
    stored = as_stored(FULL)
    later = changed(changed(stored, "metadata.resourceVersion", "43"), "status", {"observedGeneration": 4})
    assert validated(ModelRoute, document(later)) == validated(ModelRoute, document(stored))


def test_object_of_an_older_schema_is_broken_not_fatal() -> None:
    """An object that the API server stored before a rule existed is known by name, with what is wrong and no place."""
    found = read_object(changed(as_stored(FULL), "spec.slo.latency", "150 ms"), "cluster")
    assert (dict(found.objects), found.complete) == ({}, True)
    assert found.broken == {Key("ModelRoute", "default", "resnet")}
    (fault,) = found.faults
    assert fault.problem().where == "cluster"
    assert fault.problem().route == "default/resnet"
    assert "'150 ms' is not a duration" in fault.message


@pytest.mark.parametrize("value", [{}, {"apiVersion": "meshctl.io/v1alpha1", "kind": "ModelRoute"}, 5, None])
def test_anything_else_in_place_of_an_object_is_a_fault(value: Any) -> None:
    """Not even an answer that is no object is a crash."""
    found = read_object(value, "cluster")
    assert (found.objects, found.complete, len(found.faults)) == ({}, False, 1)


def test_live_object_is_read_like_its_manifest() -> None:
    """`read_object` and `read_manifest` give the same value."""
    (live,) = read_object(as_stored(FULL), "cluster").objects.values()
    assert live.value == validated(ModelRoute, document(as_stored(FULL)))
