"""What a pod demands, and what its allocation annotation says. Pure.

A pod is read the same whether it is the whole v1 Pod that the scheduler sends, or what is kept of it (`views`): that
has the sum of its requests where a Pod may have its own (spec.resources), which counts instead of the containers'.

Requests are counted as kube-scheduler does (k8s.io/component-helpers/resource, PodRequests): the containers and the
sidecars together, or the most that one init container needs beside the sidecars before it; then the overhead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from kubernetes.utils.quantity import parse_quantity

from meshctl.api.allocation import ALLOCATION, read_allocation
from meshctl.api.gpulabels import hyphened, product
from meshctl.core.packing.vocabulary import Ask, Demand
from meshctl.errors import InputError
from meshctl.extender.ports import PodId
from meshctl.ports import KubeObject

GPU_PRODUCTS = "meshctl.io/gpu-products"
"""Annotation of a pod: the GPU products that will do, separated by commas; without it any will."""
LONGEST_PLAN = 1 << 14
"""Characters of an allocation annotation: 100 containers with two GPUs each take 12,000."""
TERMINAL = ("Succeeded", "Failed")
"""Phases of a pod that holds nothing any more, and never will."""
_MIB = 1 << 20
_MOST = 1 << 63
"""Kubernetes' quantities are less."""
MOST = 1 << 40
"""Millicores, or MiB: more than any node has. What asks for more, as Kubernetes allows, asks for this much: sums of a
million of them are exact as 64-bit integers, which the fleet counts in."""
_NO_UNFIT: Mapping[str, str] = MappingProxyType({})

Plan = Mapping[str, Mapping[str, int]]
"""Container -> UUID -> slots."""


class Requests(NamedTuple):
    """CPU and memory; exact, so that sums are rounded once."""

    cpu: Decimal = Decimal(0)
    """Cores."""
    memory: Decimal = Decimal(0)
    """Bytes."""

    def plus(self, other: Requests) -> Requests:
        return Requests(self.cpu + other.cpu, self.memory + other.memory)

    def most(self, other: Requests) -> Requests:
        return Requests(max(self.cpu, other.cpu), max(self.memory, other.memory))

    @property
    def cpu_milli(self) -> int:
        return min(math.ceil(self.cpu * 1000), MOST)

    @property
    def memory_mib(self) -> int:
        return min(math.ceil(self.memory / _MIB), MOST)


# -------------------------------------------------------------------------------------------------------------- reading


def identity(pod: Mapping[str, Any]) -> PodId:
    """Raises InputError when there is no name or UID."""
    metadata = _mapping(pod, "metadata", "pod")
    found = PodId(*(metadata.get(name) or "" for name in ("namespace", "name", "uid")))
    if not all(isinstance(text, str) for text in found) or not (found.name and found.uid):
        raise InputError("the pod has no metadata.name, or no metadata.uid; send it as the API server has it")
    return found


def needs_of(pod: Mapping[str, Any], resources: Collection[str]) -> Demand:
    """CPU, memory and slots that it needs wherever it is; `resources` are those that slots are offered as. Raises
    InputError for what can't be read."""
    return _demand(pod, resources, None, _NO_UNFIT, _where(pod))


def demand_of(pod: Mapping[str, Any], resources: Collection[str], unfit: Mapping[str, str] = _NO_UNFIT) -> Demand:
    """Likewise, with the GPUs that will do. Raises InputError for what can't be read."""
    where = _where(pod)
    annotations = _mapping(_mapping(pod, "metadata", where), "annotations", where)
    return _demand(pod, resources, _products(annotations, where), unfit, where)


def _demand(
    pod: Mapping[str, Any],
    resources: Collection[str],
    products: frozenset[str] | None,
    unfit: Mapping[str, str],
    where: str,
) -> Demand:
    spec = _mapping(pod, "spec", where)
    requests = requests_of(spec, where)
    namespace = str(_mapping(pod, "metadata", where).get("namespace") or "")
    asks = tuple(_asks(spec, resources, where))
    return Demand(requests.cpu_milli, requests.memory_mib, asks, products, unfit, namespace)


def labels_of(pod: Mapping[str, Any]) -> Mapping[str, str]:
    where = _where(pod)
    return _mapping(_mapping(pod, "metadata", where), "labels", where)


def requests_of(spec: Mapping[str, Any], where: str) -> Requests:
    """CPU and memory as kube-scheduler counts them. Raises InputError."""
    own = _mapping(_mapping(spec, "resources", where), "requests", where)
    if {"cpu", "memory"} <= own.keys():
        total = _requests(own, where)
    else:
        total = _of_containers(spec, where)
        total = Requests(
            quantity(own["cpu"], where) if "cpu" in own else total.cpu,
            quantity(own["memory"], where) if "memory" in own else total.memory,
        )
    overhead = _mapping(spec, "overhead", where)
    return total.plus(_requests(overhead, where)) if overhead else total


def _of_containers(spec: Mapping[str, Any], where: str) -> Requests:
    total, sidecars, peak = Requests(), Requests(), Requests()
    for container in _list(spec, "containers", where):
        total = total.plus(_requested(container, where))
    for container in _list(spec, "initContainers", where):
        own = _requested(container, where)
        if container.get("restartPolicy") == "Always":
            total, sidecars = total.plus(own), sidecars.plus(own)
            peak = peak.most(sidecars)
        else:
            peak = peak.most(own.plus(sidecars))
    return total.most(peak)


def _requested(container: Mapping[str, Any], where: str) -> Requests:
    return _requests(_mapping(_mapping(container, "resources", where), "requests", where), where)


def _requests(requests: Mapping[str, Any], where: str) -> Requests:
    return Requests(quantity(requests.get("cpu", 0), where), quantity(requests.get("memory", 0), where))


def extended(container: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Its extended resources (DOMAIN/NAME) -> how many, as written: its limits, which its requests are equal to."""
    resources = _mapping(container, "resources", where)
    limits = _mapping(resources, "limits", where) or _mapping(resources, "requests", where)
    return {name: limits[name] for name in sorted(limits) if "/" in name}


def _asks(spec: Mapping[str, Any], resources: Collection[str], where: str) -> Iterator[Ask]:
    for field in ("initContainers", "containers"):
        for container in _list(spec, field, where):
            init = field == "initContainers" and container.get("restartPolicy") != "Always"
            for resource, text in extended(container, where).items():
                if resource in resources and (slots := _slots(text, resource, where)):
                    yield Ask(str(container.get("name", "")), slots, resource, init)


def _slots(text: object, resource: str, where: str) -> int:
    slots = quantity(text, where)
    if slots != int(slots):
        raise InputError(f"{where}: {text!r} of {resource} is no whole number")
    return int(slots)


def _products(annotations: Mapping[str, Any], where: str) -> frozenset[str] | None:
    if (text := annotations.get(GPU_PRODUCTS)) is None:
        return None
    named = [name for name in str(text).split(",") if name.strip()]
    found = frozenset(product(hyphened(name)) for name in named)
    if not found or "" in found:
        raise InputError(
            f"{where}: annotation {GPU_PRODUCTS}: {str(text)[:100]!r} does not name GPU products; write A,B"
        )
    return found


def quantity(text: object, where: str) -> Decimal:
    """A quantity as Kubernetes writes it, at least 0. Raises InputError."""
    try:
        found = _quantity(text)
    except TypeError:  # a list, an object: not hashable
        found = None
    if found is None:
        raise InputError(f"{where}: {text!r} is no quantity")
    return found


_parse: Callable[[object], Decimal] = parse_quantity
"""The package gives its functions no types."""


@lru_cache(maxsize=8192, typed=True)
def _quantity(text: object) -> Decimal | None:
    """Remembered: pods say the same few hundred again and again. None: it is none, or out of bounds."""
    if not isinstance(text, (str, int)) or isinstance(text, bool):
        return None
    try:
        found = _parse(text)
    except ValueError:
        return None
    return found if found.is_finite() and 0 <= found < _MOST else None


# --------------------------------------------------------------------------------------------------------- its own life


def node_of(pod: KubeObject) -> str:
    """The node that it is bound to; "" for none."""
    return str((pod.get("spec") or {}).get("nodeName") or "")


def nominated_node(pod: Mapping[str, Any]) -> str:
    """The node that the scheduler has evicted others from for it, or would like it to have; "" for none."""
    return str((pod.get("status") or {}).get("nominatedNodeName") or "")


def deleted(pod: KubeObject) -> bool:
    """Somebody has deleted it; it is there until its containers have ended, and its finalizers are gone."""
    return "deletionTimestamp" in pod["metadata"]


def ended(pod: KubeObject) -> bool:
    """It holds nothing any more."""
    return (pod.get("status") or {}).get("phase") in TERMINAL


def running(pod: KubeObject) -> bool:
    """A container of it has been started: what the kubelet gave its containers, the agent has seen."""
    return bool((pod.get("status") or {}).get("phase") == "Running")


def admitted(pod: KubeObject) -> bool:
    """The kubelet has acknowledged it: what its containers were to get, they have."""
    return bool((pod.get("status") or {}).get("startTime"))


def priority_of(pod: Mapping[str, Any]) -> int:
    """0 when it says none."""
    found = (pod.get("spec") or {}).get("priority")
    return found if isinstance(found, int) else 0


# ----------------------------------------------------------------------------------------------------------- allocation


def plan_of(pod: KubeObject, asks: Sequence[Ask]) -> Plan:
    """What the pod's annotation says of its containers, as far as it fits what they ask for. Of a container that it
    gives more or less than it asks for it says nothing, and nothing at all when it can't be read: the agent follows the
    same rules (deviceplugin.tickets)."""
    text = ((pod.get("metadata") or {}).get("annotations") or {}).get(ALLOCATION)
    if text is None:
        return {}
    said = _allocation(text)
    asked: dict[str, list[int]] = {}
    for ask in asks:
        asked.setdefault(ask.container, []).append(ask.slots)
    return {name: gpus for name, gpus in said.items() if asked.get(name) == [sum(gpus.values())]}


@lru_cache(maxsize=1024)
def _allocation(text: str) -> Plan:
    if len(text) > LONGEST_PLAN:
        return {}
    try:
        found = read_allocation({ALLOCATION: text})
    except ValueError:
        return {}
    return MappingProxyType({} if found is None else found.by_container())


# ---------------------------------------------------------------------------------------------------------------- shape


def _where(pod: Mapping[str, Any]) -> str:
    metadata = pod.get("metadata")
    named = metadata if isinstance(metadata, Mapping) else {}
    return f"pod {named.get('namespace', '')}/{named.get('name', '')}"


def _mapping(raw: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    found = raw.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: {name} is no object")
    return found


def _list(raw: Mapping[str, Any], name: str, where: str) -> Sequence[Mapping[str, Any]]:
    found = raw.get(name)
    if found is None:
        return ()
    if not isinstance(found, list | tuple) or not all(isinstance(one, Mapping) for one in found):
        raise InputError(f"{where}: {name} is no list of objects")
    return found
