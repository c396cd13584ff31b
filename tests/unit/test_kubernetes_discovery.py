"""Service -> slices -> pods -> nodes -> endpoints: who answers, where, on which GPU, and who may get requests."""

from __future__ import annotations

from typing import Any

import pytest

from istio.names import key_of
from meshctl.adapters.kubernetes.discovery import discover
from meshctl.adapters.kubernetes.holders import GpuHolders, HeldGpu
from meshctl.api.resolve import Servers, ServiceRef
from meshctl.model import Endpoint, EndpointId, Workload
from meshctl.ports import ObjectKey
from tests.harness.cluster_objects import endpoint_slice, gpu, member, node, pod, service

REF = ServiceRef("default", "triton", "http", 8002, 1)


def found(*objects: dict[str, Any], ref: ServiceRef = REF, default: bool = True) -> Servers:
    """What is behind the Service `triton`, which is there unless `default` is false."""
    known = {key_of(value): value for value in ((service(),) if default else ()) + objects}
    slices = [value for key, value in known.items() if key.kind == "EndpointSlice"]
    holders = GpuHolders()
    for key, value in known.items():
        if key.kind == "GPU":
            holders.take(key, value)
    return discover(ref, slices, known.get, holders.of)


def one(*objects: dict[str, Any], ref: ServiceRef = REF) -> Endpoint:
    (only,) = found(*objects, ref=ref).endpoints
    return only


def test_an_endpoint_has_all_that_the_objects_say() -> None:
    """Address from the slice, identity from the pod, GPU and zone from the node, the rest from the route."""
    labels = {"topology.kubernetes.io/region": "eu", "topology.kubernetes.io/zone": "eu-1"}
    servers = found(
        endpoint_slice("a", [member("t-0", "10.0.0.1", "n1")]),
        pod("t-0", "n1", labels={"version": "v1", "app": "triton"}, annotations={"meshctl.io/gpu-uuid": "GPU-1,GPU-2"}),
        node("n1", "Tesla-V100-SXM2-16GB", **labels),
        ref=ServiceRef("default", "triton", 80, 9002, 4),
    )
    assert servers == Servers(
        (
            Endpoint(
                id=EndpointId("10.0.0.1:8000"),
                address="10.0.0.1",
                port=8000,
                gpu="Tesla-V100-SXM2-16GB",
                metrics="10.0.0.1:9002",
                gpu_uuid="GPU-1",
                concurrency=4,
                locality="eu/eu-1",
                workload=Workload("default", "t-0", "n1", (("app", "triton"), ("version", "v1")), "triton"),
            ),
        )
    )


@pytest.mark.parametrize(
    ("pod_says", "node_says", "gpu"),
    [
        ({"annotations": {"meshctl.io/gpu-product": "L4"}}, {"nvidia.com/gpu.product": "A10"}, "L4"),
        ({"labels": {"nvidia.com/gpu.product": "L4"}}, {"nvidia.com/gpu.product": "A10"}, "L4"),
        ({"annotations": {"meshctl.io/gpu-product": "?!"}}, {"nvidia.com/gpu.product": "A10"}, "A10"),
        ({}, {"nvidia.com/gpu.product": "Tesla-T4-SHARED"}, "Tesla-T4"),
        ({}, {"nvidia.com/gpu.product": "NVIDIA-A100-MIG-1g.5gb"}, "NVIDIA-A100-MIG-1g.5gb"),
        ({}, {"nvidia.com/gpu.product": "NVIDIA-A100-MIG-1g.5gb-SHARED"}, "NVIDIA-A100-MIG-1g.5gb"),
        ({}, {"nvidia.com/gpu.product": "NVIDIA-A100-MIG-INVALID"}, ""),
        ({}, {"cloud.google.com/gke-accelerator": "nvidia-l4", "nvidia.com/gpu.product": "NVIDIA-L4"}, "NVIDIA-L4"),
        ({}, {"cloud.google.com/gke-accelerator": "nvidia-l4"}, "nvidia-l4"),
        (
            {},
            {
                "cloud.google.com/gke-accelerator": "nvidia-tesla-a100",
                "cloud.google.com/gke-gpu-partition-size": "1g.5gb",
            },
            "nvidia-tesla-a100-MIG-1g.5gb",
        ),
        ({}, {"k8s.amazonaws.com/accelerator": "nvidia-tesla-v100"}, "nvidia-tesla-v100"),
        ({}, {"amd.com/gpu.product-name": "AMD_Instinct_MI300X_OAM"}, "AMD_Instinct_MI300X_OAM"),
        ({}, {"kubernetes.io/arch": "amd64"}, ""),
    ],
)
def test_the_gpu_product(pod_says: dict[str, Any], node_says: dict[str, str], gpu: str) -> None:
    """The pod's own word, then GPU discovery's, then the cloud's; sharing is no product, a MIG slice is one."""
    objects = endpoint_slice("a", [member("t-0", "10.0.0.1", "n1")]), pod("t-0", **pod_says), node("n1", **node_says)
    assert one(*objects).gpu == gpu


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([], ("L4", "GPU-9")),
        ([gpu("GPU-1", "n1", "Tesla V100-SXM2-16GB", "default/t-0")], ("Tesla-V100-SXM2-16GB", "GPU-1")),
        ([gpu("GPU-1", "n2", "NVIDIA H200", "default/t-0")], ("L4", "GPU-9")),
        ([gpu("GPU-1", "n1", "NVIDIA H200", "other/t-0", "default/t-00")], ("L4", "GPU-9")),
        ([gpu("GPU-1", "n1", "", "default/t-0")], ("L4", "GPU-1")),
        (
            [gpu("GPU-2", "n1", "NVIDIA H100", "default/t-0"), gpu("GPU-1", "n1", "NVIDIA H200", "default/t-0")],
            ("NVIDIA-H200", "GPU-1"),
        ),
    ],
    ids=["no agent", "held", "held on another node", "held by others", "unknown product", "held on two"],
)
def test_a_pod_that_holds_slots_is_on_that_gpu(gpus: list[dict[str, Any]], expected: tuple[str, str]) -> None:
    """What the node's agent says counts for more than the pod's annotations and the node's labels."""
    said = {"meshctl.io/gpu-product": "L4", "meshctl.io/gpu-uuid": "GPU-9"}
    endpoint = one(
        endpoint_slice("a", [member("t-0", "10.0.0.1", "n1")]), pod("t-0", annotations=said), node("n1", "A10"), *gpus
    )
    assert (endpoint.gpu, endpoint.gpu_uuid) == expected


def test_a_gpu_tells_only_of_the_pods_of_which_it_says_something_new() -> None:
    """A heartbeat tells of nobody, a new holder of one pod, a GPU that goes of all its holders."""
    holders, key = GpuHolders(), ObjectKey("GPU", "", "gpu-1")
    a, b = (ObjectKey("Pod", "default", name) for name in ("a", "b"))
    assert holders.take(key, gpu("GPU-1", "n1", "T4", "default/a")) == {a}
    assert holders.take(key, gpu("GPU-1", "n1", "T4", "default/a", heartbeat="2026-01-01T00:00:00Z")) == set()
    assert holders.take(key, gpu("GPU-1", "n1", "T4", "default/a", "default/b")) == {b}
    assert (holders.of(a, ""), holders.of(a, "n2")) == (HeldGpu("GPU-1", "T4", "n1"), None)
    assert holders.take(key, None) == {a, b}
    assert holders.of(a, "") is None
    assert holders.take(key, None) == set()


def test_an_unknown_gpu_is_a_class_of_its_own_and_a_remark() -> None:
    """The pods stay in; the text names some of them, their nodes, and both ways to say the product."""
    members = [member(f"t-{i}", f"10.0.0.{i}", "n1") for i in range(1, 6)]
    servers = found(endpoint_slice("a", members), node("n1"))
    assert [e.gpu for e in servers.endpoints] == [""] * 5
    assert servers.remarks == (
        (
            "the GPU of t-1, t-2, t-3 and 2 more (node n1) is unknown: they are served as a class of their own;"
            " label the node nvidia.com/gpu.product=PRODUCT (GPU feature discovery does),"
            " or annotate the pod meshctl.io/gpu-product=PRODUCT"
        ),
    )


@pytest.mark.parametrize(
    ("conditions", "ready"),
    [
        ({"ready": True, "serving": True, "terminating": False}, True),
        ({}, True),
        ({"ready": None}, True),
        ({"ready": False}, False),
        ({"ready": False, "serving": True, "terminating": True}, False),
        ({"ready": True, "serving": True, "terminating": True}, False),
    ],
)
def test_readiness(conditions: dict[str, bool | None], ready: bool) -> None:
    """Unknown is ready; terminating is not, even where the Service publishes addresses that are not ready."""
    assert one(endpoint_slice("a", [member("t-0", "10.0.0.1", conditions=conditions)])).ready is ready


def test_a_pod_being_deleted_is_not_ready_before_its_slice_says_so() -> None:
    """The pod is told of first; its successor of the same name (another UID) does not speak for it."""
    members = endpoint_slice("a", [member("t-0", "10.0.0.1")])
    assert not one(members, pod("t-0", deletionTimestamp="2026-01-01T00:00:00Z")).ready
    successor = pod("t-0", uid="another", deletionTimestamp="2026-01-01T00:00:00Z", labels={"new": "yes"})
    assert one(members, successor) == one(members)


def test_without_pod_and_node_the_slice_alone_counts() -> None:
    """Nothing is lost while a pod is not known yet: node name and zone hint come from the slice."""
    endpoint = one(endpoint_slice("a", [member("t-0", "10.0.0.1", "n1", zone="eu-1")]))
    assert endpoint.workload == Workload("default", "t-0", "n1")
    assert (endpoint.locality, endpoint.ready) == ("/eu-1", True)
    labels = {"topology.kubernetes.io/region": "eu", "topology.kubernetes.io/zone": "eu-2"}
    assert (
        one(endpoint_slice("a", [member("t-0", "10.0.0.1", zone="eu-1")]), pod("t-0", labels=labels)).locality
        == "eu/eu-2"
    )


def test_an_endpoint_that_is_no_pod_is_served_too() -> None:
    """A slice somebody wrote for servers outside the cluster."""
    servers = found(endpoint_slice("a", [{"addresses": ["10.9.0.1"]}, {"addresses": ["10.9.0.2"]}]))
    assert [(e.id, e.workload) for e in servers.endpoints] == [("10.9.0.1:8000", None), ("10.9.0.2:8000", None)]


def test_dual_stack_pods_are_one_endpoint_each() -> None:
    """IPv4 where there is both; IPv6 in its one form, with brackets where a port follows."""
    v4 = endpoint_slice("v4", [member("t-0", "10.0.0.1")])
    v6 = endpoint_slice("v6", [member("t-0", "fd00::1"), member("t-1", "fd00:0::2")], addressType="IPv6")
    assert [(e.id, e.address, e.metrics) for e in found(v6, v4).endpoints] == [
        ("10.0.0.1:8000", "10.0.0.1", "10.0.0.1:8002"),
        ("[fd00::2]:8000", "fd00::2", "[fd00::2]:8002"),
    ]


def test_an_endpoint_in_two_slices_counts_once() -> None:
    """While the controller moves it, one slice may be behind: ready wins, in whatever order the slices come."""
    old = endpoint_slice("old", [member("t-0", "10.0.0.1", conditions={"ready": False}), member("t-1", "10.0.0.2")])
    new = endpoint_slice("new", [member("t-0", "10.0.0.1"), member("t-1", "10.0.0.2")])
    assert found(old, new) == found(new, old)
    assert [(e.id, e.ready) for e in found(old, new).endpoints] == [("10.0.0.1:8000", True), ("10.0.0.2:8000", True)]


def test_an_address_that_a_new_pod_has_taken_over_is_the_new_pods() -> None:
    """The old pod's entry is not ready any more; one endpoint per address and port."""
    old = member("gone", "10.0.0.1", conditions={"ready": False, "terminating": True})
    endpoint = one(endpoint_slice("a", [old, member("t-0", "10.0.0.1")]))
    assert endpoint.workload is not None
    assert (endpoint.workload.name, endpoint.ready) == ("t-0", True)


@pytest.mark.parametrize("ref_port", ["grpc", 90])
def test_the_port_is_the_pods_one_of_each_slice(ref_port: int | str) -> None:
    """A named target port may be another number in another pod: the slices say which."""
    ports = {"name": "http", "port": 80, "targetPort": "h"}, {"name": "grpc", "port": 90, "targetPort": "g"}
    slices = [
        endpoint_slice("a", [member("t-0", "10.0.0.1")], ports=[{"name": "grpc", "port": 8001}, {"name": "http"}]),
        endpoint_slice("b", [member("t-1", "10.0.0.2")], ports=[{"name": "grpc", "port": 9001, "protocol": "TCP"}]),
        endpoint_slice("c", [member("t-2", "10.0.0.3")], ports=[{"name": "grpc", "port": 9, "protocol": "UDP"}]),
    ]
    servers = found(service("triton", *ports), *slices, ref=REF._replace(port=ref_port), default=False)
    assert [e.id for e in servers.endpoints] == ["10.0.0.1:8001", "10.0.0.2:9001"]


def test_ports_without_a_name() -> None:
    """The only port of a Service has none, and nor has the slice's; a headless Service may have no port at all."""
    unnamed = endpoint_slice("a", [member("t-0", "10.0.0.1")], ports=[{"name": "", "port": 8000}])
    by_number = REF._replace(port=80)
    assert one(service("triton", {"port": 80, "targetPort": 8000}), unnamed, ref=by_number).id == "10.0.0.1:8000"
    bare = endpoint_slice("a", [member("t-0", "10.0.0.1")], ports=[])
    headless = service("triton", clusterIP="None") | {"spec": {"clusterIP": "None", "selector": {"a": "b"}}}
    assert one(headless, bare, ref=REF._replace(port=8000)).id == "10.0.0.1:8000"


@pytest.mark.parametrize(
    ("objects", "port", "remark"),
    [
        ([], "http", "Service default/triton does not exist; create it, or correct the name"),
        (
            [service(type="ExternalName")],
            "http",
            (
                "Service default/triton is an ExternalName, which has no pods; name one that selects pods, or list"
                " static endpoints"
            ),
        ),
        (
            [service()],
            8000,
            "Service default/triton has no TCP port 8000; it has 80 (http): correct spec.backend.service.port",
        ),
        (
            [service()],
            "http",
            (
                "Service default/triton has no endpoints: no running pod has an address and the labels app=triton; see"
                " `kubectl get pods -l app=triton`"
            ),
        ),
        (
            [service(selector={})],
            "http",
            "Service default/triton has no endpoints, and no selector: give it one, or an EndpointSlice",
        ),
        (
            [service(), endpoint_slice("a", [{"addresses": ["db.example.com"]}], addressType="FQDN")],
            "http",
            (
                "Service default/triton has no endpoints with an IP address on TCP port 'http'; its EndpointSlices have"
                " 8000 http TCP"
            ),
        ),
    ],
)
def test_a_service_without_servers_says_why(objects: list[dict[str, Any]], port: int | str, remark: str) -> None:
    """No endpoints, and words that say what to do."""
    assert found(*objects, ref=REF._replace(port=port), default=False) == Servers((), (remark,))
