"""An hour of a cluster's life in less than a minute, at random, and on a wall clock that jumps: no slot is given twice,
and what the extender knows is what the API server has."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from random import Random

import aiohttp
import orjson
import pytest

from meshctl.adapters.kubernetes.client import connect
from meshctl.adapters.kubernetes.faults import AbsentError
from meshctl.adapters.kubernetes.kinds import Raw
from meshctl.api.allocation import ALLOCATION
from meshctl.errors import RefusedError
from meshctl.extender.ports import PodId
from meshctl.ports import ObjectKey
from meshctl.sharing import RESOURCE
from tests.cluster.binding import BINDING, Extender, Stand, key, told
from tests.cluster.cluster import Cluster
from tests.cluster.proxy import ApiProxy
from tests.harness.jumping_clock import jumping_clock
from tests.harness.tools import completed, until

pytestmark = pytest.mark.cluster

SLOTS = 6
SEED = os.environ.get("MESHCTL_HOUR")
"""To see again what a failed run saw."""
UNHEALTHY = {"type": "Healthy", "status": "False", "reason": "XID79", "message": "it fell off the bus"}
UNHEALTHY["lastTransitionTime"] = "2026-05-04T10:00:00Z"
FORGED = {ALLOCATION: '{"version": 1, "containers": [{"name": "main", "gpus": {"GPU-forged": 1}}]}'}


class Hour:
    """What may happen to three nodes, one of them with two GPUs, and what must hold then."""

    def __init__(self, stand: Stand, proxy: ApiProxy, extender: Extender, seed: int) -> None:
        self.stand, self.proxy, self.extender = stand, proxy, extender
        self.dice = Random(seed)  # noqa: S311 (nothing here is a secret)
        self.said = [f"seed {seed}"]
        """What happened so far."""
        here = stand.namespace
        self.gpus = {f"GPU-{here}-{number}": f"{node}-{here}" for number, node in enumerate("aabc")}
        """UUID -> node."""
        self.slots = dict.fromkeys(self.gpus, SLOTS)
        """What the agents say that a GPU has; 0 of one that is unhealthy."""
        self.nodes = sorted(set(self.gpus.values()))
        self.gone = ""
        """A node."""
        self.pods: list[PodId] = []
        """Who was made, and not deleted for good."""
        self.bound = 0
        self.differs = ""
        """What the extender does not know yet."""
        self._names = 0

    async def begin(self) -> None:
        for node in self.nodes:
            await self.stand.make_node(node)
        for uuid, node in self.gpus.items():
            await self.stand.make_gpu(node, uuid)
            await self.stand.say_gpu(node, uuid, SLOTS)
        await self.all_seen()

    async def pass_by(self) -> None:
        """Pods come, then all of it in some order; after each event the scheduler has its turn, and nothing may have
        been given twice."""
        events = [*6 * [self.pods_come], *5 * [self.pod_goes], *2 * [self.pod_ends], *4 * [self.gpu], *2 * [self.node]]
        events += [self.api_away, self.crash]
        self.dice.shuffle(events)
        events.insert(0, self.pods_come)
        for event in events:
            before = await self.stand.booked()
            await event()
            await self.schedule()
            for uuid, slots in (await self.stand.booked()).items():
                assert slots <= max(self.slots[uuid], before.get(uuid, 0)), f"{uuid} was given twice: {self.said}"

    async def schedule(self) -> None:
        """A turn of a scheduler that binds many at a time, and gives up for now where something is amiss."""
        raws = (await self.stand.client.list("Pod", self.stand.namespace)).items
        waiting = [raw for raw in raws if "nodeName" not in raw["spec"] and raw["status"]["phase"] == "Pending"]

        async def one(raw: Raw) -> None:
            metadata = raw["metadata"]
            with contextlib.suppress(aiohttp.ClientError, RefusedError):
                if node := await self.extender.filter(raw, self.nodes):
                    pod = PodId(metadata["namespace"], metadata["name"], metadata["uid"])
                    self.bound += not await self.extender.bind(pod, node)

        await asyncio.gather(*map(one, waiting))

    async def admitted(self) -> None:
        """The kubelets have started what is on their nodes."""
        for raw in (await self.stand.client.list("Pod", self.stand.namespace)).items:
            if "nodeName" in raw["spec"] and "startTime" not in raw["status"] and raw["status"]["phase"] == "Pending":
                started = {"status": {"phase": "Running", "startTime": "2026-05-04T10:00:00Z"}}
                name = raw["metadata"]["name"]
                pod = ObjectKey("Pod", self.stand.namespace, name)
                await self.stand.client.merge_patch(pod, started, subresource="status")

    async def all_seen(self) -> None:
        """Returns when the extender knows of each node how many slots of one GPU are free there, as the API server
        has it. A share of so many fits, one larger does not."""

        async def same() -> bool:
            booked = await self.stand.booked()
            for node in self.nodes:
                free = [self.slots[uuid] - booked.get(uuid, 0) for uuid, where in self.gpus.items() if where == node]
                most = 0 if node == self.gone else max(0, *free)
                fits = [await self.extender.filter(share(slots), [node]) == node for slots in (most, most + 1) if slots]
                if fits != [True, False][not most :]:
                    self.differs = f"{node} should have {most} free of {booked}, {self.slots}"
                    return False
            return True

        try:
            await until(same, "the extender knows what the API server has")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.differs}; {self.said}; log: {self.extender.log}") from error

    # --------------------------------------------------------------------------------------------------- what happens

    async def pods_come(self) -> None:
        for _ in range(self.dice.randrange(2, 6)):
            self._names += 1
            slots, forged = self.dice.choice((1, 1, 2, 3, 5)), self.dice.choice(({}, FORGED))
            self.said.append(f"p{self._names} asks for {slots}")
            self.pods.append(await self.stand.pod(f"p{self._names}", slots, annotations=forged))

    async def pod_goes(self) -> None:
        """One that is on a node stays until its kubelet says that it has ended, which may take longer than the hour."""
        if self.pods:
            pod = self.pods.pop(self.dice.randrange(len(self.pods)))
            self.said.append(f"{pod.name} is deleted")
            await self.stand.client.delete(key(pod), uid=pod.uid)
            if self.dice.random() < 0.6:
                await self._end(pod)
                await self.stand.client.delete(key(pod), uid=pod.uid)

    async def pod_ends(self) -> None:
        if self.pods:
            await self._end(self.dice.choice(self.pods))

    async def _end(self, pod: PodId) -> None:
        self.said.append(f"{pod.name} ends")
        with contextlib.suppress(AbsentError):
            await self.stand.client.merge_patch(key(pod), {"status": {"phase": "Succeeded"}}, subresource="status")

    async def gpu(self) -> None:
        """Unhealthy, or shared otherwise: with more or fewer slots."""
        await self.extender.holds_nothing()
        await self.admitted()  # else the kubelet would refuse those that are larger than a whole GPU then
        uuid = self.dice.choice(sorted(self.gpus))
        slots = self.dice.choice((0, 0, 3, SLOTS, SLOTS))
        self.said.append(f"{uuid} has {slots} slots")
        self.slots[uuid] = slots
        status = {"conditions": [UNHEALTHY]} if not slots else {}
        await self.stand.say_gpu(self.gpus[uuid], uuid, slots or SLOTS, **status)
        await self.all_seen()

    async def node(self) -> None:
        """It vanishes, its pods and GPUs don't; or it is back."""
        if self.gone:
            self.said.append(f"{self.gone} is back")
            await self.stand.make_node(self.gone)
            self.gone = ""
        else:
            self.gone = self.dice.choice(self.nodes)
            self.said.append(f"{self.gone} vanishes")
            await self.stand.client.delete(ObjectKey("Node", "", self.gone))
        await self.all_seen()

    async def api_away(self) -> None:
        """Its connections are cut while pods are bound, and refused for a moment."""
        self.said.append("the API server is away")
        asked = self.proxy.asked.count(BINDING)
        turn = asyncio.create_task(self.schedule())
        await until(lambda: told(turn.done() or self.proxy.asked.count(BINDING) > asked), "bindings are under way")
        await self.proxy.down()
        await asyncio.wait({turn}, timeout=0.2)
        await self.proxy.up()
        await turn

    async def crash(self) -> None:
        """While bindings hang, which come through when the next process binds."""
        self.said.append("the extender is killed")
        gate = self.proxy.gates[BINDING] = asyncio.Event()
        asked = self.proxy.asked.count(BINDING)
        turn = asyncio.create_task(self.schedule())
        await until(lambda: told(turn.done() or self.proxy.asked.count(BINDING) > asked), "bindings are under way")
        await self.restart()
        await turn
        del self.proxy.gates[BINDING]
        gate.set()

    async def restart(self) -> None:
        await self.extender.end(signal.SIGKILL)
        await self.stand.client.delete(ObjectKey("Lease", self.stand.namespace, "extender"))  # or it is waited for
        await completed(self.extender.start)


def share(slots: int) -> Raw:
    """Of a pod that nobody has made."""
    main = {"name": "main", "resources": {"limits": {RESOURCE: str(slots)}}}
    metadata = {"namespace": "default", "name": "share", "uid": "share"}
    return {"metadata": metadata, "spec": {"containers": [main]}, "status": {}}


@pytest.fixture
async def hour(cluster: Cluster, tmp_path: Path) -> AsyncIterator[Hour]:
    seed = int(SEED) if SEED else Random().randrange(10**6)  # noqa: S311 (nothing here is a secret)
    namespace = await cluster.namespace("hour")
    async with connect(cluster.kubeconfig) as client, ApiProxy(cluster.kubeconfig, tmp_path) as proxy:
        clock = jumping_clock(tmp_path)
        async with Extender(tmp_path, proxy.kubeconfig, f"{namespace}/extender", environment=clock) as extender:
            yield Hour(Stand(client, namespace), proxy, extender, seed)


async def test_after_a_random_hour_nothing_was_given_twice_and_nothing_is_lost(hour: Hour) -> None:
    """Pods come, go and end; GPUs fail, recover and are shared otherwise; nodes vanish; the API server is away, the
    extender is killed amid bindings. A process that starts then knows the same; no reservation is left."""
    await hour.begin()
    await hour.pass_by()
    await hour.extender.holds_nothing()
    await hour.all_seen()
    await hour.restart()
    await hour.all_seen()
    assert hour.bound
    stamps = [
        datetime.fromisoformat(orjson.loads(line)["timestamp"]) for line in hour.extender.log.read_text().splitlines()
    ]
    assert max(stamps) - min(stamps) > timedelta(hours=20), "its clock did not jump"
