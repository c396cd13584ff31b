"""An hour of a node's life in less than a minute, at random: what people are shown is what the kubelet holds."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping
from random import Random
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from deviceplugin.podresources import PodResources
from meshctl.cli.app import app
from meshctl.errors import UnavailableError
from meshctl.sharing import RESOURCE, Owner, Slot
from tests.cluster.gpunode import SLOTS, UUIDS, GpuNode, pod
from tests.harness.tools import completed, until

pytestmark = pytest.mark.cluster
A, B = UUIDS
EVENTS = 20
LOOKS = 4
"""At so many points, the end among them, everything is compared."""
SEED = os.environ.get("MESHCTL_HOUR")
"""To see again what a failed run saw."""
Held = Mapping[Slot, Owner]


@pytest.fixture
async def hour(gpu_node: GpuNode) -> AsyncIterator[Hour]:
    """Two tenants' hour, on a node that is afterwards as it was."""
    seed = int(SEED) if SEED else Random().randrange(10**6)  # noqa: S311 (nothing here is a secret)
    found = Hour(gpu_node, [await gpu_node.cluster.namespace() for _ in range(2)], seed)
    try:
        yield found
    finally:
        await found.quiet()


class Hour:
    """What may happen, and what must agree then."""

    def __init__(self, node: GpuNode, namespaces: list[str], seed: int) -> None:
        self.node, self.namespaces, self.seed = node, namespaces, seed
        self.dice = Random(seed)  # noqa: S311 (nothing here is a secret)
        self.said: list[str] = []
        """What happened so far."""
        self._pods: list[tuple[str, str]] = []
        self._names = 0
        self._gone = self._otherwise = False

    async def pass_by(self) -> None:
        """One of the things that happen."""
        kinds = (self.pod_comes, self.pod_goes, self.kubelet_dies, self.agent_dies, self.gpu_lost_or_back, self.policy)
        await self.dice.choices(kinds, weights=(9, 6, 1, 1, 2, 1))[0]()

    async def pod_comes(self) -> None:
        namespace, slots = self.dice.choice(self.namespaces), self.dice.choice((1, 1, 2, 3))
        plan = self.dice.choice((None, None, {A: slots}, {B: slots}))
        self._names += 1
        name = f"pod-{self._names}"
        self.said.append(f"{namespace}/{name} asks for {slots}, planned for {plan}")
        self._pods.append((namespace, name))
        await self.node.cluster.apply(pod(name, namespace, slots, plan=plan))

    async def pod_goes(self) -> None:
        if self._pods:
            namespace, name = self._pods.pop(self.dice.randrange(len(self._pods)))
            self.said.append(f"{namespace}/{name} is deleted")
            place = f"--namespace={namespace}"
            await self.node.cluster.kubectl("delete", "pod", name, place, "--grace-period=1", "--wait=false")

    async def kubelet_dies(self) -> None:
        self.said.append("the kubelet is killed")
        await self.node.node.kubelet.end(signal.SIGKILL)
        await completed(self.node.node.kubelet.start)

    async def agent_dies(self) -> None:
        self.said.append("the agent is killed")
        await self.node.agent.end(signal.SIGKILL)
        await completed(self.node.agent.start)

    async def gpu_lost_or_back(self) -> None:
        self._gone = not self._gone
        self.said.append(f"{B} is {'lost' if self._gone else 'back'}")
        self.node.gpus(*UUIDS[: 1 if self._gone else 2])

    async def policy(self) -> None:
        self._otherwise = not self._otherwise
        self.said.append(f"policy {'TimeSlicing, 3 slots' if self._otherwise else 'as before'}")
        if self._otherwise:
            self.node.policy(mode="TimeSlicing", replicas=SLOTS - 1, health={"recoverAfter": "1s"})
        else:
            self.node.default_policy()

    async def quiet(self) -> None:
        """As it was before the hour."""
        self.node.gpus(*UUIDS)
        self.node.default_policy()
        for namespace in self.namespaces:
            await self.node.delete(namespace)
        await completed(self.node.allocatable, SLOTS * len(UUIDS))

    # ---------------------------------------------------------------------------------------------------- who says what

    async def all_agree(self) -> Held:
        """Returns what everybody says; the kubelet is the one who knows, and the others hear of it in a moment."""
        seen: dict[str, Any] = {}

        async def agreed() -> bool:
            seen.clear()
            held = seen["kubelet"] = await self.by_kubelet()
            if held is None:
                return False
            seen["GPU objects"] = await self.by_objects()
            if seen["GPU objects"] != held:
                return False
            seen["kubectl get gpus"], used = await self.by_kubectl(), _used(held)
            seen["map -o json"] = _by_json(await completed(self._map, "-o", "json"))
            seen["map"] = by_text(await completed(self._map))
            same = seen["kubectl get gpus"] == used and seen["map -o json"] == seen["map"] == held
            return same and await self.by_kubelet() == held

        try:
            await until(agreed, "all say the same")
        except AssertionError as late:
            history = "\n".join(self.said)
            raise AssertionError(f"{late}\n{seen}\nMESHCTL_HOUR={self.seed}\n{history}") from late
        held: Held = seen["kubelet"]
        return held

    async def by_kubelet(self) -> Held | None:
        """None while it does not say."""
        kubelet = PodResources(self.node.node.pod_resources, self.node.node.plugin_dir)
        try:
            return await kubelet.held({RESOURCE})
        except UnavailableError:
            return None
        finally:
            await kubelet.close()

    async def by_objects(self) -> Held:
        return {
            Slot(uuid, number): Owner(*owner)
            for owner, slots in (await self.node.holders()).items()
            for uuid, numbers in slots.items()
            for number in numbers
        }

    async def by_kubectl(self) -> dict[str, int]:
        """Slots in use, by UUID."""
        table = await self.node.cluster.kubectl("get", "gpus", "--output=wide")
        rows = {line.split()[0]: re.search(r" (\d+)/\d+ ", line) for line in table.splitlines()[1:]}
        return {uuid: int(row[1]) for uuid in UUIDS if (row := rows[uuid.lower()]) is not None}

    def _map(self, *options: str) -> str:
        arguments = ["gpu", "map", "--kubeconfig", str(self.node.cluster.kubeconfig), *options]
        ran = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
        assert ran.exit_code == 0, ran.output
        return ran.stdout


def _used(held: Held) -> dict[str, int]:
    return {uuid: sum(slot.uuid == uuid for slot in held) for uuid in UUIDS}


def _by_json(text: str) -> Held:
    return {
        Slot(one["spec"]["uuid"], number): Owner(holder["namespace"], holder["pod"], holder["container"])
        for one in orjson.loads(text)
        for holder in one["status"].get("holders", ())
        for number in holder["slots"]
    }


def by_text(text: str) -> Held:
    """The picture read again: the letter of each cell, and whose letter it is."""
    bars = {found[1]: found[2] for found in re.finditer(r"^ +(GPU-\w+) +(\S+) ", text, re.MULTILINE)}
    owners = re.finditer(r"^ +(\w) +([^ /]+)/([^ \[]+)\[([^ \]]+)\] ", text, re.MULTILINE)
    whose = {found[1]: Owner(found[2], found[3], found[4]) for found in owners}
    return {
        Slot(uuid, number): whose[cell]
        for uuid, bar in bars.items()
        for number, cell in enumerate(bar)
        if cell.isalnum()
    }


async def test_after_a_random_hour_everybody_says_what_the_kubelet_holds(hour: Hour) -> None:
    """Slot by slot: pod-resources, the GPU objects, `kubectl get gpus`, and `meshctl gpu map` as text and as JSON."""
    for number in range(1, EVENTS + 1):
        await hour.pass_by()
        await asyncio.sleep(hour.dice.random() / 4)
        if number % (EVENTS // LOOKS) == 0:
            await hour.all_agree()
    await hour.quiet()
    assert await hour.all_agree() == {}
