"""The agent as a process, without a cluster: a kubelet's protocol, an inventory file and a policy file."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest

from meshctl.sharing import RESOURCE, Owner, Slot
from tests.harness.agent import AgentProcess, inventory, policies
from tests.harness.fake_kubelet import FakeKubelet
from tests.harness.tools import until

SLICED = {"mode": "TimeSlicing", "replicas": 4}
A = Owner("team", "a", "main")


@pytest.fixture
async def kubelet(tmp_path: Path) -> AsyncIterator[FakeKubelet]:
    async with FakeKubelet(tmp_path / "kubelet") as kubelet:
        yield kubelet


def _agent(tmp_path: Path, kubelet: FakeKubelet, *options: str | Path) -> AgentProcess:
    return AgentProcess(
        tmp_path / "agent",
        kubelet.plugin_dir,
        kubelet.pod_resources,
        f"--inventory=file:{tmp_path / 'gpus.json'}",
        f"--policy={tmp_path / 'policies.yaml'}",
        *options,
    )


async def test_gpus_are_slots_of_the_kubelets(tmp_path: Path, kubelet: FakeKubelet) -> None:
    """Two GPUs of four slots are eight devices; a container gets its slots on one GPU, and people see the holder."""
    inventory(tmp_path, "GPU-1", "GPU-2")
    policies(tmp_path, default=SLICED)
    async with _agent(tmp_path, kubelet) as agent:
        await kubelet.has(RESOURCE, 8)
        answer = await kubelet.admit(A, RESOURCE, 3)
        slots = [Slot.parse(text) for text in kubelet.held[A, RESOURCE]]
        assert len({slot.uuid for slot in slots}) == 1
        assert answer.envs["NVIDIA_VISIBLE_DEVICES"] == slots[0].uuid
        await kubelet.start_container(A, RESOURCE)

        async def told() -> bool:
            return bool(agent.gpus()[slots[0].uuid].get("holders"))

        await until(told, "the holder is told of")
        assert agent.gpus()[slots[0].uuid]["holders"] == [
            {"namespace": "team", "pod": "a", "container": "main", "slots": sorted(slot.number for slot in slots)}
        ]
        assert agent.gpus()[slots[0].uuid]["summary"] == "3/4"
        assert agent.memory_mib < 100


async def test_the_log_tells_what_becomes_of_a_gpu(tmp_path: Path, kubelet: FakeKubelet) -> None:
    """Without a cluster there are no Events: how it is shared, and that it is not well and why, each once."""
    inventory(tmp_path, "GPU-1", "GPU-2")
    policies(tmp_path, default=SLICED)
    async with _agent(tmp_path, kubelet) as agent:
        await kubelet.has(RESOURCE, 8)
        inventory(tmp_path, "GPU-1")
        await kubelet.has(RESOURCE, 4)
        policies(tmp_path, default=SLICED | {"replicas": 2})
        await kubelet.has(RESOURCE, 2)

        def told(gpu: str) -> list[tuple[str, str]]:
            found = (orjson.loads(line) for line in agent.log.read_text().splitlines())
            return [(one["event"], one["message"]) for one in found if one.get("gpu") == gpu and "message" in one]

        async def last() -> bool:
            return len(told("GPU-1")) >= 2

        await until(last, f"the last change is told; log: {agent.log}")
        shared = [f"TimeSlicing, {slots} slots of hpe.com/gpus (policy default, generation 0)" for slots in (4, 2)]
        assert told("GPU-1") == [("PolicyInForce", message) for message in shared]
        assert told("GPU-2")[0] == ("PolicyInForce", shared[0])
        event, message = told("GPU-2")[1]
        assert (event, message[:11]) == ("GpuUnhealthy", "Lost: GPU-2")  # in the words of whoever saw it first
