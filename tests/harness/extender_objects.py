"""Pods, nodes and GPUs as the API server has them, as far as the extender reads them, and a ledger that was told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.api.allocation import ALLOCATION, Allocation, ContainerAllocation
from meshctl.extender.ledger import Ledger
from meshctl.extender.ports import PodId
from meshctl.extender.views import VIEWS
from meshctl.sharing import RESOURCE
from tests.harness.gpus import gpu_object

NAMESPACE = "team-a"


def container(name: str = "server", slots: int = 0, resource: str = RESOURCE, **requests: str) -> dict[str, Any]:
    gpus = {resource: str(slots)} if slots else {}
    return {"name": name, "image": "i", "resources": {"limits": gpus, "requests": {**requests, **gpus}}}


def pod(
    name: str = "p",
    *containers: dict[str, Any],
    slots: int = 3,
    namespace: str = NAMESPACE,
    uid: str = "",
    node: str = "",
    phase: str = "Pending",
    started: bool = False,
    plan: Mapping[str, Mapping[str, int]] | None = None,
    init: Iterable[dict[str, Any]] = (),
    metadata: Mapping[str, Any] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """One container `server` of so many `slots`, unless `containers` are given. `plan` becomes its annotation."""
    meta = {
        "name": name,
        "namespace": namespace,
        "uid": uid or f"uid-{name}",
        "resourceVersion": "1",
        **(metadata or {}),
    }
    if plan is not None:
        meta["annotations"] = {**meta.get("annotations", {}), ALLOCATION: allocation(plan)}
    where = {"nodeName": node} if node else {}
    status = {"phase": phase, **({"startTime": "2026-05-04T10:00:00Z"} if started else {})}
    every = {"containers": list(containers or (container(slots=slots),)), "initContainers": list(init)}
    return {"metadata": meta, "spec": {**where, **every, **spec}, "status": status}


def allocation(plan: Mapping[str, Mapping[str, int]]) -> str:
    return Allocation(
        containers=tuple(ContainerAllocation(name=name, gpus=dict(gpus)) for name, gpus in plan.items())
    ).text()


def node(name: str = "n", cpu: str = "32", memory: str = "128Gi") -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": {"allocatable": {"cpu": cpu, "memory": memory, "pods": "110"}}}


def pod_id(value: Mapping[str, Any]) -> PodId:
    return PodId(*(value["metadata"][name] for name in ("namespace", "name", "uid")))


class Told:
    """A ledger, told what the API server would tell; each object as it is watched: trimmed."""

    def __init__(self) -> None:
        self.ledger = Ledger()

    def tell(self, kind: str, *values: Mapping[str, Any]) -> Told:
        for value in values:
            kept = VIEWS[kind].kept(dict(value))
            self.ledger.take(VIEWS[kind].key(kept), kept)
        return self

    def gone(self, kind: str, value: Mapping[str, Any]) -> Told:
        self.ledger.take(KINDS[kind].key(value), None)
        return self

    def free(self, *uuids: str) -> list[int]:
        return [self.ledger.fleet.free(uuid) for uuid in uuids]


def site(gpus: int = 2, slots: int = 4, name: str = "n", **status: Any) -> Told:
    """One node with GPUs ``GPU-<node>-0`` .. of so many slots."""
    told = Told().tell("Node", node(name))
    return told.tell("GPU", *(gpu_object(name, uuid, slots, **status) for uuid in uuids(gpus, name)))


def uuids(count: int = 2, name: str = "n") -> list[str]:
    return [f"GPU-{name}-{number}" for number in range(count)]
