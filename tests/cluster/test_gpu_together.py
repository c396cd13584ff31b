"""Policies, operator, admission, agent, kubelet and routing at once: what one of them says, the others do.

On a real kubelet, with `meshctl run` and the rights that deploy/ gives it. What each of them does alone has tests of
its own.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from meshctl.api import gpuresources
from meshctl.model import RouteId
from meshctl.sharing import RESOURCE
from tests.cluster.cluster import Document, KubectlError
from tests.cluster.gpunode import SLOTS, UUIDS, GpuNode, pod
from tests.cluster.node import NAME
from tests.cluster.test_discovery import until as until_desired
from tests.cluster.test_discovery import watching
from tests.cluster.test_gpu_admission import installed
from tests.cluster.test_gpu_operator import until_limited, until_told
from tests.cluster.world import ACCOUNT, DEPLOY, LEASE, TICK, meshctl
from tests.harness.agent import PRODUCT
from tests.harness.controller import run_with
from tests.harness.manifests import profile, route, text
from tests.harness.tools import until

pytestmark = pytest.mark.cluster
A, B = UUIDS


@pytest.fixture
async def namespaces(gpu_node: GpuNode) -> AsyncIterator[list[str]]:
    """Three of the test's own, in order of their names; their pods are gone afterwards."""
    names = sorted([await gpu_node.cluster.namespace() for _ in range(3)])
    yield names
    for name in names:
        await gpu_node.delete(name)


@contextmanager
def default_again(gpu_node: GpuNode) -> Iterator[None]:
    """The policy `default` may be changed; afterwards it is as every test expects it."""
    try:
        yield
    finally:
        gpu_node.default_policy()
        gpu_node.allocatable(SLOTS * len(UUIDS))


@asynccontextmanager
async def operated(gpu_node: GpuNode, namespace: str, directory: Path) -> AsyncIterator[None]:
    """`meshctl run` operates the cluster, and deploy/admission.yaml judges pods of `namespace`."""
    cluster = gpu_node.cluster
    await cluster.apply(DEPLOY / "namespace.yaml", DEPLOY / "rbac.yaml")
    account = await cluster.kubeconfig_for(ACCOUNT)
    where = ("--kubeconfig", str(account), "--namespace", namespace, "--lease", LEASE)
    policies = text(*installed(namespace, parameters=gpuresources.NAMESPACE))
    await cluster.apply(policies)
    try:
        async with run_with(directory / "run.log", *where, *TICK) as controller:
            yield
            await controller.end(signal.SIGTERM)  # killed, it would keep the next one from its lease
    finally:
        await cluster.kubectl("delete", "--filename=-", "--wait=false", stdin=policies)


async def test_a_policy_that_changes_under_a_pod(gpu_node: GpuNode, namespaces: list[str], tmp_path: Path) -> None:
    """The operator says whom the change waits for, and admission lets in what will be possible; kubectl and the map
    show both ways of sharing side by side. When the pod ends all of it is as the policy says."""
    here, cluster = namespaces[0], gpu_node.cluster
    async with operated(gpu_node, here, tmp_path):
        with default_again(gpu_node):
            await until_told(cluster, "default", "Programmed", "True", "Programmed")
            await cluster.apply(pod("server", here, 1))
            await gpu_node.phase(here, "server", "Running")
            ((_, held),) = (await gpu_node.until_holders("server")).items()
            (used,) = held
            (free,) = {A, B} - {used}
            await until_refused(gpu_node, pod("big", here, SLOTS + 1), f"one container can get at most {SLOTS})")

            gpu_node.policy(mode="TimeSlicing", replicas=6)
            words = ("1 of 2 GPUs shared so", f"node {NAME}: {used}:", f"{here}/server")
            await until_told(cluster, "default", "Programmed", "False", "Waiting", *words)
            (progress,) = (await cluster.get("gsp", "default"))["status"]["nodes"]
            assert (progress["name"], progress["gpus"], progress["ready"]) == (NAME, 2, 1)
            await until_limited(cluster, gpuresources.key(RESOURCE), "6")
            await until_taken(gpu_node, pod("big", here, SLOTS + 1))
            gpu_node.allocatable(SLOTS + 6)
            assert (await row(gpu_node, "gsp", "default"))[1:6] == ["TimeSlicing", "6", RESOURCE, "2", "1"]
            assert {"MPS", f"1/{SLOTS}"} <= {*await row(gpu_node, "gpus", used.lower())}
            assert {"TimeSlicing", "0/6"} <= {*await row(gpu_node, "gpus", free.lower())}
            drawn = await meshctl("gpu", "map", "--kubeconfig", str(cluster.kubeconfig))
            for shown in (f"{RESOURCE} 1 of {SLOTS + 6} used", "A···", "······", f"{here}/server[main]"):
                assert shown in drawn, drawn

            await gpu_node.delete(here, "server")
            await until_told(cluster, "default", "Programmed", "True", "Programmed", "2 of 2")
            gpu_node.allocatable(6 * len(UUIDS))


async def test_policies_that_get_no_gpu(gpu_node: GpuNode, namespaces: list[str], tmp_path: Path) -> None:
    """The younger of two for one node is told which one won and why, one for nodes that are not there what to do; the
    winner and its slots are as before."""
    cluster, names = gpu_node.cluster, ("late", "elsewhere")
    async with operated(gpu_node, namespaces[0], tmp_path):
        await until_told(cluster, "default", "Programmed", "True", "Programmed")
        before = await said(gpu_node)
        try:
            gpu_node.policy("late", mode="TimeSlicing", replicas=2)
            gpu_node.policy("elsewhere", nodeSelector={"meshctl.io/pool": "none"})
            await until_told(cluster, "late", "Conflict", "True", "Overruled", "by policy default instead", "is older")
            await until_told(cluster, "late", "Accepted", "False", "Overruled")
            await until_told(cluster, "elsewhere", "Accepted", "False", "NoNodes", "meshctl.io/pool=none", "label the")
            assert await said(gpu_node) == before
        finally:
            await cluster.kubectl("delete", "gsp", *names, "--ignore-not-found")


async def test_a_route_knows_the_gpu_that_its_pod_has(gpu_node: GpuNode, namespaces: list[str]) -> None:
    """The kubelet's word, by way of the GPU object: no label and no annotation tells it."""
    here, cluster = namespaces[0], gpu_node.cluster
    server = pod("server", here, 2, plan={B: 2})
    server["metadata"]["labels"] = {"app": "server"}
    service = {"selector": {"app": "server"}, "ports": [{"name": "http", "port": 80, "targetPort": 8000}]}
    name, product = RouteId(f"{here}/llm"), PRODUCT.replace(" ", "-")
    wanted = [route("llm", backend={"service": {"name": "server", "port": "http"}}), profile(gpu=product)]
    for value in wanted:
        value["metadata"]["namespace"] = here
    async with watching(cluster, here) as source:
        metadata = {"name": "server", "namespace": here}
        await cluster.apply(server, {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": service})
        await cluster.apply(*wanted)
        desired = await until_desired(source, name, lambda it: any(e.gpu_uuid for e in it.endpoints))
        ((gpu, uuid),) = [(e.gpu, e.gpu_uuid) for e in desired.routes[name].endpoints]
        assert (gpu, uuid) == (product, B)
        assert product in desired.routes[name].profiles
        await gpu_node.delete(here, "server")
        await until_desired(source, name, lambda it: not it.endpoints)


async def test_tenants_never_share_a_gpu(gpu_node: GpuNode, namespaces: list[str]) -> None:
    """Two that start at once get a GPU each, and stay on it; a third is refused in words that name the others, and
    gets the first GPU whose tenant leaves."""
    one, two, three = namespaces
    with default_again(gpu_node):
        gpu_node.policy(mode="MPS", replicas=SLOTS, isolation="Tenant")
        await gpu_node.until_status(lambda found: {s["isolation"] for s in found.values()} == {"Tenant"}, "isolated")
        await started(gpu_node, pod("a", one, 1), pod("b", two, 1))
        await started(gpu_node, pod("c", one, 2))
        assert await tenants(gpu_node) == [[one], [two]]
        assert sorted(s["tenant"] for s in (await gpu_node.status()).values()) == [one, two]

        await gpu_node.cluster.apply(pod("d", three, 1))
        failed = await gpu_node.phase(three, "d", "Failed")
        assert failed["status"]["reason"] == "UnexpectedAdmissionError"
        for words in ("TenantConflict", f"is taken by {one}", f"is taken by {two}", f"a pod of {three} asks"):
            assert words in failed["status"]["message"]
        await gpu_node.delete(two, "b")
        await started(gpu_node, pod("e", three, SLOTS))
        assert await tenants(gpu_node) == [[one], [three]]


# ------------------------------------------------------------------------------------------------------------ helpers


async def started(gpu_node: GpuNode, *pods: Document) -> None:
    """Created in one go; returns when they run and it is known what they hold."""
    before = {name for _, name, _ in await gpu_node.holders()}
    await gpu_node.cluster.apply(*pods)
    names = [(str(one["metadata"]["namespace"]), str(one["metadata"]["name"])) for one in pods]
    for namespace, name in names:
        await gpu_node.phase(namespace, name, "Running")
    await gpu_node.until_holders(*before, *(name for _, name in names))


async def tenants(gpu_node: GpuNode) -> list[list[str]]:
    """Namespaces on each GPU that anybody is on, sorted."""
    found: dict[str, set[str]] = {}
    for (namespace, _, _), held in (await gpu_node.holders()).items():
        for uuid in held:
            found.setdefault(uuid, set()).add(namespace)
    return sorted(sorted(spaces) for spaces in found.values())


async def asked(gpu_node: GpuNode, value: Document) -> str:
    """Why the API server refuses the pod; "" when it would take it."""
    try:
        await gpu_node.cluster.kubectl("create", "--dry-run=server", "--filename=-", stdin=text(value))
    except KubectlError as error:
        return str(error)
    return ""


async def until_refused(gpu_node: GpuNode, value: Document, words: str) -> None:
    async def refused() -> bool:
        return words in await asked(gpu_node, value)

    await until(refused, f"a pod is refused: {words}")


async def until_taken(gpu_node: GpuNode, value: Document) -> None:
    async def taken() -> bool:
        return not await asked(gpu_node, value)

    await until(taken, "the pod is taken")


async def said(gpu_node: GpuNode) -> Any:
    """Of the policy `default`, and of the slots that the node has."""
    status = (await gpu_node.cluster.get("gsp", "default"))["status"]
    return status, (await gpu_node.cluster.get("node", NAME))["status"]["allocatable"]


async def row(gpu_node: GpuNode, kind: str, name: str) -> Sequence[str]:
    """What kubectl shows of one object, by columns."""
    return (await gpu_node.cluster.kubectl("get", kind, name, "--no-headers")).split()
