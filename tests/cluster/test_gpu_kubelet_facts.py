"""What the agent takes for granted of a kubelet, asked of a real one; see `deviceplugin.tickets` and `podresources`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deviceplugin.podresources import PodResources
from deviceplugin.ports import ContainerResponse, Device
from deviceplugin.server import PluginServer
from meshctl.sharing import Owner, Slot
from tests.cluster.gpunode import GpuNode, pod
from tests.harness.tools import DEADLINE_S

pytestmark = pytest.mark.cluster
SLOTS = tuple(str(Slot("GPU-facts", number)) for number in range(6))


@dataclass
class Witness:
    """`ports.Backend`: offers `SLOTS`, lets the kubelet choose, and writes down what is known at each call."""

    gpu_node: GpuNode
    namespace: str
    resource: str
    """Of this test alone: a kubelet remembers those of plugins that are gone."""
    asked: list[tuple[str, frozenset[str], frozenset[str]]] = field(default_factory=list)
    """Of each call: which it is, its slots (of a preference: those that must be), and pods that have a startTime."""

    def devices(self, resource: str) -> Sequence[Device]:
        return [Device(slot, healthy=True) for slot in SLOTS]

    async def wait_changed(self, resource: str, seen: Sequence[Device]) -> Sequence[Device]:
        await asyncio.Event().wait()
        return seen

    async def preferred(self, resource: str, available: Sequence[str], must: Sequence[str], size: int) -> list[str]:
        await self._note("prefer", must)
        return [*must, *sorted({*available} - {*must})][:size]

    async def allocate(self, resource: str, containers: Sequence[Sequence[str]]) -> list[ContainerResponse]:
        for ids in containers:
            await self._note("allocate", ids)
        return [ContainerResponse() for _ in containers]

    async def pre_start(self, resource: str, ids: Sequence[str]) -> None: ...

    async def _note(self, what: str, ids: Sequence[str]) -> None:
        pods = (await self.gpu_node.cluster.get("pods", f"--namespace={self.namespace}"))["items"]
        begun = frozenset(one["metadata"]["name"] for one in pods if one["status"].get("startTime"))
        self.asked.append((what, frozenset(ids), begun))


@pytest.fixture
async def witness(gpu_node: GpuNode) -> AsyncIterator[Witness]:
    namespace = await gpu_node.cluster.namespace()
    found = Witness(gpu_node, namespace, f"facts.example/{namespace}")
    server = asyncio.create_task(PluginServer(gpu_node.node.plugin_dir, found.resource, found).run())
    try:
        await asyncio.to_thread(gpu_node.allocatable, len(SLOTS), found.resource)
        yield found
        await gpu_node.delete(found.namespace)
    finally:
        server.cancel()
        await asyncio.wait([server])


async def test_pods_are_admitted_one_at_a_time_and_have_a_start_time_then(witness: Witness) -> None:
    """While a pod's containers are allocated, in their order, it has none: it is among the candidates. The next
    container must take what the init container had."""
    node, space = witness.gpu_node, witness.namespace
    await node.cluster.apply(pod("a", space, 2, init=[1], resource=witness.resource))
    await node.phase(space, "a", "Running")
    await node.cluster.apply(pod("b", space, 3, resource=witness.resource))
    running = await node.phase(space, "b", "Running")
    calls = [(what, len(ids), sorted(begun)) for what, ids, begun in witness.asked]
    of_a: list[Any] = [("prefer", 0, []), ("allocate", 1, []), ("prefer", 1, []), ("allocate", 2, [])]
    assert calls == [*of_a, ("prefer", 0, ["a"]), ("allocate", 3, ["a"])]
    assert running["status"]["startTime"]
    _, init, must, main = (ids for _, ids, _ in witness.asked[:4])
    assert init == must < main


async def test_slots_of_an_init_container_are_its_pods_and_nobody_is_shown_with_them(
    witness: Witness, tmp_path: Path
) -> None:
    """While it runs, the later containers are shown with what they take over; the rest stays the pod's till its end."""
    node, space = witness.gpu_node, witness.namespace
    server: Any = pod("server", space, 2, init=[3], resource=witness.resource)
    (init,) = server["spec"]["initContainers"]
    init["command"] = ["sh", "-c", "trap exit TERM; until test -e /test/go; do sleep 0.1; done"]
    init["volumeMounts"] = [{"name": "test", "mountPath": "/test"}]
    server["spec"]["volumes"] = [{"name": "test", "hostPath": {"path": str(tmp_path)}}]
    await node.cluster.apply(server)
    state = "--for=jsonpath={.status.initContainerStatuses[0].state.running.startedAt}"
    await node.cluster.kubectl("wait", state, "pod/server", f"--namespace={space}", f"--timeout={DEADLINE_S:g}s")
    before = await held(witness)
    (tmp_path / "go").touch()
    await node.phase(space, "server", "Running")
    await node.cluster.apply(pod("other", space, 3, resource=witness.resource))
    await node.phase(space, "other", "Running")
    by_init, by_main, by_other = (ids for what, ids, _ in witness.asked if what == "allocate")
    assert by_main < by_init
    assert not by_other & by_init
    mains = dict.fromkeys(by_main, Owner(space, "server", "main"))
    others = dict.fromkeys(by_other, Owner(space, "other", "main"))
    assert (before, await held(witness)) == (mains, mains | others)


async def held(witness: Witness) -> dict[str, Owner]:
    """As pod-resources shows it."""
    node = witness.gpu_node.node
    resources = PodResources(node.pod_resources, node.plugin_dir, young_s=0)
    try:
        return {str(slot): owner for slot, owner in (await resources.held({witness.resource})).items()}
    finally:
        await resources.close()
