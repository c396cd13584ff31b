"""`meshctl extender` as processes on the real API server, and what goes wrong there: requests that make no sense,
objects that vanish, and replicas that are killed, ended or stopped while they bind.

After each of it no slot is given twice, recounted from the API server alone, and no reservation is left.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from meshctl.adapters.kubernetes.client import connect
from meshctl.api.allocation import ALLOCATION, Allocation, ContainerAllocation
from meshctl.extender.ports import PodId
from meshctl.ports import ObjectKey
from tests.cluster.binding import BINDING, LEASE, NO_ROOM, STATUS, Extender, Stand, key, told
from tests.cluster.cluster import Cluster
from tests.cluster.proxy import ApiProxy
from tests.harness.tools import completed, until

pytestmark = pytest.mark.cluster

WORKERS = 8
"""Bindings that the scheduler has under way at a time."""


@pytest.fixture
async def stand(cluster: Cluster) -> AsyncIterator[Stand]:
    async with connect(cluster.kubeconfig) as client:
        yield Stand(client, await cluster.namespace("faults"))


@dataclass
class Pair:
    """Two replicas, of which the first leads; the proxy is its way to the API server."""

    stand: Stand
    proxy: ApiProxy
    first: Extender
    second: Extender

    async def bind(self, pod: PodId) -> str:
        """As the scheduler does, which tries again, with whoever is there and ready: why the pod has no place; ""
        when it is bound."""
        said = "nobody was asked"

        async def certain() -> bool:
            nonlocal said
            for one in (self.first, self.second):
                try:
                    said = await one.bind(pod, self.stand.node)
                except aiohttp.ClientError as error:
                    said = str(error)
                else:
                    if not said or NO_ROOM in said:
                        return True
            return False

        await until(certain, f"{pod.name} is bound, or has no place: {said}")
        return said

    async def lease_ends(self) -> None:
        """That of a dead holder, sooner: whoever waits for it counts from the last change."""
        lease = ObjectKey("Lease", self.stand.namespace, "extender")
        await self.stand.client.merge_patch(lease, {"spec": {"leaseDurationSeconds": 1}})


@pytest.fixture
async def pair(cluster: Cluster, stand: Stand, tmp_path: Path) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        found: dict[Extender, ApiProxy] = {}
        for number in range(2):
            (directory := tmp_path / str(number)).mkdir()
            proxy = await stack.enter_async_context(ApiProxy(cluster.kubeconfig, directory))
            one = Extender(directory, proxy.kubeconfig, f"{stand.namespace}/extender", standby=True)
            stack.push_async_callback(one.end)
            found[one] = proxy
        await asyncio.gather(*(completed(one.start) for one in found))

        async def led() -> bool:
            return any([await one.leads() for one in found])

        await until(led, "one of them leads")
        first, second = sorted(found, key=lambda one: "binds from now on" not in one.log.read_text())
        yield Pair(stand, found[first], first, second)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_who_follows_gives_no_slot_twice(pair: Pair, number: signal.Signals) -> None:
    """60 pods for 30 slots, 8 at a time; after 10 of them the leader is killed, or asked to end, while 8 bindings
    hang. All slots are given, each once. Who was asked to ends what it began, and nobody waits for its Lease."""
    stand, proxy = await pair.stand.with_gpu(slots=30), pair.proxy
    pods = await stand.pods(60)
    assert not any([await pair.first.bind(pod, stand.node) for pod in pods[:10]])
    proxy.gates[BINDING] = asyncio.Event()
    turns = asyncio.Semaphore(WORKERS)

    async def scheduled(pod: PodId) -> str:
        async with turns:
            return await pair.bind(pod)

    races = [asyncio.create_task(scheduled(pod)) for pod in pods]
    await until(lambda: told(proxy.asked.count(BINDING) == 10 + WORKERS), "bindings hang")
    leader = pair.first.process
    assert leader is not None
    ending = asyncio.create_task(pair.first.end(number))
    if number == signal.SIGKILL:
        await ending
        await pair.lease_ends()
        await until(pair.second.leads, "the second leads")
    else:
        await until(lambda: _asks_for_more_in_vain(pair.first), "it takes no more bindings")
        assert not await pair.second.leads()
    proxy.gates.pop(BINDING).set()
    said = await asyncio.gather(*races)
    await ending

    assert await stand.booked() == {stand.gpu: 30}
    planned = await stand.planned()
    assert {pod.name for pod, words in zip(pods, said, strict=True) if not words} == set(planned)
    await pair.second.holds_nothing()
    killed = number == signal.SIGKILL
    assert (BINDING, 409) in proxy.answered or not killed
    assert leader.returncode == (-number if killed else 0)
    assert _taken_over(pair.second) == [{"released": not killed}]


async def _asks_for_more_in_vain(extender: Extender) -> bool:
    return not await extender.leads()


def _taken_over(extender: Extender) -> list[dict[str, Any]]:
    lines = [orjson.loads(line) for line in extender.log.read_text().splitlines()]
    return [{"released": line["released"]} for line in lines if line["event"] == "binds from now on"]


async def test_a_stopped_leader_binds_nothing_when_it_goes_on(pair: Pair) -> None:
    """Stopped with a binding on its way and another one asked for. Who follows, when the Lease has ended by itself,
    gives the slots to others. Then what is late comes through, and is refused; the rest is not even sent."""
    stand, proxy = await pair.stand.with_gpu(slots=2), pair.proxy
    late, asked, third, fourth = await stand.pods(4)
    held = {what: asyncio.Event() for what in (BINDING, STATUS, LEASE)}
    proxy.gates[BINDING] = held[BINDING]
    before = [asyncio.create_task(pair.first.bind(late, stand.node))]
    await until(lambda: told(BINDING in proxy.asked), "the binding is under way")
    pair.first.freeze()
    proxy.gates |= held
    before.append(asyncio.create_task(pair.first.bind(asked, stand.node)))
    await until(pair.second.leads, "the second leads")
    assert [await pair.second.bind(pod, stand.node) for pod in (third, fourth)] == ["", ""]
    for gate in held.values():
        gate.set()
    await until(lambda: told((BINDING, 409) in proxy.answered), "the late write is answered")
    pair.first.thaw()

    assert all(await asyncio.gather(*before))
    assert "replica of the extender" in await pair.first.bind(late, stand.node)
    assert not await pair.first.leads()
    assert await stand.planned() == {third.name: 1, fourth.name: 1}
    assert [(what, status) for what, status in proxy.answered if what == BINDING] == [(BINDING, 409)]
    for one in (pair.first, pair.second):
        await one.holds_nothing()


# ---------------------------------------------------------------------------------------------------------- one process


@pytest.fixture(scope="module")
def extender(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Extender]:
    extender = Extender(tmp_path_factory.mktemp("extender"), cluster.kubeconfig, "default/extender-faults").start()
    yield extender
    extender.stop()


async def test_what_comes_to_nothing_leaves_nothing(extender: Extender, stand: Stand) -> None:
    """Requests that make no sense; pods that are elsewhere, gone or another's; nodes that nobody knows, or that vanish
    between Filter and Bind. Each is told why, nothing is held afterwards, and the last slot is still to be had."""
    await stand.with_gpu(slots=1)
    pod, taken, gone = await stand.pods(3)
    raw = await stand.now(pod)
    assert await _filtered(extender, raw, stand.node)

    for verb in ("filter", "prioritize", "bind", "preempt"):
        for body in (b"", b"{", b'{"Pod": {"metadata": {}}, "NodeNames": ["n"]}', b"\xff" * 2**20):
            answer = await extender.post(verb, body)
            assert answer == [] or answer["Error"]
        await _cut_short(extender, verb)
    nobody = {"Pod": {**raw, "metadata": {**raw["metadata"], "uid": None}}, "NodeNames": [stand.node]}
    assert "uid" in (await extender.post("filter", nobody))["Error"]

    assert await extender.filter(raw, ["unknown", stand.node]) == stand.node
    assert await extender.filter(raw, ["unknown"]) == ""
    assert "unknown" in await extender.bind(pod, "unknown")
    version = (await stand.now(taken))["metadata"]["resourceVersion"]
    await stand.client.bind(key(taken), "elsewhere", uid=taken.uid, resource_version=version, annotations={})
    assert "elsewhere" in await extender.bind(taken, stand.node)
    await stand.client.delete(key(gone), uid=gone.uid)
    assert await extender.bind(gone, stand.node)
    assert await extender.bind(pod._replace(uid="another"), stand.node)

    node = await stand.client.get(ObjectKey("Node", "", stand.node))
    assert node is not None
    await stand.client.delete(ObjectKey("Node", "", stand.node))
    await until(lambda: _nowhere(extender, raw, stand.node), "the extender knows that the node is gone")
    assert stand.node in await extender.bind(pod, stand.node)
    assert "nodeName" not in (await stand.now(pod))["spec"]
    await extender.holds_nothing()

    await stand.make_node(stand.node)
    await until(lambda: _filtered(extender, raw, stand.node), "the node is back")
    assert await extender.bind(pod, stand.node) == ""
    assert (await stand.now(pod))["spec"]["nodeName"] == stand.node
    await extender.holds_nothing()


async def _filtered(extender: Extender, pod: dict[str, Any], node: str) -> bool:
    return await extender.filter(pod, [node]) == node


async def _nowhere(extender: Extender, pod: dict[str, Any], node: str) -> bool:
    return not await _filtered(extender, pod, node)


async def _cut_short(extender: Extender, verb: str) -> None:
    """A scheduler that dies while it sends."""
    _, writer = await asyncio.open_connection("127.0.0.1", extender.ports[0])
    writer.write(f"POST /{verb} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def test_a_forged_allocation_is_replaced_by_the_binding(extender: Extender, stand: Stand) -> None:
    """Where admission let it pass. The pod has what was chosen; nobody else has less for it."""
    await stand.with_gpu(slots=3)
    forged = Allocation(containers=(ContainerAllocation(name="main", gpus={"GPU-forged": 1, stand.gpu: 2}),))
    pod, other = await stand.pod("forged", annotations={ALLOCATION: forged.text()}), await stand.pod("other", 2)
    await until(lambda: _known(extender, stand), "the GPU is known")
    assert await extender.bind(pod, stand.node) == ""
    assert await extender.bind(other, stand.node) == ""
    assert await stand.recount() == {"forged": {stand.gpu: 1}, "other": {stand.gpu: 2}}
    await extender.holds_nothing()


async def _known(extender: Extender, stand: Stand) -> bool:
    return await _filtered(extender, await stand.now(PodId(stand.namespace, "other", "")), stand.node)
