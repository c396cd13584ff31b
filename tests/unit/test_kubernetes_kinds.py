"""What is kept of an object."""

from __future__ import annotations

from typing import Any

from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.ports import ObjectKey

META: dict[str, Any] = {
    "name": "a",
    "namespace": "ns",
    "uid": "u",
    "resourceVersion": "1",
    "labels": {"app": "x"},
    "annotations": {"meshctl.io/gpu": "g", "other": "o", "kubectl.kubernetes.io/last-applied-configuration": "{}"},
    "managedFields": [{"manager": "kubectl"}],
}
IDENTITY = {"name": "a", "namespace": "ns", "uid": "u", "labels": {"app": "x"}, "annotations": {"meshctl.io/gpu": "g"}}


def test_of_a_pod_that_is_on_no_node_yet_little_is_kept() -> None:
    """A pod without spec.nodeName, status.podIP or conditions is held all the same."""
    kept = KINDS["Pod"].kept({"metadata": META, "spec": {"containers": [{"image": "i"}]}})
    assert kept == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": IDENTITY,
        "spec": {},
        "status": {"conditions": []},
    }


def test_of_a_pod_that_goes_the_deletion_is_kept() -> None:
    """With its node, address, account and readiness, and no time of a probe."""
    condition = {"type": "Ready", "status": "True", "lastTransitionTime": "t", "lastProbeTime": None}
    raw = {
        "metadata": {**META, "deletionTimestamp": "now"},
        "spec": {"nodeName": "n", "serviceAccountName": "s", "volumes": []},
        "status": {"podIP": "192.0.2.1", "phase": "Running", "conditions": [condition]},
    }
    kept = KINDS["Pod"].kept(raw)
    assert kept["metadata"]["deletionTimestamp"] == "now"
    assert kept["spec"] == {"nodeName": "n", "serviceAccountName": "s"}
    assert kept["status"] == {"podIP": "192.0.2.1", "conditions": [{"type": "Ready", "status": "True"}]}


def test_of_an_endpoint_slice_the_endpoints_are_kept() -> None:
    """Addresses, conditions, node, zone, the pod; no hints, no resourceVersion of the pod."""
    endpoint = {
        "addresses": ["192.0.2.1"],
        "conditions": {"ready": True},
        "nodeName": "n",
        "zone": "z",
        "targetRef": {"kind": "Pod", "namespace": "ns", "name": "p", "uid": "u", "resourceVersion": "9"},
        "hints": {"forZones": []},
    }
    kept = KINDS["EndpointSlice"].kept(
        {"metadata": META, "addressType": "IPv4", "endpoints": [endpoint], "ports": None}
    )
    assert kept["endpoints"] == [
        {
            "addresses": ["192.0.2.1"],
            "conditions": {"ready": True},
            "nodeName": "n",
            "zone": "z",
            "targetRef": {"kind": "Pod", "namespace": "ns", "name": "p", "uid": "u"},
        }
    ]
    assert kept["ports"] == []


def test_the_field_managers_of_our_own_istio_objects_are_kept() -> None:
    """And of nobody else's, and the object that was sent is not changed."""
    ours = {"metadata": {**META, "labels": {"app.kubernetes.io/managed-by": "meshctl"}}, "spec": {"hosts": ["h"]}}
    before = str(ours)
    assert KINDS["VirtualService"].kept(ours)["metadata"]["managedFields"] == META["managedFields"]
    assert "managedFields" not in KINDS["VirtualService"].kept({"metadata": META})["metadata"]
    assert "managedFields" not in KINDS["ModelRoute"].kept(ours)["metadata"]
    kept = KINDS["ModelRoute"].kept(ours)
    assert kept["spec"] == {"hosts": ["h"]}
    assert set(kept["metadata"]["annotations"]) == {"meshctl.io/gpu", "other"}
    assert str(ours) == before


def test_the_field_managers_stay_when_our_label_is_taken_off() -> None:
    """Otherwise what we wrote would look like somebody else's object, which `resume` never takes back."""
    written = [{"manager": "meshctl", "operation": "Apply"}, {"manager": "kubectl-label"}]
    unlabelled = {"metadata": {"name": "n", "namespace": "ns", "managedFields": written}, "spec": {}}
    assert KINDS["VirtualService"].kept(unlabelled)["metadata"]["managedFields"] == written
    theirs = {"metadata": {"name": "n", "namespace": "ns", "managedFields": written[1:]}, "spec": {}}
    assert "managedFields" not in KINDS["VirtualService"].kept(theirs)["metadata"]


def test_paths_are_those_of_the_api() -> None:
    """The core group has its own root; a cluster's objects have no namespace."""
    assert KINDS["Pod"].path() == "/api/v1/pods"
    assert KINDS["Pod"].path("ns", "p") == "/api/v1/namespaces/ns/pods/p"
    assert KINDS["Node"].path("ignored", "n") == "/api/v1/nodes/n"
    route = KINDS["ModelRoute"].path("ns", "r", "status")
    assert route == "/apis/meshctl.io/v1alpha1/namespaces/ns/modelroutes/r/status"
    assert KINDS["Node"].key({"metadata": {"name": "n"}}) == ObjectKey("Node", "", "n")


def test_of_our_own_field_manager_only_the_name_is_kept() -> None:
    """What we own is a fifth of an object, and known; what others own makes a conflict, and is kept whole."""
    ours = {"manager": "meshctl", "operation": "Apply", "fieldsV1": {"f:spec": {}}, "time": "t"}
    other = {"manager": "kubectl-edit", "operation": "Update", "fieldsV1": {"f:spec": {"f:http": {}}}, "time": "t"}
    raw = {"metadata": {**META, "managedFields": [ours, other]}, "spec": {"http": []}}
    kept = KINDS["VirtualService"].kept(raw)
    assert kept["metadata"]["managedFields"] == [{"manager": "meshctl", "operation": "Apply"}, other]
    assert raw["metadata"]["managedFields"] == [ours, other]


def test_what_the_entries_of_a_route_have_in_common_is_held_once() -> None:
    """Each says what it said before; labels and ports of the same endpoint are the same object, whatever its weight."""

    def entry(weight: int) -> dict[str, Any]:
        endpoint = {"address": "192.0.2.1", "labels": {"app": "r"}, "ports": {"http": 8000}, "weight": weight}
        return {"metadata": META, "spec": {"hosts": ["h"], "endpoints": [endpoint, {"address": "192.0.2.2"}]}}

    one, other = (KINDS["ServiceEntry"].kept(entry(weight))["spec"] for weight in (1, 2))
    assert (one, other) == (entry(1)["spec"], entry(2)["spec"])
    assert one["endpoints"][0]["labels"] is other["endpoints"][0]["labels"]
    assert one["endpoints"][0]["ports"] is other["endpoints"][0]["ports"]
    strange = {"metadata": META, "spec": {"endpoints": None}}
    assert KINDS["ServiceEntry"].kept(strange)["spec"] == strange["spec"]
