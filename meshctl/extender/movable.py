"""Which pods may be moved, and where they may be for reasons that are not the fleet's. Pure.

Of kube-scheduler's own filters those are read here that say the same of a node whoever else is there: node selectors,
required node affinity, taints, cordons. What depends on other pods (affinity between pods, topology spread, host ports)
and on volumes is not: who moves a pod sees whether it comes up there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from meshctl.extender.pods import running
from meshctl.ports import KubeObject

SAFE_TO_EVICT = "cluster-autoscaler.kubernetes.io/safe-to-evict"
MIRROR = "kubernetes.io/config.mirror"
"""Annotation of the API server's picture of a static pod, which the kubelet runs from a file."""
_OF_KUBERNETES = "node.kubernetes.io/"
"""Domain of the taints that the node lifecycle controller sets."""
_CORDON: Mapping[str, str] = {"key": f"{_OF_KUBERNETES}unschedulable", "effect": "NoSchedule"}


def why_fixed(pod: KubeObject) -> str:
    """Why a pod that is on a node must not be moved; "" when it may be."""
    metadata = pod["metadata"]
    annotations = metadata.get("annotations") or {}
    owner = owner_of(pod)
    if "deletionTimestamp" in metadata:
        return "it is being deleted"
    if annotations.get(SAFE_TO_EVICT) == "false":
        return f"its annotation {SAFE_TO_EVICT} says so"
    if MIRROR in annotations or owner.startswith("Node/"):
        return "it is a static pod of its node"
    if owner.startswith("DaemonSet/"):
        return f"it belongs to its node: {owner}"
    if not owner:
        return "nothing would make it anew: no controller owns it"
    return "" if running(pod) else "it is not running yet"


def owner_of(pod: KubeObject) -> str:
    """``ReplicaSet/web-5c8f7b9d4``: who makes it anew; "" for nobody."""
    owners = pod["metadata"].get("ownerReferences") or ()
    return next((f"{owner['kind']}/{owner['name']}" for owner in owners if owner.get("controller")), "")


class Host(NamedTuple):
    """A node, as far as it lets pods in or not."""

    name: str
    labels: Mapping[str, str]
    taints: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, node: KubeObject) -> Host:
        metadata, spec = node["metadata"], node.get("spec") or {}
        cordon = (_CORDON,) if spec.get("unschedulable") else ()
        return cls(metadata["name"], metadata.get("labels") or {}, (*(spec.get("taints") or ()), *cordon))

    @property
    def in_use(self) -> bool:
        """Neither cordoned nor closed by Kubernetes itself (not ready, out of disk)."""
        return not any(taint["key"].startswith(_OF_KUBERNETES) and _repels(taint) for taint in self.taints)


class Hosts:
    """Where pods may be. Many say the same, and are answered the same."""

    def __init__(self, hosts: Iterable[Host]) -> None:
        self._hosts = sorted(hosts, key=lambda host: host.name)
        self._known: dict[str, frozenset[str]] = {}

    def open_to(self, pod: KubeObject) -> frozenset[str]:
        """Nodes that let it in; one that it is on already may not be among them."""
        spec = pod.get("spec") or {}
        said = {name: spec[name] for name in ("nodeSelector", "affinity", "tolerations") if spec.get(name)}
        if (found := self._known.get(key := repr(said))) is None:
            found = frozenset(host.name for host in self._hosts if _lets_in(host, said))
            self._known[key] = found
        return found


def _lets_in(host: Host, spec: Mapping[str, Any]) -> bool:
    wanted = spec.get("nodeSelector") or {}
    if any(host.labels.get(name) != value for name, value in wanted.items()):
        return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required and not any(_matches(host, term) for term in required.get("nodeSelectorTerms") or ()):
        return False
    tolerations = spec.get("tolerations") or ()
    return all(any(_tolerates(one, taint) for one in tolerations) for taint in host.taints if _repels(taint))


def _repels(taint: Mapping[str, Any]) -> bool:
    return taint.get("effect") in ("NoSchedule", "NoExecute")


def _matches(host: Host, term: Mapping[str, Any]) -> bool:
    """All of a term; an empty one matches nothing."""
    labels, fields = term.get("matchExpressions") or (), term.get("matchFields") or ()
    return bool(labels or fields) and (
        all(_holds(one, host.labels) for one in labels)
        and all(_holds(one, {"metadata.name": host.name}) for one in fields)
    )


_OPERATORS: Mapping[str, Callable[[str | None, Sequence[str]], bool]] = {
    "In": lambda value, values: value in values,
    "NotIn": lambda value, values: value not in values,
    "Exists": lambda value, _: value is not None,
    "DoesNotExist": lambda value, _: value is None,
    "Gt": lambda value, values: _is_number(value) and int(value or 0) > int(values[0]),
    "Lt": lambda value, values: _is_number(value) and int(value or 0) < int(values[0]),
}


def _holds(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """An operator that is not known holds nowhere: so nobody is sent there."""
    holds = _OPERATORS.get(expression["operator"])
    return holds is not None and holds(labels.get(expression["key"]), expression.get("values") or ())


def _is_number(text: str | None) -> bool:
    return text is not None and text.removeprefix("-").isdecimal()


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    key, effect = toleration.get("key", ""), toleration.get("effect", "")
    if effect not in ("", taint.get("effect")) or key not in ("", taint["key"]):
        return False
    if toleration.get("operator") == "Exists":
        return True
    return bool(key) and toleration.get("value", "") == taint.get("value", "")
