"""Binding pods on the real API server: two replicas, a GPU, and everything that can come between a place and its write.

The ledger, the Lease, the fence and the reflectors are the real ones; a proxy holds requests and answers back. Nothing
runs on the node: there is only its object.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from meshctl.adapters.kubernetes.client import connect
from meshctl.adapters.kubernetes.lease import Lease, Terms
from meshctl.api.allocation import ALLOCATION, read_allocation
from meshctl.extender.binder import KubernetesBinder, Limits, Outcome
from meshctl.extender.ledger import Ledger
from meshctl.extender.main import Watched
from meshctl.extender.ports import BindError, PodId
from meshctl.ports import ObjectKey
from tests.cluster.binding import BINDING, LEASE, NO_ROOM, STATUS, Extender, Stand, key, told
from tests.cluster.cluster import Cluster
from tests.cluster.proxy import ApiProxy
from tests.harness.tools import DEADLINE_S, completed, page, until

pytestmark = pytest.mark.cluster

SHORT = Terms(duration_s=3, renew_s=2.2, retry_s=0.2, request_s=1.0)
"""For a Lease that is to be lost; where it is not, nothing depends on how slow the machine is."""


@dataclass
class Replica:
    """One process's parts."""

    ledger: Ledger
    lease: Lease
    binder: KubernetesBinder

    async def bind(self, pod: PodId, node: str) -> str:
        """As the scheduler does, which asks whoever is ready: why the pod is not bound; "" when it is."""
        while True:
            await self.ready()
            if "replica" not in (words := await said(self.binder, pod, node)):
                return words

    async def ready(self) -> None:
        await until(lambda: told(not self.binder.unready), "the replica binds")

    async def knows(self, *pods: PodId) -> None:
        await until(lambda: told(all(map(self.ledger.version, pods))), "the pods are known")

    async def settled(self) -> None:
        """Nothing is under way, and nothing is held that is not on a node."""
        await until(lambda: told(not self.binder.under_way and not self.ledger.reserved), "no reservation is left")


@asynccontextmanager
async def replica(
    kubeconfig: Path,
    stand: Stand,
    identity: str = "",
    limits: Limits | None = None,
    *,
    terms: Terms | None = None,
    lead: bool = True,
) -> AsyncIterator[Replica]:
    """Watches the stand and competes for its Lease; ends in good order."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(connect(kubeconfig))
        ledger = Ledger()

        watched = Watched(client, ledger)
        stack.push_async_callback(watched.stop)
        await watched.start(DEADLINE_S)
        lease = Lease(client, stand.namespace, "extender", identity=identity, terms=terms)
        binder = KubernetesBinder(client, ledger, lease, wrote=watched.pods.wrote, limits=limits)
        running = asyncio.create_task(binder.run())
        stack.callback(running.cancel)
        stack.push_async_callback(binder.stop)
        await lease.start()
        here = Replica(ledger, lease, binder)
        if lead:
            await here.ready()
        yield here


async def said(binder: KubernetesBinder, pod: PodId, node: str) -> str:
    """Why the pod is not bound; "" when it is."""
    try:
        await binder.bind(pod, node)
    except BindError as error:
        return str(error)
    return ""


@pytest.fixture
async def stand(cluster: Cluster) -> AsyncIterator[Stand]:
    async with connect(cluster.kubeconfig) as client:
        yield Stand(client, await cluster.namespace("bind"))


@pytest.fixture
async def proxy(cluster: Cluster, tmp_path: Path) -> AsyncIterator[ApiProxy]:
    async with ApiProxy(cluster.kubeconfig, tmp_path) as proxy:
        yield proxy


# ---------------------------------------------------------------------------------------------------------- one replica


async def test_node_and_gpus_come_in_one_write(cluster: Cluster, stand: Stand) -> None:
    """The pod has its node and its allocation; the place is held until it is seen there; once more is no error."""
    await stand.with_gpu(slots=10)
    pod = await stand.pod("p", slots=3)
    async with replica(cluster.kubeconfig, stand) as one:
        await one.binder.bind(pod, stand.node)
        raw = await stand.now(pod)
        assert raw["spec"]["nodeName"] == stand.node
        allocation = read_allocation(raw["metadata"]["annotations"])
        assert allocation is not None
        assert allocation.by_container() == {"main": {stand.gpu: 3}}
        assert one.ledger.fleet.free(stand.gpu) == 7
        await one.settled()
        assert one.ledger.fleet.free(stand.gpu) == 7
        await one.binder.bind(pod, stand.node)
        assert "is on node" in await said(one.binder, pod, "another")
        assert await stand.now(pod) == raw
        assert one.binder.counts[Outcome.CONFLICT] == 0
        assert not one.ledger.reserved


async def test_a_pod_that_was_changed_meanwhile_is_bound_all_the_same(stand: Stand, proxy: ApiProxy) -> None:
    """The conflict is met, the pod read, and placed as it is now."""
    await stand.with_gpu(slots=10)
    pod = await stand.pod("p")
    async with replica(proxy.kubeconfig, stand) as one:
        await one.knows(pod)
        proxy.deafen()
        await stand.client.merge_patch(key(pod), {"metadata": {"labels": {"a": "b"}}})
        await one.binder.bind(pod, stand.node)
        assert await stand.planned() == {"p": 1}
        assert one.binder.counts[Outcome.CONFLICT] == 1
        proxy.cut()
        await one.settled()


async def test_a_pod_that_is_not_to_be_had_leaves_no_reservation(stand: Stand, proxy: ApiProxy) -> None:
    """Bound by somebody else, deleted, being deleted, made anew with the same name: each has its words, and the
    place is free for the next one."""
    await stand.with_gpu(slots=1)
    taken, gone, going, anew = await stand.pods(4)
    await stand.client.merge_patch(key(going), {"metadata": {"finalizers": ["meshctl.io/test"]}})
    async with replica(proxy.kubeconfig, stand) as one:
        await one.knows(taken, gone, going, anew)
        proxy.deafen()
        version = (await stand.now(taken))["metadata"]["resourceVersion"]
        await stand.client.bind(key(taken), "elsewhere", uid=taken.uid, resource_version=version, annotations={})
        for pod in (gone, going, anew):
            raw = await stand.now(pod)
            await stand.client.delete(key(pod), uid=raw["metadata"]["uid"])
        second = await stand.pod(anew.name)
        assert "is on node elsewhere already" in await said(one.binder, taken, stand.node)
        assert "is gone" in await said(one.binder, gone, stand.node)
        assert "delet" in await said(one.binder, going, stand.node)
        assert await said(one.binder, anew, stand.node)
        assert not one.ledger.reserved
        assert one.ledger.fleet.free(stand.gpu) == 1
        await one.binder.bind(second, stand.node)
        assert (await stand.now(second))["spec"]["nodeName"] == stand.node
        proxy.cut()
        await one.settled()
        assert one.ledger.fleet.free(stand.gpu) == 0


async def test_a_pod_that_the_scheduler_saw_first_is_read(stand: Stand, proxy: ApiProxy) -> None:
    """A watch that is behind keeps no pod waiting."""
    await stand.with_gpu(slots=10)
    async with replica(proxy.kubeconfig, stand) as one:
        proxy.deafen()
        pod = await stand.pod("p")
        await one.binder.bind(pod, stand.node)
        assert await stand.planned() == {"p": 1}


async def test_what_the_api_server_will_not_take_leaves_no_reservation(stand: Stand, proxy: ApiProxy) -> None:
    """A refusal is certain: its words are the scheduler's, and nothing is looked for."""
    await stand.with_gpu(slots=1)
    pod = await stand.pod("p")
    async with replica(proxy.kubeconfig, stand) as one:
        proxy.answer(BINDING, 403, body={"kind": "Status", "reason": "Forbidden", "message": "no rights today"})
        assert "no rights today" in await said(one.binder, pod, stand.node)
        assert not one.ledger.reserved
        assert one.binder.counts[Outcome.LOST] == 0
        await one.binder.bind(pod, stand.node)


async def test_a_binding_without_an_answer_is_found_out(stand: Stand, proxy: ApiProxy) -> None:
    """It was done: that is a success. It was not: it never will be, though the request comes through much later."""
    await stand.with_gpu(slots=1)
    limits = Limits(bind_s=30.0, write_s=0.2, again_s=0.05)
    done, late = await stand.pods(2)
    async with replica(proxy.kubeconfig, stand, limits=limits) as one:
        proxy.gates[BINDING] = asyncio.Event()
        assert "not done" in await said(one.binder, late, stand.node)
        await one.settled()
        assert one.ledger.fleet.free(stand.gpu) == 1
        lost = one.binder.counts[Outcome.LOST]
        assert lost > 1
        proxy.gates.pop(BINDING).set()
        await until(lambda: told(proxy.answered.count((BINDING, 409)) == lost), "the late writes are answered")
        proxy.answer_gates[BINDING] = asyncio.Event()
        await one.binder.bind(done, stand.node)
        proxy.answer_gates.pop(BINDING).set()
        assert await stand.planned() == {done.name: 1}
        await one.settled()


async def test_a_place_is_kept_until_it_is_certain_what_became_of_it(stand: Stand, proxy: ApiProxy) -> None:
    """The API server answers nothing between the reservation and the write: nobody else gets the place, for however
    long; when it answers again, the place is given back, or the pod is on its node."""
    await stand.with_gpu(slots=1)
    limits = Limits(bind_s=0.5, write_s=0.2, again_s=0.05)
    pod, other = await stand.pods(2)
    async with replica(proxy.kubeconfig, stand, limits=limits) as one:
        frozen = {what: asyncio.Event() for what in (BINDING, STATUS)}
        proxy.gates |= frozen
        assert "its place is kept until that is certain" in await said(one.binder, pod, stand.node)
        assert "an earlier binding is under way" in await said(one.binder, pod, stand.node)
        assert NO_ROOM in await said(one.binder, other, stand.node)
        assert set(one.ledger.reserved) == {pod.uid}
        for what in frozen:
            proxy.gates.pop(what).set()
        await one.settled()
        bound = await stand.planned()
        assert one.ledger.fleet.free(stand.gpu) == 1 - len(bound)


async def test_while_many_bindings_are_being_written_the_next_pod_waits(stand: Stand, proxy: ApiProxy) -> None:
    """Until one of them is done: a scheduler that looks for places faster than bindings are written would have hundreds
    under way, and their deadlines would pass. It waits no longer than is told."""
    await stand.with_gpu(slots=2)
    limits = Limits(bind_s=DEADLINE_S, write_s=DEADLINE_S, writes=2, pace_s=DEADLINE_S)
    pods = await stand.pods(2)
    async with replica(proxy.kubeconfig, stand, limits=limits) as one:
        await one.knows(*pods)
        proxy.gates[BINDING] = asyncio.Event()
        await one.binder.pace()
        bindings = [asyncio.create_task(one.binder.bind(pod, stand.node)) for pod in pods]
        await until(lambda: told(len(one.ledger.reserved) == 2), "both have a place")
        paced = asyncio.create_task(one.binder.pace())
        assert proxy.answered.count((BINDING, 201)) == 0
        assert not paced.done()
        proxy.gates.pop(BINDING).set()
        await asyncio.gather(paced, *bindings)
        await one.settled()


async def test_pods_of_two_tenants_come_before_the_kubelet_one_after_the_other(cluster: Cluster, stand: Stand) -> None:
    """An Allocate does not say whose it is. The scheduler is told whom the pod waits for; nothing is reserved."""
    await stand.with_gpu(slots=2, isolation="Tenant")
    first = await stand.pod("p")
    second = await stand.pod("p", namespace=await cluster.namespace("bind"))
    async with replica(cluster.kubeconfig, stand, limits=Limits(tenants_s=0.2)) as one:
        await one.binder.bind(first, stand.node)
        assert f"waits for pod {first.namespace}/p" in await said(one.binder, second, stand.node)
        await one.settled()
        assert one.ledger.fleet.free(stand.gpu) == 1
        await stand.client.merge_patch(key(first), {"status": {"phase": "Succeeded"}}, subresource="status")
        await until(lambda: told(one.ledger.fleet.free(stand.gpu) == 2), "the first has ended")
        await one.binder.bind(second, stand.node)
        assert (await stand.now(second))["spec"]["nodeName"] == stand.node


async def test_a_pod_that_goes_while_its_binding_hangs_is_no_longer_waited_for(stand: Stand, proxy: ApiProxy) -> None:
    """Deleted, or deleted and made anew with the same name: its place is free when that is certain."""
    await stand.with_gpu(slots=2)
    gone, anew = await stand.pods(2)
    limits = Limits(bind_s=30.0, write_s=0.5, again_s=0.05)
    async with replica(proxy.kubeconfig, stand, limits=limits) as one:
        await one.knows(gone, anew)
        proxy.deafen()
        proxy.gates[BINDING] = asyncio.Event()
        bindings = [asyncio.create_task(said(one.binder, pod, stand.node)) for pod in (gone, anew)]
        await until(lambda: told(proxy.asked.count(BINDING) >= 2), "both are under way")
        for pod in (gone, anew):
            await stand.client.delete(key(pod), uid=pod.uid)
        second = await stand.pod(anew.name)
        for binding in bindings:
            assert "is gone" in await binding
        assert one.ledger.fleet.free(stand.gpu) == 2
        proxy.gates.pop(BINDING).set()
        await one.binder.bind(second, stand.node)
        assert await stand.planned() == {second.name: 1}


# --------------------------------------------------------------------------------------------------------- two replicas


async def test_200_racing_binds_through_two_replicas_book_no_slot_twice(
    cluster: Cluster, stand: Stand, proxy: ApiProxy
) -> None:
    """100 pods for 50 slots, each through both replicas. The first sends 50 bindings that hang, loses the Lease, and
    its bindings come through while the second takes over and binds. Every slot is given once, and none is lost."""
    await stand.with_gpu(slots=50)
    pods = await stand.pods(100)
    async with (
        replica(proxy.kubeconfig, stand, "first", Limits(write_s=30.0), terms=SHORT) as first,
        replica(cluster.kubeconfig, stand, "second", lead=False) as second,
    ):
        held = {what: asyncio.Event() for what in (BINDING, LEASE)}
        proxy.gates[BINDING] = held[BINDING]
        races = [asyncio.create_task(said(first.binder, pod, stand.node)) for pod in pods]
        await until(lambda: told(proxy.asked.count(BINDING) == 50), "50 bindings are under way")
        proxy.gates[LEASE] = held[LEASE]
        races += [asyncio.create_task(second.bind(pod, stand.node)) for pod in pods]
        async with asyncio.timeout(DEADLINE_S):
            while not second.lease.leading:  # noqa: ASYNC110  # the binder consumes its changes
                await asyncio.sleep(0.001)
        held[BINDING].set()
        await asyncio.gather(*races)
        assert 25 <= len(await stand.planned()) <= 50
        for pod in pods:
            await second.bind(pod, stand.node)
        planned = await stand.planned()
        assert len(planned) == sum(planned.values()) == 50
        for one in (first, second):
            await one.settled()
            assert one.ledger.fleet.free(stand.gpu) == 0
        held[LEASE].set()


async def test_a_late_write_of_a_stopped_leader_fails(cluster: Cluster, stand: Stand, proxy: ApiProxy) -> None:
    """It sent a binding and was stopped. Who follows gives the last slot to another pod; then the binding comes
    through, and the API server refuses it."""
    await stand.with_gpu(slots=1)
    late, other = await stand.pods(2)
    async with (
        replica(proxy.kubeconfig, stand, "first", Limits(write_s=30.0), terms=SHORT) as first,
        replica(cluster.kubeconfig, stand, "second", lead=False) as second,
    ):
        held = {what: asyncio.Event() for what in (BINDING, STATUS, "GET pods", LEASE)}
        proxy.gates[BINDING] = held[BINDING]
        before = asyncio.create_task(said(first.binder, late, stand.node))
        await until(lambda: told(BINDING in proxy.asked), "the binding is under way")
        proxy.gates |= held
        assert "replica of the extender" in await said(second.binder, other, stand.node)
        assert await second.bind(other, stand.node) == ""
        assert await stand.fenced(late)
        for gate in held.values():
            gate.set()
        await before
        await first.settled()
        assert await stand.planned() == {other.name: 1}
        assert (BINDING, 409) in proxy.answered


async def test_a_stop_in_good_order_hands_over_at_once(cluster: Cluster, stand: Stand, tmp_path: Path) -> None:
    """What is under way is finished first. Who follows writes to no pod, but knows what was bound, even if his watch
    has not told him."""
    await stand.with_gpu(slots=1)
    (tmp_path / "second").mkdir()
    async with (
        ApiProxy(cluster.kubeconfig, tmp_path) as proxy,
        ApiProxy(cluster.kubeconfig, tmp_path / "second") as seconds,
        replica(proxy.kubeconfig, stand, "first") as first,
        replica(seconds.kubeconfig, stand, "second", lead=False) as second,
    ):
        await until(lambda: told(seconds.watched("WATCH pods")), "the second watches")
        seconds.deafen()
        pod, waiting = await stand.pods(2)
        version = (await stand.now(waiting))["metadata"]["resourceVersion"]
        proxy.gates[BINDING] = asyncio.Event()
        binding = asyncio.create_task(said(first.binder, pod, stand.node))
        await until(lambda: told(BINDING in proxy.asked), "the binding is under way")
        stopping = asyncio.create_task(first.binder.stop())
        await asyncio.sleep(0)
        assert "about to end" in await said(first.binder, waiting, stand.node)
        assert not second.lease.leading
        proxy.gates.pop(BINDING).set()
        await stopping
        assert await binding == ""
        await second.ready()
        assert second.lease.released
        assert not await stand.fenced(waiting)
        assert (await stand.now(waiting))["metadata"]["resourceVersion"] == version
        assert NO_ROOM in await second.bind(waiting, stand.node)


async def test_who_leads_no_more_writes_nothing(stand: Stand, proxy: ApiProxy) -> None:
    """The Lease ended between the scheduler's request and the write."""
    await stand.with_gpu(slots=1)
    async with replica(proxy.kubeconfig, stand, limits=Limits(bind_s=30.0, write_s=30.0), terms=SHORT) as one:
        proxy.deafen()
        pod = await stand.pod("p")
        proxy.gates["GET pods"] = asyncio.Event()
        binding = asyncio.create_task(said(one.binder, pod, stand.node))
        await until(lambda: told("GET pods" in proxy.asked), "the pod is looked for")
        proxy.gates[LEASE] = asyncio.Event()
        await until(lambda: told(not one.lease.leading), "the Lease has ended")
        proxy.gates.pop("GET pods").set()
        assert "leads" in await binding
        assert BINDING not in proxy.asked
        assert not one.ledger.reserved
        proxy.gates.pop(LEASE).set()


async def test_nothing_is_bound_until_the_take_over_is_complete(stand: Stand, proxy: ApiProxy) -> None:
    """It is tried again until it is; what is missing for it is said in words."""
    await stand.with_gpu(slots=1)
    pod = await stand.pod("p")
    proxy.answer(STATUS, 403, body={"kind": "Status", "reason": "Forbidden", "message": "no"})
    async with replica(proxy.kubeconfig, stand, lead=False) as one:
        await until(lambda: told("(grant patch on pods/status)" in one.binder.unready), "the words are there")
        assert "takes over" in await said(one.binder, pod, stand.node)
        assert BINDING not in proxy.asked
        await one.ready()
        assert await stand.fenced(pod)
        await one.binder.bind(pod, stand.node)


async def test_who_can_not_finish_lets_the_lease_expire(cluster: Cluster, stand: Stand, proxy: ApiProxy) -> None:
    """So that who follows makes void what may still come."""
    await stand.with_gpu(slots=1)
    pod = await stand.pod("p")
    async with (
        replica(proxy.kubeconfig, stand, "first", Limits(write_s=30.0, stop_s=0.1), terms=SHORT) as first,
        replica(cluster.kubeconfig, stand, "second", lead=False) as second,
    ):
        proxy.gates[BINDING] = asyncio.Event()
        binding = asyncio.create_task(said(first.binder, pod, stand.node))
        await until(lambda: told(BINDING in proxy.asked), "the binding is under way")
        await first.binder.stop()
        assert "not known in time" in await binding
        await second.ready()
        assert not second.lease.released
        assert await stand.fenced(pod)
        proxy.gates.pop(BINDING).set()
        assert await second.bind(pod, stand.node) == ""
        assert await stand.planned() == {pod.name: 1}
        assert ALLOCATION in (await stand.now(pod))["metadata"]["annotations"]


# ------------------------------------------------------------------------------------------------------------ processes


async def test_a_kill_between_reservation_and_write_leaves_nothing(stand: Stand, proxy: ApiProxy) -> None:
    """The next process gives the place to another pod; the write of the killed one, late, is refused."""
    await stand.with_gpu(slots=1)
    killed, other = await stand.pods(2)
    lease = ObjectKey("Lease", stand.namespace, "extender")
    async with Extender(proxy.kubeconfig.parent, proxy.kubeconfig, f"{lease.namespace}/{lease.name}") as extender:
        proxy.gates[BINDING] = asyncio.Event()
        binding = asyncio.create_task(extender.bind(killed, stand.node))
        await until(lambda: told(BINDING in proxy.asked), "the binding is under way")
        await extender.end(signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await binding
        late = proxy.gates.pop(BINDING)
        await stand.client.delete(lease)  # or wait until it expires
        await completed(extender.start)
        assert await extender.bind(other, stand.node) == ""
        late.set()
        await until(lambda: told((BINDING, 409) in proxy.answered), "the late write is answered")
        assert NO_ROOM in await extender.bind(killed, stand.node)
        await extender.holds_nothing()
        metrics = str(await completed(page, f"{extender.url}/metrics"))
        assert 'meshctl_extender_bindings_total{outcome="bound"} 1.0' in metrics
    assert await stand.planned() == {other.name: 1}
