"""Discovery on a real API server with its real EndpointSlice controller: what happens to pods arrives as endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from meshctl.adapters.kubernetes.client import connect
from meshctl.adapters.kubernetes.source import KubernetesSource
from meshctl.adapters.kubernetes.store import ClusterObjects
from meshctl.model import DesiredRoute, RouteId
from meshctl.ports import Desired
from tests.cluster.cluster import Cluster
from tests.harness.cluster_objects import gpu
from tests.harness.manifests import profile, route
from tests.harness.tools import DEADLINE_S

pytestmark = pytest.mark.cluster


@asynccontextmanager
async def watching(cluster: Cluster, namespace: str) -> AsyncIterator[KubernetesSource]:
    """A started source over one namespace."""
    async with connect(cluster.kubeconfig) as client:
        store = await ClusterObjects(client, namespaces=(namespace,)).start(DEADLINE_S)
        try:
            source = KubernetesSource(store.reader(), store.problems)
            await source.start()
            yield source
        finally:
            await store.stop()


async def until(source: KubernetesSource, route_id: RouteId, holds: Callable[[DesiredRoute], bool]) -> Desired:
    """`desired`, as soon as the route is as `holds` says, woken only by `wait_changed`."""
    async with asyncio.timeout(DEADLINE_S):
        while route_id not in source.desired().routes or not holds(source.desired().routes[route_id]):
            await source.wait_changed()
    return source.desired()


def pod(namespace: str, name: str, node: str) -> dict[str, Any]:
    """A pod that is already on its node: no scheduler and no kubelet are needed."""
    containers = [{"name": "triton", "image": "triton", "ports": [{"name": "http", "containerPort": 8000}]}]
    spec = {"nodeName": node, "containers": containers, "terminationGracePeriodSeconds": 600}
    metadata = {"name": name, "namespace": namespace, "labels": {"app": "triton"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


async def run_as(cluster: Cluster, namespace: str, name: str, address: str, *, ready: bool = True) -> None:
    """What the kubelet would say of the pod."""
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": [condition]}
    patch = orjson.dumps({"status": status}).decode()
    await cluster.kubectl("patch", "pod", name, "--namespace", namespace, "--subresource=status", f"--patch={patch}")


async def test_pods_become_endpoints(cluster: Cluster) -> None:
    """From the route that comes before its Service to the pod that is forced away: each step arrives, by the watch."""
    namespace = await cluster.namespace("discovery")
    node = f"{namespace}-node"  # nodes have no namespace
    labels = {
        "nvidia.com/gpu.product": "Tesla-T4-SHARED",
        "topology.kubernetes.io/region": "eu",
        "topology.kubernetes.io/zone": "eu-1",
    }
    mine = {"namespace": namespace}
    wanted = route("llm", backend={"service": {"name": "triton", "port": "http", "metricsPort": 9002}})
    wanted["metadata"] |= mine
    known = profile(gpu="Tesla-T4")
    known["metadata"] |= mine
    llm = RouteId(f"{namespace}/llm")
    async with watching(cluster, namespace) as source:
        await cluster.apply(wanted, known)
        desired = await until(source, llm, lambda _: True)
        assert [p.message for p in desired.problems] == [
            f"spec.backend.service: Service {namespace}/triton does not exist; create it, or correct the name"
        ]

        await cluster.apply(
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": labels}},
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "triton", **mine},
                "spec": {"selector": {"app": "triton"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
            },
            pod(namespace, "t-0", node),
            pod(namespace, "t-1", node),
        )
        await run_as(cluster, namespace, "t-0", "10.64.0.1")
        await run_as(cluster, namespace, "t-1", "10.64.0.2", ready=False)
        desired = await until(source, llm, lambda r: len(r.endpoints) == 2)
        first, second = desired.routes[llm].endpoints
        assert (first.id, first.metrics, first.ready) == ("10.64.0.1:8000", "10.64.0.1:9002", True)
        assert (first.gpu, first.locality, list(desired.routes[llm].profiles)) == ("Tesla-T4", "eu/eu-1", ["Tesla-T4"])
        assert first.workload is not None
        assert (first.workload.name, first.workload.node) == ("t-0", node)
        assert ("app", "triton") in first.workload.labels
        assert (second.id, second.ready, desired.problems) == ("10.64.0.2:8000", False, ())

        await run_as(cluster, namespace, "t-1", "10.64.0.2")
        desired = await until(source, llm, lambda r: r.endpoints[1].ready)
        assert desired.routes[llm].endpoints[0] == first

        product = "meshctl.io/gpu-product=Tesla V100-SXM2-16GB"
        await cluster.kubectl("annotate", "pod", "t-1", "--namespace", namespace, product)
        await until(source, llm, lambda r: r.endpoints[1].gpu == "Tesla V100-SXM2-16GB")

        held = gpu(f"GPU-{namespace}", node, "NVIDIA H200", f"{namespace}/t-1")
        await cluster.apply({name: value for name, value in held.items() if name != "status"})
        status = orjson.dumps({"status": held["status"]}).decode()
        name = held["metadata"]["name"]
        await cluster.kubectl("patch", "gpu", name, "--subresource=status", "--type=merge", f"--patch={status}")
        desired = await until(source, llm, lambda r: r.endpoints[1].gpu == "NVIDIA-H200")
        assert desired.routes[llm].endpoints[1].gpu_uuid == f"GPU-{namespace}"
        assert desired.routes[llm].endpoints[0] == first
        await cluster.kubectl("delete", "gpu", name)
        await until(source, llm, lambda r: r.endpoints[1].gpu == "Tesla V100-SXM2-16GB")

        await cluster.kubectl("delete", "pod", "t-1", "--namespace", namespace, "--wait=false")
        await until(source, llm, lambda r: not r.endpoints[1].ready)
        await cluster.kubectl("delete", "pod", "t-1", "--namespace", namespace, "--force", "--grace-period=0")
        desired = await until(source, llm, lambda r: len(r.endpoints) == 1)
        assert desired.routes[llm].endpoints == (first,)

        await cluster.kubectl("delete", "modelroute", "llm", "--namespace", namespace)
        async with asyncio.timeout(DEADLINE_S):
            while llm in source.desired().routes:
                await source.wait_changed()
        await cluster.kubectl("delete", "node", node)
