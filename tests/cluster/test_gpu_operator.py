"""The GPU operator of `meshctl run` on a real API server: what kubectl shows of a policy, and what is written when."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import orjson
import pytest

from meshctl.api.gpuresources import NAME, NAMESPACE
from tests.cluster.cluster import Cluster
from tests.cluster.world import ACCOUNT, DEPLOY, LEASE, TICK, problems
from tests.harness.controller import RunProcess, run_with
from tests.harness.gpus import gpu_object
from tests.harness.manifests import sharing_policy
from tests.harness.tools import completed, page, until

pytestmark = pytest.mark.cluster


async def test_kubectl_tells_how_far_a_policy_is(cluster: Cluster, tmp_path: Path) -> None:
    """With the rights that deploy/ gives: from a policy whose nodes are not there to one in force, with Events, metrics
    and the ConfigMap. The next replica writes nothing of it again; a second policy is told that it lost, and why."""
    name = await cluster.namespace("operator")
    late, labels, resource = f"{name}-late", {"meshctl.io/test": name}, f"{name}.io/gpus"
    await cluster.apply(DEPLOY / "namespace.yaml", DEPLOY / "rbac.yaml")
    account = await cluster.kubeconfig_for(ACCOUNT)

    def run(log: str) -> AbstractAsyncContextManager[RunProcess]:
        where = ("--kubeconfig", str(account), "--namespace", name, "--lease", LEASE)
        return run_with(tmp_path / log, *where, *TICK)

    try:
        async with run("first.log") as first:
            await cluster.apply(sharing_policy(name, nodeSelector=labels, resourceName=resource, replicas=4))
            await until_told(cluster, name, "Accepted", "False", "NoNodes")
            await cluster.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
            await say(cluster, shared(name, resource))
            await until_told(cluster, name, "Programmed", "True", "Programmed")
            await until_limited(cluster, f"{name}.io_gpus", "4")
            metrics = await completed(page, f"{first.admin}/metrics")
            assert await problems(first, lambda said: not said) == ""
            assert await first.end(signal.SIGTERM) == 0
        assert f'meshctl_gpu_slots{{resource="{resource}",state="free"}} 4.0' in (metrics or "")
        row = await cluster.kubectl("get", "gsp", name, "--no-headers")
        assert row.split()[:6] == [name, "MPS", "4", resource, "1", "1"]
        described = await cluster.kubectl("describe", "gsp", name)
        for words in ("NoNodes", "it is for 1 GPU of 1 node", "meshctl.io/controller"):
            assert words in described, described

        before = await cluster.get("gsp", name), await config_map(cluster)
        async with run("second.log"):
            await cluster.apply(sharing_policy(late, nodeSelector=labels, resourceName=resource, priority=-1))
            words = f"policy {name} instead, whose priority 0 is higher than -1"
            await until_told(cluster, late, "Conflict", "True", "Overruled", words)
        assert (await cluster.get("gsp", name), await config_map(cluster)) == before
    finally:
        await cluster.kubectl("delete", "gsp", name, late, "--ignore-not-found")
        await cluster.kubectl("delete", "gpu", f"gpu-{name}", "--ignore-not-found")
        await cluster.kubectl("delete", "node", name, "--ignore-not-found")
        await cluster.kubectl("delete", "configmap", NAME, "--namespace", NAMESPACE, "--ignore-not-found")


def shared(name: str, resource: str) -> dict[str, Any]:
    """The only GPU of node `name`, as policy `name` says."""
    policy = {"name": name, "generation": 1, "wanted": "", "wantedGeneration": 0}
    how: dict[str, Any] = {"resourceName": resource, "policy": policy, "computeCapability": "7.0"}
    return gpu_object(name, f"GPU-{name}", total=4, heartbeat="2999-01-01T00:00:00Z", **how)


async def say(cluster: Cluster, gpu: Mapping[str, Any]) -> None:
    """What the agent of its node would write."""
    await cluster.apply({name: value for name, value in gpu.items() if name != "status"})
    patch = orjson.dumps({"status": gpu["status"]}).decode()
    command = ("patch", "gpu", gpu["metadata"]["name"], "--subresource=status", "--type=merge", f"--patch={patch}")
    await cluster.kubectl(*command)


async def until_told(cluster: Cluster, policy: str, type_: str, status: str, reason: str, *words: str) -> None:
    """Of the policy as it is now, with all of `words` in the message."""
    told: list[Any] = []

    async def holds() -> bool:
        found = await cluster.get("gsp", policy)
        told[:] = found.get("status", {}).get("conditions", ())
        about = (type_, status, reason, found["metadata"]["generation"])
        return any(
            about == (c["type"], c["status"], c["reason"], c["observedGeneration"])
            and all(word in c["message"] for word in words)
            for c in told
        )

    try:
        await until(holds, f"{policy}: {type_} is {status}, {reason}, {words}")
    except AssertionError as late:
        raise AssertionError(f"{late}: {told}") from late


async def config_map(cluster: Cluster) -> Any:
    return await cluster.get("configmap", NAME, "--namespace", NAMESPACE)


async def until_limited(cluster: Cluster, key: str, slots: str) -> None:
    async def holds() -> bool:
        found = await cluster.get("configmap", "--namespace", NAMESPACE)
        return slots in [c.get("data", {}).get(key) for c in found["items"] if c["metadata"]["name"] == NAME]

    await until(holds, f"a container may ask for {slots} of {key}")
