"""The GPU operator on a real API server: what kubectl shows of a GPUSharingPolicy, and what is written when."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from meshctl.adapters.kubernetes.client import connect
from meshctl.adapters.kubernetes.status import KubernetesStatus
from meshctl.adapters.kubernetes.store import ClusterObjects
from meshctl.api.gpuresources import NAME
from meshctl.controller.clock import MonotonicClock
from meshctl.controller.gpuoperator import WATCHED, GpuOperator
from tests.cluster.cluster import Cluster
from tests.harness.gpus import gpu_object
from tests.harness.manifests import sharing_policy
from tests.harness.tools import DEADLINE_S, until

pytestmark = pytest.mark.cluster


async def say(cluster: Cluster, gpu: Mapping[str, Any]) -> None:
    """What the agent of its node would write."""
    await cluster.apply({name: value for name, value in gpu.items() if name != "status"})
    patch = orjson.dumps({"status": gpu["status"]}).decode()
    command = ("patch", "gpu", gpu["metadata"]["name"], "--subresource=status", "--type=merge", f"--patch={patch}")
    await cluster.kubectl(*command)


async def test_kubectl_tells_how_far_a_policy_is(cluster: Cluster) -> None:
    """From a policy whose nodes are not there to one that is in force, with Events and the ConfigMap; another replica
    that starts then writes nothing; a second policy is told that it lost, and why."""
    name = await cluster.namespace("operator")
    labels, resource = {"meshctl.io/test": name}, f"{name}.io/gpus"
    policy = sharing_policy(name, nodeSelector=labels, resourceName=resource, replicas=4)
    gpu = gpu_object(
        name,
        f"GPU-{name}",
        total=4,
        resourceName=resource,
        computeCapability="7.0",
        policy={"name": name, "generation": 1, "wanted": "", "wantedGeneration": 0},
        heartbeat="2999-01-01T00:00:00Z",
    )

    async def told(type_: str, of: str = name) -> tuple[str, str]:
        conditions = (await cluster.get("gsp", of)).get("status", {}).get("conditions", ())
        return next(((c["status"], c["reason"]) for c in conditions if c["type"] == type_), ("", ""))

    async def until_told(type_: str, *said: str, of: str = name) -> None:
        async def holds() -> bool:
            return await told(type_, of) == said

        await until(holds, f"{of}: {type_} is {said}")

    async with connect(cluster.kubeconfig) as client:
        store = await ClusterObjects(client, namespaces=(name,)).start(DEADLINE_S)

        def operator() -> GpuOperator:
            api, clock = KubernetesStatus(client, "one"), MonotonicClock()
            return GpuOperator(store.reader(*WATCHED), api, client.get, lambda: True, clock, namespace=name)

        running = operator()
        running.start()
        try:
            await cluster.apply(policy)
            await until_told("Accepted", "False", "NoNodes")
            await cluster.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
            await say(cluster, gpu)
            await until_told("Programmed", "True", "Programmed")
            await until_limited(cluster, name, f"{name}.io_gpus", "4")
            assert running.problems() == ()
            await running.stop()

            before = [await cluster.get("gsp", name), await cluster.get("configmap", NAME, "--namespace", name)]
            second = operator()
            async with asyncio.timeout(DEADLINE_S):
                while store.every("GPUSharingPolicy")[key(store, name)]["metadata"]["resourceVersion"] != version(
                    before[0]
                ):
                    await store.wait_changed()
            await second.look()
            assert [await cluster.get("gsp", name), await cluster.get("configmap", NAME, "--namespace", name)] == before
            (row,) = (await cluster.kubectl("get", "gsp", name, "--no-headers")).splitlines()
            assert row.split()[:5] == [name, "MPS", "4", resource, "1"]
            described = await cluster.kubectl("describe", "gsp", name)
            for words in ("NoNodes", "it is for 1 GPU of 1 node", "meshctl.io/controller"):
                assert words in described, described

            late = f"{name}-late"
            await cluster.apply(sharing_policy(late, nodeSelector=labels, priority=-1))
            second.start()
            try:
                await until_told("Conflict", "True", "Overruled", of=late)
            finally:
                await second.stop()
            message = (await cluster.get("gsp", late))["status"]["conditions"][-1]["message"]
            assert f"policy {name} instead, whose priority 0 is higher than -1" in message
        finally:
            await running.stop()
            await store.stop()
            await cluster.kubectl("delete", "gsp,gpu,node", "--ignore-not-found", name, f"{name}-late", f"gpu-{name}")


def key(store: ClusterObjects, name: str) -> Any:
    return next(key for key in store.every("GPUSharingPolicy") if key.name == name)


def version(value: Mapping[str, Any]) -> Any:
    return value["metadata"]["resourceVersion"]


async def until_limited(cluster: Cluster, namespace: str, resource: str, slots: str) -> None:
    async def holds() -> bool:
        found = await cluster.get("configmap", "--namespace", namespace)
        return any(value.get("data", {}).get(resource) == slots for value in found["items"])

    await until(holds, f"a container may ask for {slots} of {resource}")
