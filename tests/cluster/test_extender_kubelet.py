"""Placement with everything that is real: the second scheduler and the accounts of deploy/extender, `meshctl extender`,
the kubelet and the agent of a node with two GPUs, beside the cluster's own scheduler, which knows of none of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from meshctl.api.allocation import ALLOCATION, read_allocation
from meshctl.sharing import RESOURCE
from tests.cluster.cluster import Document, KubectlError
from tests.cluster.gpunode import FOREVER, SLOTS, UUIDS, GpuNode, pod
from tests.cluster.node import NAME
from tests.cluster.processes import Scheduler
from tests.harness.extender import DEPLOY, ExtenderProcess
from tests.harness.tools import completed, until

pytestmark = pytest.mark.cluster
A, B = UUIDS
NAMESPACE = "meshctl-system"
HOWTO = Path(__file__).parents[2] / "docs" / "howto" / "placement.md"
SAY = f"echo gpu=$NVIDIA_VISIBLE_DEVICES; {FOREVER}"
WORDS = f"no GPU has 3 of {RESOURCE} free: the most is 2 (of 4 free in all)"
GONE = {"metadata": {"deletionTimestamp": "some time ago"}}
STUBBORN = "trap '' TERM; until [ -e /over ]; do sleep 0.2; done"
"""A script that does not end when it is told to, but when there is a file."""


@dataclass(frozen=True)
class Placing:
    """The node, and who places pods on it."""

    node: GpuNode
    extender: ExtenderProcess
    namespace: str = ""

    def pod(self, name: str, slots: int, script: str = FOREVER, **spec: Any) -> Document:
        """One that the second scheduler places."""
        return pod(name, self.namespace, slots, script, schedulerName="meshctl-scheduler", **spec)

    async def apply(self, *values: Document) -> None:
        await self.node.cluster.apply(*values)

    async def running(self, *names: str) -> Mapping[str, Any]:
        """The pods, when they all run; what is said of them when they don't."""
        try:
            return {name: await self.node.phase(self.namespace, name, "Running") for name in names}
        except KubectlError as error:
            said = await self.node.cluster.kubectl("get", "events", f"--namespace={self.namespace}")
            raise AssertionError(f"{error}; log: {self.extender.log}\n{said}") from error

    async def pods(self) -> Mapping[str, Any]:
        found = await self.node.cluster.get("pods", f"--namespace={self.namespace}")
        return {one["metadata"]["name"]: one for one in found["items"]}

    async def waits(self, name: str, words: str) -> str:
        """What `kubectl describe pod` says of why the pod waits, when `words` are in it."""
        said = ""

        async def told() -> bool:
            nonlocal said
            said = await self.node.cluster.kubectl("describe", "pod", name, f"--namespace={self.namespace}")
            return words in said

        await until(told, f"kubectl describe pod {name} says: {words}; log: {self.extender.log}")
        assert "nodeName" not in (await self.pods())[name]["spec"]
        return next(line for line in said.splitlines() if words in line)

    async def held(self) -> Mapping[tuple[str, str], Mapping[str, int]]:
        """(pod, container) -> UUID -> slots, as the kubelet has given them."""
        holders = await self.node.holders()
        return {key[1:]: {uuid: len(slots) for uuid, slots in gpus.items()} for key, gpus in holders.items()}


@pytest.fixture(scope="module")
def processes(gpu_node: GpuNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExtenderProcess]:
    """The extender and the second scheduler, with the rights that deploy/extender gives them."""
    cluster, directory = gpu_node.cluster, tmp_path_factory.mktemp("placement")
    for path in (DEPLOY.parent / "namespace.yaml", DEPLOY / "rbac.yaml"):
        cluster.kubectl_now("apply", f"--filename={path}")
    accounts = [f"{NAMESPACE}/{name}" for name in ("meshctl-extender", "meshctl-scheduler")]
    ours, schedulers = (asyncio.run(cluster.kubeconfig_for(account)) for account in accounts)
    extender = ExtenderProcess(directory / "extender", ours, accounts[0])
    scheduler = None
    try:
        extender.start()
        scheduler = Scheduler(directory / "scheduler", schedulers, extender.scheduler_config())
        scheduler.start()
        yield extender
    finally:
        if scheduler is not None:
            scheduler.stop()
        extender.stop()


@pytest.fixture
async def placing(gpu_node: GpuNode, processes: ExtenderProcess) -> AsyncIterator[Placing]:
    """In a namespace of the test's own, whose pods are gone afterwards."""
    found = Placing(gpu_node, processes, await gpu_node.cluster.namespace())
    yield found
    await gpu_node.delete(found.namespace)


async def test_each_container_gets_the_gpu_that_was_chosen_for_it(placing: Placing) -> None:
    """Two of them in one pod, beside a pod of the cluster's own scheduler: the annotation, the environment, and the
    kubelet's word are one, and every GPU is full."""
    await placing.apply(pod("other", placing.namespace, 1))  # where, is the agent's choice
    await placing.running("other")
    await placing.node.until_holders("other")
    twins = placing.pod("twins", 3, SAY)
    (main,) = twins["spec"]["containers"]
    twins["spec"]["containers"].append({**main, "name": "second"})
    await placing.apply(twins)
    await placing.running("twins")
    await placing.apply(placing.pod("small", 1, SAY))
    pods = await placing.running("twins", "small")
    await placing.node.until_holders("other", "small", "twins")

    held = await placing.held()
    for name, value in pods.items():
        allocation = read_allocation(value["metadata"]["annotations"])
        assert allocation is not None
        for container, gpus in allocation.by_container().items():
            assert held[name, container] == gpus
            (uuid,) = gpus
            log = await placing.node.cluster.kubectl(
                "logs", name, f"--container={container}", f"--namespace={placing.namespace}"
            )
            assert f"gpu={uuid}" in log.splitlines()
    assert {*held["twins", "main"], *held["twins", "second"]} == {A, B}
    assert {*held["small", "main"], *held["other", "main"]} == {A, B}
    assert ALLOCATION not in (await placing.pods())["other"]["metadata"].get("annotations", {})


async def test_a_pod_waits_for_room_on_one_gpu_and_is_told_so(placing: Placing) -> None:
    """Two GPUs with 2 of 4 slots free each: Kubernetes counts 4 and would place a pod of 3. A pod that is on its way
    out keeps its slots until it is gone; then the pod runs where it was."""
    here = placing.namespace
    await placing.apply(
        pod("a", here, 2, STUBBORN, plan={A: 2}, terminationGracePeriodSeconds=45), pod("b", here, 2, plan={B: 2})
    )
    await placing.running("a", "b")
    await placing.node.until_holders("a", "b")
    node = (await placing.node.cluster.get("node", NAME))["status"]
    assert int(node["allocatable"][RESOURCE]) - 4 == SLOTS
    await placing.apply(placing.pod("large", 3))
    line = await placing.waits("large", WORDS)
    assert told(line) in told(HOWTO.read_text())

    await placing.node.cluster.kubectl("delete", "pod", "a", f"--namespace={here}", "--wait=false")
    await placing.apply(placing.pod("later", 3))
    await placing.waits("later", WORDS)
    assert (await placing.pods())["a"]["metadata"]["deletionTimestamp"]
    await placing.node.cluster.kubectl("delete", "pod", "later", f"--namespace={here}")
    await placing.node.cluster.kubectl("exec", "a", f"--namespace={here}", "--", "touch", "/over")
    await placing.running("large")
    await placing.node.until_holders("b", "large")
    assert (await placing.held())["large", "main"] == {A: 3}


async def test_pods_wait_while_the_extender_is_away(placing: Placing) -> None:
    """Nothing is placed by the node's sum alone; pods of the cluster's own scheduler don't notice. When it is back it
    knows who has what."""
    await placing.apply(placing.pod("first", 3))
    await placing.running("first")
    await placing.node.until_holders("first")
    await placing.extender.end()
    try:
        await placing.apply(placing.pod("second", 3), pod("other", placing.namespace, 0))
        assert "connection refused" in await placing.waits("second", "/filter")
        await placing.running("other")
    finally:
        await completed(placing.extender.start)
    await placing.running("second")
    await placing.node.until_holders("first", "second")
    held = await placing.held()
    assert {*held["first", "main"], *held["second", "main"]} == {A, B}


async def test_who_is_evicted_makes_room_on_one_gpu(placing: Placing) -> None:
    """Kubernetes would evict pods that only add up, on two GPUs; the extender sees to it that enough go from one, and
    the pod runs there. The others run on."""
    here = placing.namespace
    high = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": here}, "value": 1000}
    before = {"a": (A, 2), "b": (B, 2), "c": (B, 1), "d": (A, 2), "e": (B, 1)}
    await placing.apply(high, *(pod(name, here, slots, plan={uuid: slots}) for name, (uuid, slots) in before.items()))
    try:
        await placing.running(*before)
        await placing.node.until_holders(*before)
        await placing.apply(placing.pod("vip", 3, priorityClassName=here))
        await placing.running("vip")
        pods = await placing.pods()
        stayed = sorted(name for name in before if "deletionTimestamp" not in pods.get(name, GONE)["metadata"])
        await placing.node.until_holders(*stayed, "vip")
    finally:
        await placing.node.cluster.kubectl("delete", "priorityclass", here)
    ((uuid, slots),) = (await placing.held())["vip", "main"].items()
    assert slots == 3
    gone = {*before} - {*stayed}
    assert sum(taken for on, taken in map(before.__getitem__, gone) if on == uuid) >= 3
    assert len(stayed) >= 2


def told(text: str) -> str:
    """An Event's message, as far as it does not depend on when and where; or a page, to look for it."""
    text = " ".join(text.split())
    return text[text.index("0/") :] if text.startswith("Warning") else text
