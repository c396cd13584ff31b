"""What the extender keeps of each object: enough to decide, in some 1 kB a pod.

Beside 20,000 pods and 40,000 GPUs there is no room for more (400 MB), and what is not kept is no change: a probe, a
heartbeat, or a condition's words while all is well wake nobody. What repeats over thousands of objects (requests,
what containers ask for, words) is held once. Nothing that is kept is ever changed in place.

Invariant: `pods`, `gpus` and `models` read from what is kept what they would read from the whole object, and keeping
what was kept changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from meshctl.adapters.kubernetes.kinds import KINDS, Kind, Raw, pick
from meshctl.api.allocation import ALLOCATION
from meshctl.errors import InputError
from meshctl.extender.gpus import HEALTHY, SHARED
from meshctl.extender.pods import GPU_PRODUCTS, LONGEST_PLAN, TERMINAL, extended, requests_of

_READ = (ALLOCATION, GPU_PRODUCTS)
"""Annotations of pods."""


def _pod(raw: Raw) -> Raw:
    """Of one that has ended, that it has, and where; of one on a node no version and no labels: they decide nothing any
    more."""
    metadata, spec, status = raw["metadata"], raw.get("spec") or {}, raw.get("status") or {}
    kept = _named(metadata, "uid")
    if status.get("phase") in TERMINAL:
        return {"metadata": kept, "spec": pick(spec, "nodeName"), "status": pick(status, "phase")}
    if "deletionTimestamp" in metadata:
        kept["deletionTimestamp"] = metadata["deletionTimestamp"]
    annotations = metadata.get("annotations") or {}
    if own := {name: annotations[name][: LONGEST_PLAN + 1] for name in _READ if name in annotations}:
        kept["annotations"] = own
    if not spec.get("nodeName"):
        kept |= {name: metadata[name] for name in ("resourceVersion", "labels") if metadata.get(name)}
    return {"metadata": kept, "spec": _spec(spec), "status": _pod_status(status)}


def _pod_status(status: Mapping[str, Any]) -> Raw:
    kept = pick(status, "phase", "nominatedNodeName")
    if refused := [pick(one, "type", "status", "reason") for one in status.get("conditions") or () if is_refusal(one)]:
        kept["conditions"] = refused
    return kept | {"startTime": status["startTime"]} if status.get("startTime") else kept


def is_refusal(condition: Mapping[str, Any]) -> bool:
    """Whether a pod's condition says that the scheduler found no node for it. Other reasons are a gate, or an error,
    after which it is tried again soon."""
    return condition.get("type") == "PodScheduled" and condition.get("reason") == "Unschedulable"


def _spec(spec: Mapping[str, Any]) -> Raw:
    node = pick(spec, "nodeName")
    try:
        requests = requests_of(spec, "pod")
        containers = tuple(_containers(spec))
    except InputError:  # the pod can't be read: whoever reads what is kept is told the same
        return {**node, **{name: spec[name] for name in spec if name in _DEMANDS}}
    return {**node, **_demand(requests.cpu_milli, requests.memory_mib, spec.get("priority") or 0, containers)}


_DEMANDS = ("priority", "resources", "overhead", "containers", "initContainers")
_Container = tuple[str, str, bool, tuple[tuple[str, str], ...]]
"""Field of the spec, name, sidecar, extended resources."""


def _containers(spec: Mapping[str, Any]) -> Iterator[_Container]:
    """Those with extended resources, of which some may be slots of GPUs."""
    for field in ("initContainers", "containers"):
        for container in spec.get(field) or ():
            if found := extended(container, "pod"):
                limits = tuple((sys.intern(name), str(count)) for name, count in found.items())
                yield field, str(container.get("name", "")), container.get("restartPolicy") == "Always", limits


@lru_cache(maxsize=8192)
def _demand(cpu_milli: int, memory_mib: int, priority: int, containers: tuple[_Container, ...]) -> Mapping[str, Any]:
    """As a pod's spec has it; the same for all that demand the same."""
    kept: Raw = {"resources": {"requests": {"cpu": f"{cpu_milli}m", "memory": f"{memory_mib}Mi"}}}
    if priority:
        kept["priority"] = priority
    for field, name, sidecar, limits in containers:
        container: Raw = {"name": name, "resources": {"limits": dict(limits)}}
        kept.setdefault(field, []).append(container | ({"restartPolicy": "Always"} if sidecar else {}))
    return kept


def _node(raw: Raw) -> Raw:
    allocatable = (raw.get("status") or {}).get("allocatable") or {}
    return {"metadata": _named(raw["metadata"]), "status": {"allocatable": pick(allocatable, "cpu", "memory")}}


def _gpu(raw: Raw) -> Raw:
    status = raw.get("status") or {}
    kept = pick(status, "product", "resourceName", "mode", "isolation", "severalGPUs")
    if slots := status.get("slots"):
        kept["slots"] = _slots(slots.get("total", 0), slots.get("used", 0), slots.get("unavailable", 0))
    if holders := status.get("holders"):
        kept["holders"] = [pick(holder, "namespace", "pod", "container", "slots") for holder in holders]
    if amiss := [
        pick(condition, "type", "status", "reason", "message")
        for condition in status.get("conditions") or ()
        if condition.get("type") in (HEALTHY, SHARED) and condition.get("status") == "False"
    ]:
        kept["conditions"] = amiss
    return {"metadata": _named(raw["metadata"]), "spec": pick(raw.get("spec"), "node", "uuid"), "status": kept}


@lru_cache(maxsize=8192)
def _slots(total: int, used: int, unavailable: int) -> Mapping[str, int]:
    return {"total": total, "used": used, "unavailable": unavailable}


def _service(raw: Raw) -> Raw:
    return {"metadata": _named(raw["metadata"]), "spec": pick(raw.get("spec"), "selector")}


def _without_status(raw: Raw) -> Raw:
    kept = KINDS["ModelRoute"].keep(raw)
    return {name: value for name, value in kept.items() if name != "status"}


def _named(metadata: Mapping[str, Any], *more: str) -> Raw:
    kept: Raw = {name: metadata[name] for name in ("name", *more) if name in metadata}
    return kept | pick(metadata, "namespace")


VIEWS: Mapping[str, Kind] = MappingProxyType(
    {
        name: replace(KINDS[name], keep=keep)
        for name, keep in (
            ("Pod", _pod),
            ("Node", _node),
            ("GPU", _gpu),
            ("Service", _service),
            ("ModelRoute", _without_status),
            ("ModelProfile", _without_status),
        )
    }
)
"""The kinds to watch."""
