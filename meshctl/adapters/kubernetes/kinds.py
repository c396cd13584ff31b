"""The kinds that meshctl reads or writes, and how little of each it keeps.

A Kubernetes object is mostly what nobody here asks for: of a pod's 5 to 10 kB, half a kilobyte is of use. `keep`
is applied before an object is held, so that 10,000 pods cost megabytes, and so that a change in what is not kept
(a heartbeat, a probe's time) is no change. Pure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from istio.names import MANAGED_BY, MANAGER
from meshctl.ports import KubeObject, ObjectKey

OWN_ANNOTATIONS = "meshctl.io/"
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"

Raw = dict[str, Any]
"""An object as the API server sent it."""


def _whole(raw: Raw) -> Raw:
    """Everything but what only other tools read."""
    metadata = {name: value for name, value in raw["metadata"].items() if name != "managedFields"}
    annotations = metadata.get("annotations")
    if annotations and _LAST_APPLIED in annotations:
        metadata["annotations"] = {name: value for name, value in annotations.items() if name != _LAST_APPLIED}
    return {**raw, "metadata": metadata}


def _with_managers(raw: Raw) -> Raw:
    """Likewise, but the field managers of what is ours stay: a foreign one among them is a conflict.

    Ours is what has our label, and what we wrote though the label was taken off since. Of our own entry, that it is
    there is enough: what it lists is a fifth of the object.
    """
    kept = _whole(raw)
    metadata = raw["metadata"]
    managers = metadata.get("managedFields") or ()
    labelled = (metadata.get("labels") or {}).get(MANAGED_BY) == MANAGER
    if managers and (labelled or any(entry.get("manager") == MANAGER for entry in managers)):
        kept["metadata"]["managedFields"] = [_manager(entry) for entry in managers]
    return kept


def _manager(entry: Raw) -> Raw:
    return pick(entry, "manager", "operation", "subresource") if entry.get("manager") == MANAGER else entry


def _service_entry(raw: Raw) -> Raw:
    """Likewise. A route has one of these for each size class, with the same endpoints: what repeats is held once."""
    kept = _with_managers(raw)
    spec = raw.get("spec")
    if isinstance(spec, dict) and isinstance(spec.get("endpoints"), list):
        kept["spec"] = {**spec, "endpoints": [_repeated(endpoint) for endpoint in spec["endpoints"]]}
    return kept


def _repeated(endpoint: Raw) -> Raw:
    """`endpoint` of what equal ones have, too; nobody changes any of it in place."""
    found = pick(endpoint, *endpoint)
    for name in ("labels", "ports"):
        if found.get(name):
            found[name] = _mapping(tuple(found[name].items()))
    return found


@lru_cache(maxsize=16_384)
def _mapping(items: tuple[tuple[str, Any], ...]) -> Raw:
    return pick(dict(items), *(name for name, _ in items))


def _identity(raw: Raw) -> Raw:
    """Name, namespace, UID, labels, our own annotations, and the time of a deletion under way.

    Label values and names of namespaces repeat over thousands of objects; interned, each is held once.
    """
    metadata = raw["metadata"]
    kept: Raw = {name: metadata[name] for name in ("name", "uid", "deletionTimestamp") if name in metadata}
    if "namespace" in metadata:
        kept["namespace"] = sys.intern(metadata["namespace"])
    if metadata.get("labels"):
        kept["labels"] = {name: sys.intern(value) for name, value in metadata["labels"].items()}
    annotations = metadata.get("annotations") or {}
    own = {name: value for name, value in annotations.items() if name.startswith(OWN_ANNOTATIONS)}
    if own:
        kept["annotations"] = own
    return kept


def pick(raw: Mapping[str, Any] | None, *names: str) -> Raw:
    """The fields that are there, strings interned."""
    found = {name: raw[name] for name in names if name in raw} if raw else {}
    return {name: sys.intern(value) if isinstance(value, str) else value for name, value in found.items()}


def _pod(raw: Raw) -> Raw:
    status = raw.get("status") or {}
    kept = pick(status, "podIP")
    kept["conditions"] = [pick(condition, "type", "status") for condition in status.get("conditions") or ()]
    return {
        "metadata": _identity(raw),
        "spec": pick(raw.get("spec"), "nodeName", "serviceAccountName"),
        "status": kept,
    }


def _node(raw: Raw) -> Raw:
    return {"metadata": _identity(raw)}


def _service(raw: Raw) -> Raw:
    return {"metadata": _identity(raw), "spec": pick(raw.get("spec"), "type", "clusterIP", "selector", "ports")}


def _endpoint(raw: Raw) -> Raw:
    kept = pick(raw, "addresses", "conditions", "nodeName", "zone")
    if raw.get("targetRef"):
        kept["targetRef"] = pick(raw["targetRef"], "kind", "namespace", "name", "uid")
    return kept


def _endpoint_slice(raw: Raw) -> Raw:
    return {
        "metadata": _identity(raw),
        "addressType": raw.get("addressType", ""),
        "endpoints": [_endpoint(endpoint) for endpoint in raw.get("endpoints") or ()],
        "ports": raw.get("ports") or [],
    }


@dataclass(frozen=True, slots=True)
class Kind:
    """One resource of the API, in the version that meshctl speaks."""

    name: str
    group: str
    """"" is the core group."""
    version: str
    plural: str
    namespaced: bool = True
    keep: Callable[[Raw], Raw] = _whole
    """From the object as it was sent (never changed) to what is held of it; apiVersion and kind are added."""
    absent_ok: bool = False
    """A cluster without its CRD is as good: that is told to nobody."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def resource(self) -> str:
        """As RBAC and the API server's messages call it: ``virtualservices.networking.istio.io``."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """The URL's path; without a namespace that of all namespaces, without a name that of the collection."""
        parts = ["", "apis", self.group, self.version] if self.group else ["", "api", self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)

    def key(self, raw: KubeObject) -> ObjectKey:
        metadata = raw["metadata"]
        return ObjectKey(self.name, metadata.get("namespace", ""), metadata["name"])

    def kept(self, raw: Raw) -> KubeObject:
        return {"apiVersion": self.api_version, "kind": self.name} | self.keep(raw)


_ISTIO = "networking.istio.io"
_OURS = "meshctl.io"

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("ModelRoute", _OURS, "v1alpha1", "modelroutes"),
        Kind("ModelProfile", _OURS, "v1alpha1", "modelprofiles"),
        Kind("GPUSharingPolicy", _OURS, "v1alpha1", "gpusharingpolicies", namespaced=False),
        Kind("GPU", _OURS, "v1alpha1", "gpus", namespaced=False),
        Kind("GPUSharingPolicy", _OURS, "v1alpha1", "gpusharingpolicies", namespaced=False, absent_ok=True),
        Kind("GPU", _OURS, "v1alpha1", "gpus", namespaced=False, absent_ok=True),
        Kind("Service", "", "v1", "services", keep=_service),
        Kind("EndpointSlice", "discovery.k8s.io", "v1", "endpointslices", keep=_endpoint_slice),
        Kind("Pod", "", "v1", "pods", keep=_pod),
        Kind("Node", "", "v1", "nodes", namespaced=False, keep=_node),
        Kind("VirtualService", _ISTIO, "v1", "virtualservices", keep=_with_managers),
        Kind("DestinationRule", _ISTIO, "v1", "destinationrules", keep=_with_managers),
        Kind("ServiceEntry", _ISTIO, "v1", "serviceentries", keep=_service_entry),
        Kind("Gateway", _ISTIO, "v1", "gateways"),
        Kind("Lease", "coordination.k8s.io", "v1", "leases"),
        Kind("Event", "events.k8s.io", "v1", "events"),
        Kind("ConfigMap", "", "v1", "configmaps"),
        Kind("Namespace", "", "v1", "namespaces", namespaced=False),
        Kind("ConfigMap", "", "v1", "configmaps"),
        Kind("CustomResourceDefinition", "apiextensions.k8s.io", "v1", "customresourcedefinitions", namespaced=False),
    )
}
MANDATORY = ("ModelRoute", "ModelProfile", "Service", "EndpointSlice", "Pod")
"""Without these nothing can be decided."""
OPTIONAL = ("Node",)
"""Without these something is decided: a pod's GPU is then known from its annotation only."""
GPUS = ("GPU", "GPUSharingPolicy")
"""Of clusters that share GPUs: who holds which, and how they are to be shared."""
ISTIO = ("VirtualService", "DestinationRule", "ServiceEntry", "Gateway")
"""Watched with --istio; their CRDs may come later."""
