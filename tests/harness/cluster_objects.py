"""Kubernetes objects as data: the smallest ones that discovery reads, as the API server says them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshctl.ports import KubeObject
from tests.harness.gpus import gpu_object

NAMESPACE = "default"


def kube(kind: str, name: str, namespace: str = NAMESPACE, **fields: Any) -> dict[str, Any]:
    """Any object; `fields` beside its metadata, of which ``labels``, ``annotations`` and the like are taken out."""
    metadata = {key: fields.pop(key) for key in ("labels", "annotations", "uid", "deletionTimestamp") if key in fields}
    place = {"namespace": namespace} if namespace else {}
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, **place, **metadata}, **fields}


def service(name: str = "triton", *ports: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """A Service with port ``http`` 80 -> 8000, unless others are given."""
    default = ({"name": "http", "port": 80, "targetPort": 8000, "protocol": "TCP"},)
    return kube("Service", name, spec={"selector": {"app": name}, "ports": list(ports or default), **spec})


def member(pod: str, address: str, node: str = "", **fields: Any) -> dict[str, Any]:
    """One endpoint of a slice."""
    target = {"kind": "Pod", "namespace": NAMESPACE, "name": pod, "uid": f"uid-{pod}"}
    where = {"nodeName": node} if node else {}
    return {"addresses": [address], "conditions": {"ready": True}, "targetRef": target, **where, **fields}


def endpoint_slice(name: str, members: Iterable[dict[str, Any]], of: str = "triton", **fields: Any) -> dict[str, Any]:
    """A slice of the Service `of`, with port ``http`` 8000 unless `ports` are given."""
    ports = [{"name": "http", "port": 8000, "protocol": "TCP"}]
    labels = {"kubernetes.io/service-name": of}
    fields = {"addressType": "IPv4", "ports": ports, **fields}
    return kube("EndpointSlice", name, labels=labels, endpoints=list(members), **fields)


def pod(name: str, node: str = "", **fields: Any) -> dict[str, Any]:
    spec = {"serviceAccountName": "triton"} | ({"nodeName": node} if node else {})
    return kube("Pod", name, **{"uid": f"uid-{name}", "spec": spec, **fields})


def node(name: str, gpu: str = "", **labels: str) -> dict[str, Any]:
    """A node with GPU discovery's product label; `labels` spell dots and slashes as they are, by ``**{}``."""
    return kube("Node", name, namespace="", labels=({"nvidia.com/gpu.product": gpu} if gpu else {}) | labels)


def served(value: dict[str, Any], namespace: str = NAMESPACE) -> KubeObject:
    """A manifest as the API server gives it back: in a namespace."""
    return {**value, "metadata": {"namespace": namespace, **value["metadata"]}}


def gpu(uuid: str, node: str, product: str, *pods: str, **status: Any) -> dict[str, Any]:
    """A GPU object of which each pod (``namespace/name``) holds one slot."""
    names = [pod.partition("/") for pod in pods]
    held = [(namespace, name, "server", [slot]) for slot, (namespace, _, name) in enumerate(names)]
    return gpu_object(node, uuid, held=held, product=product, **status)
