"""Service -> EndpointSlices -> Pods -> GPUs, Nodes -> the endpoints of a route. Pure: objects in, `Servers` out.

Decides which pods are inference servers, at which address, on which GPU, and whether they get new requests.
- EndpointSlices say who belongs to the Service and is ready; a Pod adds who it is and that it is being deleted, which
  it says first; a Node adds GPU and zone. What is not known (yet) of the latter two leaves the endpoint in, without it.
- Which GPU: the GPU object whose slots the pod holds (the kubelet's word), then the pod's own annotations and labels,
  then the node's labels.
- One endpoint per pod, its IPv4 address where it has both; one per address and port, whatever slices repeat it while
  the controller moves endpoints between them. A ready one wins, then a known pod, then the first by name (the pod's,
  then the slice's).
- Not ready and terminating endpoints stay, with ``ready=False``: they get no new requests, and what is said of them
  stays comparable. ``ready: null`` is ready (https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/).

Rejected: reading Pods by the Service's selector, without slices (a second opinion on readiness, and none for Services
without a selector); the Service's cluster address (it hides the pods that weights are about).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from meshctl.adapters.kubernetes.holders import HeldGpu
from meshctl.api.gpulabels import GPU_PRODUCT, NVIDIA_PRODUCT, first_uuid, node_product, pod_product
from meshctl.api.resolve import Servers, ServiceRef
from meshctl.model import Endpoint, EndpointId, Workload
from meshctl.ports import KubeObject, ObjectKey

SERVICE_NAME = "kubernetes.io/service-name"
"""Label of an EndpointSlice: its Service."""
NAMED = 3
"""Of many pods, ports or the like, this many are named in a text."""
REGIONS = ("topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region")
ZONES = ("topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone")

Find = Callable[[ObjectKey], KubeObject | None]
"""The object as it is known now. Everything that a result depends on, but slices and GPUs, is asked of it."""
GpuOf = Callable[[ObjectKey, str], HeldGpu | None]
"""The GPU that a pod has slots of, on this node. A pod of which it says something else is a pod that changed."""


def service_key(ref: ServiceRef) -> ObjectKey:
    return ObjectKey("Service", ref.namespace, ref.name)


def service_of(endpoint_slice: KubeObject) -> ObjectKey | None:
    """The Service that a slice belongs to; None when it says none."""
    metadata = endpoint_slice["metadata"]
    name = (metadata.get("labels") or {}).get(SERVICE_NAME)
    return None if name is None else ObjectKey("Service", str(metadata.get("namespace", "")), str(name))


def no_gpu(pod: ObjectKey, node: str) -> HeldGpu | None:
    """Where no agent tells of GPUs."""
    return None


def discover(ref: ServiceRef, slices: Iterable[KubeObject], find: Find, gpu_of: GpuOf = no_gpu) -> Servers:
    """The servers behind a Service; `slices` are those of this Service, in any order."""
    service = find(service_key(ref))
    if service is None:
        return Servers(remarks=(f"Service {ref.namespace}/{ref.name} does not exist; create it, or correct the name",))
    spec = service.get("spec") or {}
    if spec.get("type") == "ExternalName":
        what = f"Service {ref.namespace}/{ref.name} is an ExternalName, which has no pods"
        return Servers(remarks=(f"{what}; name one that selects pods, or list static endpoints",))
    port = _service_port(ref, spec.get("ports") or [])
    if isinstance(port, str):
        return Servers(remarks=(port,))
    slices = sorted(slices, key=lambda value: str(value["metadata"]["name"]))
    found = [_server(ref, port, *pair, find, gpu_of) for pair in _reached(slices)]
    best = _best(server for server in found if server is not None)
    remarks = [_nobody(ref, spec, slices)] if not best else []
    remarks += _unknown_gpus(best)
    return Servers(tuple(server.endpoint for server in best), tuple(remarks))


# ------------------------------------------------------------------------------------------------------------- ports


@dataclass(frozen=True, slots=True)
class _Port:
    """The Service's port: slices carry it under its name."""

    name: str
    fallback: int | None
    """For slices that leave the number open: the target port if it is one, else the Service's."""


def _service_port(ref: ServiceRef, ports: list[Mapping[str, Any]]) -> _Port | str:
    """The port that `ref` names, or what is wrong with it."""
    if not ports and isinstance(ref.port, int):  # a headless Service may have none: the pods' port itself
        return _Port("", ref.port)
    asked = "port" if isinstance(ref.port, int) else "name"
    matching = [p for p in ports if p.get(asked) == ref.port and p.get("protocol", "TCP") == "TCP"]
    if not matching:
        have = _some([f"{p.get('port')} ({p['name']})" if p.get("name") else str(p.get("port")) for p in ports])
        where = f"Service {ref.namespace}/{ref.name}"
        return f"{where} has no TCP port {ref.port!r}; it has {have or 'none'}: correct spec.backend.service.port"
    target = matching[0].get("targetPort")
    number = target if isinstance(target, int) and target > 0 else matching[0].get("port")
    return _Port(str(matching[0].get("name") or ""), number)


def _slice_port(endpoint_slice: KubeObject, port: _Port) -> int | None:
    """The pods' port in this slice; None when the slice is about other ports."""
    ports = endpoint_slice.get("ports") or []
    for candidate in ports:
        if str(candidate.get("name") or "") == port.name and (candidate.get("protocol") or "TCP") == "TCP":
            return candidate.get("port") or port.fallback
    return None if ports or port.name else port.fallback


# --------------------------------------------------------------------------------------------------------- endpoints


@dataclass(frozen=True, slots=True)
class _Server:
    """One endpoint of one slice, and what decides between several for the same."""

    endpoint: Endpoint
    pod: tuple[str, str]
    """Namespace and name (with UID) of its pod; ("", address) without one."""
    known: bool
    """The pod is in the copy."""
    node: str


def _reached(slices: Iterable[KubeObject]) -> Iterable[tuple[KubeObject, Mapping[str, Any]]]:
    for endpoint_slice in slices:
        for endpoint in endpoint_slice.get("endpoints") or []:
            yield endpoint_slice, endpoint


def _server(
    ref: ServiceRef, port: _Port, endpoint_slice: KubeObject, said: Mapping[str, Any], find: Find, gpu_of: GpuOf
) -> _Server | None:
    """None for what can't be reached: a slice of other ports, a host name, nothing at all."""
    number, address = _slice_port(endpoint_slice, port), _address((said.get("addresses") or [""])[0])
    if number is None or address is None:
        return None
    target = said.get("targetRef") or {}
    is_pod = target.get("kind") == "Pod" and bool(target.get("name"))
    namespace = str(target.get("namespace") or ref.namespace)
    pod_key = ObjectKey("Pod", namespace, str(target["name"])) if is_pod else None
    pod = _same(find(pod_key), target) if pod_key else None
    pod_spec = (pod or {}).get("spec") or {}
    node_name = str(said.get("nodeName") or pod_spec.get("nodeName") or "")
    node = _metadata(find(ObjectKey("Node", "", node_name)) if node_name else None, "labels")
    labels, annotations = _metadata(pod, "labels"), _metadata(pod, "annotations")
    held = gpu_of(pod_key, node_name) if pod_key else None
    host = f"[{address}]" if ":" in address else address
    endpoint = Endpoint(
        id=EndpointId(f"{host}:{number}"),
        address=address,
        port=number,
        gpu=(held.product if held else "") or pod_product(labels, annotations) or node_product(node),
        metrics=f"{host}:{ref.metrics_port}",
        gpu_uuid=held.uuid if held else first_uuid(annotations),
        concurrency=ref.concurrency,
        ready=_ready(said.get("conditions") or {}) and not _metadata(pod, "deletionTimestamp"),
        locality=_locality({**labels, **node}, str(said.get("zone") or "")),
        workload=Workload(
            namespace, str(target["name"]), node_name, tuple(sorted(labels.items())), _account(pod_spec, pod)
        )
        if is_pod
        else None,
    )
    identity = (namespace, f"{target['name']} {target.get('uid', '')}") if is_pod else ("", address)
    return _Server(endpoint, identity, pod is not None, node_name)


def _best(servers: Iterable[_Server]) -> list[_Server]:
    """One per pod and one per address, ordered by id."""
    ordered = sorted(servers, key=lambda s: (":" in s.endpoint.address, not s.endpoint.ready, not s.known, *_order(s)))
    by_pod: dict[tuple[str, str], _Server] = {}
    for server in ordered:
        by_pod.setdefault(server.pod, server)
    by_id: dict[EndpointId, _Server] = {}
    for server in by_pod.values():
        by_id.setdefault(server.endpoint.id, server)
    return [by_id[key] for key in sorted(by_id)]


def _order(server: _Server) -> tuple[str, ...]:
    return (*server.pod, server.endpoint.id)


def _address(text: object) -> str | None:
    """The address in its one form; None when it is not an IP address."""
    try:
        return str(ipaddress.ip_address(str(text)))
    except ValueError:
        return None


def _same(pod: KubeObject | None, target: Mapping[str, Any]) -> KubeObject | None:
    """`pod` if it is the very one that is meant, and not its successor of the same name."""
    uid = target.get("uid")
    return None if pod is None or (uid and pod["metadata"].get("uid", uid) != uid) else pod


def _metadata(value: KubeObject | None, field: str) -> Any:
    return {} if value is None else value["metadata"].get(field) or {}


def _account(pod_spec: Mapping[str, Any], pod: KubeObject | None) -> str:
    return "" if pod is None else str(pod_spec.get("serviceAccountName") or "default")


def _ready(conditions: Mapping[str, Any]) -> bool:
    return conditions.get("ready") is not False and conditions.get("terminating") is not True


def _locality(labels: Mapping[str, str], hint: str) -> str:
    """``region/zone`` of the node, which API servers since 1.35 write on its pods too; else the slice's zone."""
    region = next(filter(None, map(labels.get, REGIONS)), "")
    zone = next(filter(None, map(labels.get, ZONES)), "") or hint
    return f"{region}/{zone}" if zone else region


# ------------------------------------------------------------------------------------------------------------- texts


def _nobody(ref: ServiceRef, spec: Mapping[str, Any], slices: list[KubeObject]) -> str:
    what = f"Service {ref.namespace}/{ref.name} has no endpoints"
    if any(e.get("endpoints") for e in slices):
        have = _some(sorted({_port_text(p) for e in slices if e.get("endpoints") for p in e.get("ports") or []}))
        return f"{what} with an IP address on TCP port {ref.port!r}; its EndpointSlices have {have or 'no ports'}"
    if not spec.get("selector"):
        return f"{what}, and no selector: give it one, or an EndpointSlice"
    selector = ",".join(f"{key}={value}" for key, value in sorted(spec["selector"].items()))
    return f"{what}: no running pod has an address and the labels {selector}; see `kubectl get pods -l {selector}`"


def _port_text(port: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (str(port.get("port")), str(port.get("name") or ""), str(port.get("protocol") or ""))))


def _unknown_gpus(servers: list[_Server]) -> list[str]:
    unknown = [server for server in servers if not server.endpoint.gpu]
    if not unknown:
        return []
    who = _some([s.endpoint.workload.name if s.endpoint.workload else str(s.endpoint.id) for s in unknown])
    nodes = _some(sorted({server.node for server in unknown if server.node}))
    where = f" (node {nodes})" if nodes else ""
    what = f"the GPU of {who}{where} is unknown: they are served as a class of their own"
    todo = f"label the node {NVIDIA_PRODUCT}=PRODUCT (GPU feature discovery does)"
    return [f"{what}; {todo}, or annotate the pod {GPU_PRODUCT}=PRODUCT"]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
