"""An agent in this process, with real parts, on a node whose kubelet and API server are values."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from deviceplugin.agent import Agent, Pace, Parts
from deviceplugin.checkpoint import Checkpoint
from deviceplugin.inventory import FileInventory
from deviceplugin.metrics import Metrics
from deviceplugin.mps import MpsDaemons
from deviceplugin.node import Node, Saved
from deviceplugin.policies import Policy
from meshctl.api.gpusharingpolicy import GPUSharingPolicySpec
from meshctl.controller.clock import MonotonicClock
from meshctl.model import Problem
from meshctl.ports import KubeObject
from meshctl.sharing import RESOURCE, Mode, Owner, Slot
from tests.harness.agent import inventory
from tests.harness.model_kubelet import Call, ModelKubelet, Pod, Preferred, answered_later

A, B = "GPU-a", "GPU-b"
SLICED = GPUSharingPolicySpec(mode=Mode.TIME_SLICING, replicas=4)


class Cluster:
    """`agent.World`: its pods are known at once when they are asked for; what is watched is told by `told`."""

    def __init__(self, spec: GPUSharingPolicySpec) -> None:
        self.node_labels: Mapping[str, str] | None = {}
        self.node_uid = ""
        self.live: list[KubeObject] = []
        self.watched: list[KubeObject] | None = []
        self._policies = (Policy("p", spec),)
        self._changed = asyncio.Event()
        self.answers = asyncio.Event()
        """While it is not set, nobody who asks for the pods gets an answer."""
        self.answers.set()

    def policies(self) -> Sequence[Policy]:
        return self._policies

    def pods(self) -> Sequence[KubeObject] | None:
        return self.watched

    async def fresh_pods(self, deadline_s: float) -> Sequence[KubeObject]:
        await self.answers.wait()
        return list(self.live)

    def problems(self) -> tuple[Problem, ...]:
        return ()

    def told(self) -> None:
        self.watched = list(self.live)

    def policy(self, spec: GPUSharingPolicySpec) -> None:
        """It is another one from now on."""
        self._policies = (Policy("p", spec, self._policies[0].generation + 1),)
        self._changed.set()

    async def wait_changed(self) -> None:
        await self._changed.wait()
        self._changed.clear()


class Shown:
    """`agent.Holdings` of a model kubelet."""

    def __init__(self, kubelet: ModelKubelet) -> None:
        self._kubelet = kubelet

    async def held(self, resources: Collection[str]) -> Mapping[Slot, Owner]:
        return self._kubelet.listing()


class LaterClock(MonotonicClock):
    """The machine's, put forward at will."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.ahead_s


class World:
    """A node of two GPUs of four slots, its kubelet, and its API server. `control` is nvidia-cuda-mps-control."""

    def __init__(
        self,
        directory: Path,
        spec: GPUSharingPolicySpec = SLICED,
        control: Path = Path("none"),
        saved: Saved | None = None,
    ) -> None:
        self.kubelet, self.cluster = ModelKubelet(), Cluster(spec)
        gpus = FileInventory(inventory(directory, A, B))
        node = Node.restored(saved)
        mps = MpsDaemons(control, directory / "mps", gpus, busy=node.busy)
        state = Checkpoint(directory / "agent.json")
        self.clock = LaterClock()
        parts = Parts("node-1", gpus, mps, Shown(self.kubelet), self.cluster, state, self.clock, Metrics())
        self.agent = Agent(parts, node, Pace(retry_s=0.1, inventory_s=0.1))

    async def start(self) -> None:
        await self.agent.start()
        while len(self.agent.node.offered()) == 0:
            await self.agent.changed()
        self.kubelet.healthy[RESOURCE] = frozenset(one.id for one in self.agent.devices(RESOURCE) if one.healthy)

    async def answer(self, call: Call) -> list[str]:
        if isinstance(call, Preferred):
            return await self.agent.preferred(call.resource, call.available, call.must, call.size)
        await self.agent.allocate(call.resource, [call.ids])
        return []

    async def ran(self, pod: Pod) -> str:
        """The pod was bound, and the kubelet admits it; "", or why it was refused."""
        self.cluster.live.append(pod.object())
        refused = await answered_later(self.kubelet.admit(pod), self.answer)
        self.cluster.live[-1] = pod.object(phase="Failed" if refused else "Running", started=True)
        return refused

    async def looked(self) -> None:
        """The agent has heard of all, and asked the kubelet."""
        self.cluster.told()
        await self.agent._ask_kubelet()  # noqa: SLF001 (what its loop does every second)

    def later(self, by_s: float) -> None:
        self.clock.ahead_s += by_s

    def gone(self, pod: Pod) -> None:
        """It has ended, and is deleted."""
        self.kubelet.ended(pod)
        self.cluster.live = [one for one in self.cluster.live if one["metadata"]["name"] != pod.name]

    def gpus_of(self, pod: Pod) -> set[str]:
        return {Slot.parse(one).uuid for ids in self.kubelet.pods[pod].values() for one in ids}
