"""GPUs as slots of a real kubelet, given to real pods, from the real API server's objects."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from tests.cluster.gpunode import FOREVER, SLOTS, UUIDS, GpuNode, pod
from tests.harness.tools import completed

pytestmark = pytest.mark.cluster
A, B = UUIDS


@pytest.fixture
async def namespace(gpu_node: GpuNode) -> AsyncIterator[str]:
    """A namespace of the test's own; its pods are gone afterwards."""
    name = await gpu_node.cluster.namespace()
    yield name
    await gpu_node.delete(name)


async def test_a_container_gets_slots_of_one_gpu_and_everybody_sees_it(gpu_node: GpuNode, namespace: str) -> None:
    """Its environment limits it to its share; the GPU object, kubectl's table and the kubelet say the same."""
    show = f"env; ls -d $CUDA_MPS_PIPE_DIRECTORY; {FOREVER}"
    await gpu_node.cluster.apply(pod("server", namespace, 3, show))
    await gpu_node.phase(namespace, "server", "Running")
    (holder,) = (await gpu_node.until_holders("server")).items()
    (uuid,) = holder[1]
    log = await gpu_node.cluster.kubectl("logs", "server", f"--namespace={namespace}")
    lines = dict(line.split("=", 1) for line in log.splitlines() if "=" in line)
    assert holder[0] == (namespace, "server", "main")
    assert lines["NVIDIA_VISIBLE_DEVICES"] == uuid
    assert lines["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "75"
    assert lines["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=12288M"
    assert lines["CUDA_MPS_PIPE_DIRECTORY"] in log.splitlines()
    table = await gpu_node.cluster.kubectl("get", "gpus")
    row = next(line for line in table.splitlines() if line.startswith(uuid.lower()))
    assert "3/4" in row.split()


async def test_two_pods_are_packed_and_a_third_goes_elsewhere(gpu_node: GpuNode, namespace: str) -> None:
    """2 and 2 fill one GPU; a GPU that is 3/4 used does not get 2 more (6)."""
    for name, slots in (("a", 3), ("b", 2), ("c", 1)):
        await gpu_node.cluster.apply(pod(name, namespace, slots))
        await gpu_node.phase(namespace, name, "Running")
    found = {key[1]: set(uuids) for key, uuids in (await gpu_node.until_holders("a", "b", "c")).items()}
    assert found["a"] == found["c"] != found["b"]


async def test_the_gpu_that_the_scheduler_chose_is_the_one_that_the_container_gets(
    gpu_node: GpuNode, namespace: str
) -> None:
    """Though packing would choose another: the plan and the kubelet's IDs are the same."""
    await gpu_node.cluster.apply(pod("first", namespace, 1, plan={B: 1}))
    await gpu_node.phase(namespace, "first", "Running")
    await gpu_node.cluster.apply(pod("second", namespace, 2, plan={A: 2}))
    await gpu_node.phase(namespace, "second", "Running")
    holders = await gpu_node.until_holders("first", "second")
    assert {key[1]: tuple(uuids) for key, uuids in holders.items()} == {"first": (B,), "second": (A,)}


async def test_9_init_containers_demand_is_a_peak(gpu_node: GpuNode, namespace: str) -> None:
    """Their slots are the container's afterwards: 3 then 4 of the 4 there are on one GPU."""
    await gpu_node.cluster.apply(pod("server", namespace, SLOTS, init=[SLOTS - 1]))
    await gpu_node.phase(namespace, "server", "Running")
    ((_, held),) = (await gpu_node.until_holders("server")).items()
    assert [len(numbers) for numbers in held.values()] == [SLOTS]


async def test_a_restart_of_kubelet_agent_or_containerd_loses_nothing(gpu_node: GpuNode, namespace: str) -> None:
    """Killed one after the other: holders, slots and the MPS daemons are as before, and new pods run."""
    await gpu_node.cluster.apply(pod("server", namespace, 2))
    await gpu_node.phase(namespace, "server", "Running")
    holders = await gpu_node.until_holders("server")
    daemons = {uuid: status["mps"]["state"] for uuid, status in (await gpu_node.status()).items()}
    for number, process in enumerate((gpu_node.node.kubelet, gpu_node.agent, gpu_node.node.containerd)):
        await process.end(signal.SIGKILL)
        await completed(process.start)
        name = f"after-{number}"
        gpu_node.allocatable(SLOTS * len(UUIDS))
        await gpu_node.cluster.apply(pod(name, namespace, 1, "true"))
        await gpu_node.phase(namespace, name, "Succeeded")
        assert await gpu_node.until_holders("server") == holders
    assert {uuid: status["mps"]["state"] for uuid, status in (await gpu_node.status()).items()} == daemons


async def test_a_policy_change_waits_for_the_pods(gpu_node: GpuNode, namespace: str) -> None:
    """The GPU with a pod stays as it is, its neighbour changes at once; when the pod ends it changes too."""
    await gpu_node.cluster.apply(pod("server", namespace, 1, plan={A: 1}))
    await gpu_node.phase(namespace, "server", "Running")
    gpu_node.policy(mode="TimeSlicing", replicas=2)
    try:
        gpu_node.allocatable(SLOTS + 2)
        status = await gpu_node.until_status(lambda found: found[B]["mode"] == "TimeSlicing", "B has changed")
        assert (status[A]["mode"], status[A]["slots"]["total"]) == ("MPS", SLOTS)
        await gpu_node.delete(namespace, "server")
        gpu_node.allocatable(4)
        await gpu_node.until_status(lambda found: found[A]["mode"] == "TimeSlicing", "A has changed, too")
    finally:
        gpu_node.default_policy()
        gpu_node.allocatable(SLOTS * len(UUIDS))


async def test_a_gpu_that_falls_off_the_bus_is_told_of_and_comes_back(gpu_node: GpuNode, namespace: str) -> None:
    """All its slots go at once, its pod keeps running and its holder is known."""
    await gpu_node.cluster.apply(pod("server", namespace, 1, plan={A: 1}))
    await gpu_node.phase(namespace, "server", "Running")
    holders = await gpu_node.until_holders("server")
    gpu_node.gpus(B)
    try:
        gpu_node.allocatable(SLOTS)
        await gpu_node.until_status(lambda found: _healthy(found[A]) == ("False", "Lost"), "A is told to be lost")
        assert await gpu_node.holders() == holders
    finally:
        gpu_node.gpus(*UUIDS)
        gpu_node.allocatable(SLOTS * len(UUIDS))


async def test_an_impossible_ask_says_why_on_the_pod(gpu_node: GpuNode, namespace: str) -> None:
    """3 free on each of two GPUs are not 4: the pod fails with the numbers, and nothing is held for it (7)."""
    for name, uuid in (("a", A), ("b", B)):
        await gpu_node.cluster.apply(pod(name, namespace, 1, plan={uuid: 1}))
        await gpu_node.phase(namespace, name, "Running")
    await gpu_node.cluster.apply(pod("big", namespace, SLOTS))
    failed = await gpu_node.phase(namespace, "big", "Failed")
    assert failed["status"]["reason"] == "UnexpectedAdmissionError"
    assert "NoRoom" in failed["status"]["message"]
    await gpu_node.until_holders("a", "b")


def _healthy(status: Mapping[str, Any]) -> tuple[str, str]:
    """Status and reason of the condition."""
    found = next(one for one in status["conditions"] if one["type"] == "Healthy")
    return found["status"], found["reason"]
