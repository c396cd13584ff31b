"""Which pods may be moved, and which nodes let them in, as kube-scheduler reads the same fields."""

from __future__ import annotations

from typing import Any

import pytest

from meshctl.extender.movable import Host, Hosts, owner_of, why_fixed
from tests.harness.extender_objects import node, pod

REPLICA_SET = {"ownerReferences": [{"kind": "ReplicaSet", "name": "web-1", "controller": True}]}


def owned(kind: str) -> dict[str, Any]:
    return {"ownerReferences": [{"kind": kind, "name": "x", "controller": True}]}


def test_a_running_pod_with_a_controller_may_be_moved() -> None:
    """Its controller makes it anew."""
    moved = pod(phase="Running", metadata=REPLICA_SET)
    assert why_fixed(moved) == ""
    assert owner_of(moved) == "ReplicaSet/web-1"


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "no controller"),
        ({"ownerReferences": [{"kind": "X", "name": "x"}]}, "no controller"),
        (owned("DaemonSet"), "belongs to its node"),
        (owned("Node"), "static"),
        ({"annotations": {"kubernetes.io/config.mirror": "x"}}, "static"),
        (REPLICA_SET | {"deletionTimestamp": "2026-05-04T10:00:00Z"}, "being deleted"),
        (REPLICA_SET | {"annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}}, "safe-to-evict"),
    ],
)
def test_who_must_stay_is_told_by_why(metadata: dict[str, Any], said: str) -> None:
    """Each for a reason of its own."""
    assert said in why_fixed(pod(phase="Running", metadata=metadata))


def test_who_does_not_run_yet_stays() -> None:
    """Which GPU it gets nobody has said yet."""
    assert why_fixed(pod(metadata=REPLICA_SET)) == "it is not running yet"
    safe = {"annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "true"}}
    assert why_fixed(pod(phase="Running", metadata=REPLICA_SET | safe)) == ""


def hosts() -> Hosts:
    """a: zone 1, b: zone 2 and for GPUs only, c: cordoned."""
    a, b, c = (node(name) for name in "abc")
    a["metadata"]["labels"] = {"zone": "1"}
    b["metadata"]["labels"] = {"zone": "2"}
    b["spec"] = {"taints": [{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]}
    c["spec"] = {"unschedulable": True}
    return Hosts(map(Host.of, (c, b, a)))


def affinity(**term: Any) -> dict[str, Any]:
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    return {"affinity": {"nodeAffinity": required}, "tolerations": [{"operator": "Exists"}]}


def expression(operator: str, *values: str, key: str = "zone") -> dict[str, Any]:
    return affinity(matchExpressions=[{"key": key, "operator": operator, "values": list(values)}])


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ({}, "a"),
        ({"tolerations": [{"operator": "Exists"}]}, "abc"),
        ({"tolerations": [{"key": "gpu", "value": "yes"}]}, "ab"),
        ({"tolerations": [{"key": "gpu", "value": "no"}]}, "a"),
        ({"tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute"}]}, "a"),
        ({"nodeSelector": {"zone": "1"}}, "a"),
        ({"nodeSelector": {"zone": "2"}}, ""),
        (expression("In", "1", "3"), "a"),
        (expression("NotIn", "1"), "bc"),
        (expression("Exists"), "ab"),
        (expression("DoesNotExist"), "c"),
        (expression("Gt", "1"), "b"),
        (expression("Lt", "2"), "a"),
        (expression("Almost", "2"), ""),
        (affinity(matchFields=[{"key": "metadata.name", "operator": "In", "values": ["b"]}]), "b"),
        (affinity(), ""),
    ],
)
def test_nodes_that_let_a_pod_in(spec: dict[str, Any], names: str) -> None:
    """By selector, required affinity, taints and cordons."""
    assert hosts().open_to(pod(**spec)) == frozenset(names)


def test_a_node_that_kubernetes_closed_is_not_in_use() -> None:
    """Cordoned, or not ready; a taint of its owner's is no such thing."""
    cordoned, ill, gpus = node("c"), node("i"), node("g")
    cordoned["spec"] = {"unschedulable": True}
    ill["spec"] = {"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"}]}
    gpus["spec"] = {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]}
    assert [Host.of(one).in_use for one in (cordoned, ill, gpus, node())] == [False, False, True, True]
