"""Whose Allocate it is: the agent with a model kubelet and an API server's pods, both as values, and its real parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path

import pytest

from deviceplugin.agent import Agent, Parts
from deviceplugin.checkpoint import Checkpoint
from deviceplugin.inventory import FileInventory
from deviceplugin.metrics import Metrics
from deviceplugin.mps import MpsDaemons
from deviceplugin.node import Node
from deviceplugin.policies import Policy
from meshctl.api.gpusharingpolicy import GPUSharingPolicySpec
from meshctl.controller.clock import MonotonicClock
from meshctl.model import Problem
from meshctl.ports import KubeObject
from meshctl.sharing import RESOURCE, Isolation, Mode, Owner, Slot
from tests.harness.agent import inventory
from tests.harness.model_kubelet import Call, Container, ModelKubelet, Pod, Preferred, answered_later

A, B = "GPU-a", "GPU-b"


class Cluster:
    """`agent.World`: its pods are known at once when they are asked for; what is watched is told by `told`."""

    def __init__(self, isolation: Isolation) -> None:
        spec = GPUSharingPolicySpec(mode=Mode.TIME_SLICING, replicas=4, isolation=isolation)
        self.node_labels: Mapping[str, str] | None = {}
        self.node_uid = ""
        self.live: list[KubeObject] = []
        self.watched: list[KubeObject] = []
        self._policies = (Policy("p", spec),)

    def policies(self) -> Sequence[Policy]:
        return self._policies

    def pods(self) -> Sequence[KubeObject]:
        return list(self.watched)

    async def fresh_pods(self, deadline_s: float) -> Sequence[KubeObject]:
        return list(self.live)

    def problems(self) -> tuple[Problem, ...]:
        return ()

    def told(self) -> None:
        self.watched = list(self.live)

    async def wait_changed(self) -> None:
        await asyncio.Event().wait()


class Shown:
    """`agent.Holdings` of a model kubelet."""

    def __init__(self, kubelet: ModelKubelet) -> None:
        self._kubelet = kubelet

    async def held(self, resources: Collection[str]) -> Mapping[Slot, Owner]:
        return self._kubelet.listing()


class World:
    """A node of two GPUs of four slots, its kubelet, and its API server."""

    def __init__(self, directory: Path, isolation: Isolation = Isolation.NONE) -> None:
        self.kubelet, self.cluster = ModelKubelet(), Cluster(isolation)
        gpus = FileInventory(inventory(directory, A, B))
        node = Node.restored(None)
        mps = MpsDaemons(Path("none"), directory / "mps", gpus, busy=node.busy)
        state = Checkpoint(directory / "agent.json")
        parts = Parts("node-1", gpus, mps, Shown(self.kubelet), self.cluster, state, MonotonicClock(), Metrics())
        self.agent = Agent(parts, node)

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

    def gone(self, pod: Pod) -> None:
        """It has ended, and is deleted."""
        self.kubelet.ended(pod)
        self.cluster.live = [one for one in self.cluster.live if one["metadata"]["name"] != pod.name]

    def gpus_of(self, pod: Pod) -> set[str]:
        return {Slot.parse(one).uuid for ids in self.kubelet.pods[pod].values() for one in ids}


@pytest.fixture
async def world(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    found = World(tmp_path, getattr(request, "param", Isolation.NONE))
    await found.start()
    yield found
    await found.agent.stop()


def _pod(name: str, *plan: tuple[str, int], namespace: str = "x", created: str = "2026-01-01T00:00:00Z") -> Pod:
    asks = sum(count for _, count in plan) or 1
    return Pod(namespace, name, (Container("main", asks, plan=plan),), created)


@pytest.mark.parametrize("world", [Isolation.NONE, Isolation.TENANT], indirect=True)
@pytest.mark.parametrize("heard", ["nothing", "the pod", "the kubelet too"])
async def test_a_pod_of_the_same_name_as_the_last_one_gets_the_gpu_that_is_planned(world: World, heard: str) -> None:
    """A StatefulSet's: the agent has seen the last web-0 with slots, and not yet, or half, that it is gone."""
    first, again = _pod("web-0", (A, 2)), _pod("web-0", (B, 2), created="2026-01-01T00:01:00Z")
    neighbour = _pod("neighbour", (A, 1))
    assert await world.ran(neighbour) == ""
    assert await world.ran(first) == ""
    await world.looked()
    world.gone(first)
    if heard == "the kubelet too":
        world.cluster.live.append(again.object())
        await world.looked()
        world.cluster.live.pop()
    elif heard == "the pod":
        world.cluster.told()
    assert await world.ran(again) == ""
    assert world.gpus_of(again) == {B}
    assert world.gpus_of(neighbour) == {A}


@pytest.mark.parametrize("world", [Isolation.TENANT], indirect=True)
async def test_what_a_refused_pod_was_judged_by_is_not_the_next_ones(world: World) -> None:
    """A pod is refused in GetPreferredAllocation; an Allocate that comes without one is judged by the pods of now."""
    assert await world.ran(_pod("mine", (A, 1))) == ""
    assert "NoRoom" in await world.ran(_pod("big", (A, 4)))
    mine = _pod("next", namespace="x")
    world.cluster.live.append(mine.object())
    assert await world.agent.allocate(RESOURCE, [[str(Slot(A, 3))]])
