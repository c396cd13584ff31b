"""What the extender keeps of each object; that it is read alike is in tests/property."""

from __future__ import annotations

from typing import Any

import pytest

from meshctl.extender.views import VIEWS
from tests.harness.extender_objects import container, node, pod
from tests.harness.gpus import condition, gpu_object


def kept(kind: str, raw: dict[str, Any]) -> Any:
    return VIEWS[kind].kept(raw)


def test_of_a_pod_what_is_demanded_is_kept_once_for_all_that_demand_it() -> None:
    """20,000 pods of a few hundred Deployments."""
    one, other = (kept("Pod", pod(name, container("c", 3, cpu="1"))) for name in ("a", "b"))
    assert one["spec"] == {
        "resources": {"requests": {"cpu": "1000m", "memory": "0Mi"}},
        "containers": [{"name": "c", "resources": {"limits": {"hpe.com/gpus": "3"}}}],
    }
    assert one["spec"]["containers"] is other["spec"]["containers"]


def test_a_pod_on_a_node_changes_only_by_what_it_holds() -> None:
    """Its version, its labels, its probes and its address are no news; its start, its end and its deletion are."""
    raw = pod(node="n", started=True, phase="Running", metadata={"labels": {"app": "x"}})
    before = kept("Pod", raw)
    meta, status = raw["metadata"], raw["status"]
    news = {**raw, "status": {**status, "podIP": "192.0.2.1", "conditions": [{"type": "Ready"}]}}
    assert kept("Pod", {**news, "metadata": {**meta, "resourceVersion": "2", "labels": {}}}) == before
    assert kept("Pod", {**raw, "metadata": {**meta, "deletionTimestamp": "now"}}) != before
    assert kept("Pod", {**raw, "status": {"phase": "Failed"}}) != before


@pytest.mark.parametrize(("reason", "there"), [("Unschedulable", True), ("SchedulingGated", False)])
def test_of_conditions_it_is_kept_that_the_scheduler_found_no_node(reason: str, there: bool) -> None:
    """Who is to be woken when there is room is known after a restart, too. On a node, it is no news any more."""
    raw = pod()
    raw["status"]["conditions"] = [condition("Ready", "False", "", ""), condition("PodScheduled", "False", reason, "")]
    refused = {"type": "PodScheduled", "status": "False", "reason": reason}
    assert kept("Pod", raw)["status"].get("conditions", []) == ([refused] if there else [])
    raw["status"]["conditions"] = [condition("PodScheduled", "True", "", "")]
    assert "conditions" not in kept("Pod", raw)["status"]


def test_a_pod_on_no_node_changes_with_every_version() -> None:
    """Its binding names the newest."""
    raw = pod()
    assert kept("Pod", {**raw, "metadata": {**raw["metadata"], "resourceVersion": "2"}}) != kept("Pod", raw)


@pytest.mark.parametrize(
    "change", ["heartbeat", "memory", "mps", "driver", "conditions", "summary", "tenant", "policy"]
)
def test_a_gpu_changes_only_by_its_slots(change: str) -> None:
    """Not by when it was seen, or by how many clients its MPS daemon has."""
    news: dict[str, Any] = {
        change: [condition("Healthy", "True", "Healthy", "again")] if change == "conditions" else "x"
    }
    assert kept("GPU", gpu_object("n", "GPU-A", **news)) == kept("GPU", gpu_object("n", "GPU-A"))


@pytest.mark.parametrize("change", [{"resourceName": "x/y"}, {"isolation": "Tenant"}, {"severalGPUs": True}])
def test_a_gpu_that_is_shared_otherwise_changed(change: dict[str, Any]) -> None:
    """And one that gives no slots any more."""
    before = kept("GPU", gpu_object("n", "GPU-A"))
    assert kept("GPU", gpu_object("n", "GPU-A", **change)) != before
    assert kept("GPU", gpu_object("n", "GPU-A", conditions=[condition("Healthy", "False", "Xid", "79")])) != before


def test_of_a_node_its_cpu_and_memory_are_kept() -> None:
    """Conditions come every few seconds from each of 5000."""
    raw = node()
    beats = {**raw, "status": {**raw["status"], "conditions": [{"type": "Ready", "lastHeartbeatTime": "now"}]}}
    assert kept("Node", beats) == kept("Node", raw)
    assert kept("Node", raw)["status"] == {"allocatable": {"cpu": "32", "memory": "128Gi"}}
    assert kept("Node", node(cpu="31")) != kept("Node", raw)


def test_of_a_service_its_selector_is_kept() -> None:
    """And of routes and profiles no status, which the controller writes."""
    raw = {"metadata": {"name": "s", "namespace": "ns"}, "spec": {"selector": {"app": "x"}, "clusterIP": "192.0.2.1"}}
    assert kept("Service", raw)["spec"] == {"selector": {"app": "x"}}
    route = {"metadata": {"name": "r", "namespace": "ns"}, "spec": {"model": "m"}}
    assert kept("ModelRoute", {**route, "status": {"endpoints": 3}}) == kept("ModelRoute", route)
