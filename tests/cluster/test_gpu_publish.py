"""The agent's side of a real API server: the GPU objects that it writes, and what it learns there."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from deviceplugin.ledger import Ledger
from deviceplugin.objects import Seen, gpu_object
from deviceplugin.policies import Wanted
from deviceplugin.publish import GpuPublisher
from deviceplugin.watch import ClusterView, PolicyFile
from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.adapters.kubernetes.reflector import Pace
from meshctl.api.gpu import GPU
from meshctl.errors import UnavailableError
from meshctl.model import Problem
from meshctl.sharing import Gpu, Health, MpsPhase, MpsStatus, Owner, Sharing, Slot
from tests.cluster.cluster import Cluster
from tests.cluster.proxy import ApiProxy
from tests.harness.tools import DEADLINE_S, until

pytestmark = pytest.mark.cluster

QUICK = Pace(first_pause_s=0.02, longest_pause_s=0.2, refused_s=0.1)
FOUR = Sharing("four", 1, replicas=4)
RESOURCE = "example.com/vgpus"


class Node:
    """A Node object of a test's own, and its GPUs."""

    def __init__(self, name: str, uid: str) -> None:
        self.name, self.uid = name, uid
        self.uuids = tuple(f"GPU-{name}-{number}" for number in range(2))

    def seen(self, number: int = 0, **known: Any) -> Seen:
        card = Gpu(self.uuids[number], "Tesla V100-SXM2-16GB", 16 << 30, (7, 0))
        mps = MpsStatus(MpsPhase.RUNNING, 7, clients=0)
        usual: dict[str, Any] = {
            "driver": "580.1",
            "sharing": FOUR,
            "wanted": Wanted(FOUR, "four", 1),
            "mps": mps,
            "over": "",
        }
        return Seen(**{"gpu": card, **usual, **known})

    def value(self, seen: Seen, ledger: Ledger | None = None) -> dict[str, Any]:
        return gpu_object(self.name, self.uid, seen, ledger or Ledger())

    def held(self, number: int, *slots: int) -> Ledger:
        return Ledger({Slot(self.uuids[number], slot): Owner("team-a", "pod-1", "main") for slot in slots})


@pytest.fixture
async def node(cluster: Cluster) -> AsyncIterator[Node]:
    name = f"gpu-{secrets.token_hex(4)}"
    labels = {"pool": name}
    await cluster.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}})
    yield Node(name, (await cluster.get("node", name))["metadata"]["uid"])
    await cluster.kubectl("delete", "node", name)  # its GPU objects go with it


@pytest.fixture
async def proxy(cluster: Cluster, tmp_path: Path) -> AsyncIterator[ApiProxy]:
    async with ApiProxy(cluster.kubeconfig, tmp_path) as proxy:
        yield proxy


class Wall:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


@asynccontextmanager
async def publisher(
    kubeconfig: Path, node: Node, wall: Wall | None = None, clock: Wall | None = None
) -> AsyncIterator[GpuPublisher]:
    now_s = time.monotonic if clock is None else lambda: clock().timestamp()
    async with connect(kubeconfig) as client:
        found = GpuPublisher(client, node.name, wall=wall or Wall(), now_s=now_s, pace=QUICK)
        await found.start()
        try:
            yield found
        finally:
            await found.stop()


def by_uuid(*values: dict[str, Any]) -> dict[str, Any]:
    return {value["spec"]["uuid"]: value for value in values}


async def gpus(cluster: Cluster, node: Node) -> dict[str, Any]:
    """As they are on the API server, by UUID."""
    items = (await cluster.get("gpus", f"--selector=meshctl.io/node={node.name}"))["items"]
    return {item["spec"]["uuid"]: item for item in items}


async def shown(cluster: Cluster, node: Node, holds: Callable[[Mapping[str, Any]], bool], what: str) -> dict[str, Any]:
    """The node's GPU objects, as soon as it `holds` of them."""
    found: dict[str, Any] = {}

    async def check() -> bool:
        found.clear()
        found.update(await gpus(cluster, node))
        return holds(found)

    await until(check, what)
    return found


async def problems(writer: GpuPublisher, count: int) -> tuple[Problem, ...]:
    """Its problems, as soon as there are so many."""

    async def check() -> bool:
        return len(writer.problems()) == count

    await until(check, f"{count} problems")
    return writer.problems()


async def events(cluster: Cluster, name: str) -> list[tuple[str, str]]:
    items = (await cluster.get("events.v1.events.k8s.io", "--namespace=default"))["items"]
    return [(item["type"], item["reason"]) for item in items if item["regarding"]["name"] == name]


async def test_gpu_objects_follow_what_the_agent_says(cluster: Cluster, node: Node) -> None:
    """They appear as kubectl shows them, change, and go with the card; what says the same is not written again, over a
    restart either."""
    both = by_uuid(node.value(node.seen(0), node.held(0, 1, 2, 3)), node.value(node.seen(1)))
    first, second = node.uuids
    wall = Wall()
    async with publisher(cluster.kubeconfig, node, wall) as writer:
        writer.update(both)
        found = await shown(
            cluster, node, lambda all_: len(all_) == 2 and "status" in all_[second], "both GPUs are there"
        )
        for value in found.values():
            GPU.model_validate(value)
            assert value["metadata"]["ownerReferences"][0]["uid"] == node.uid
        assert found[first]["status"]["holders"] == both[first]["status"]["holders"]
        listed = await cluster.kubectl("get", "gpus", f"--selector=meshctl.io/node={node.name}")
        row = next(line for line in listed.splitlines() if line.startswith(first.lower()))
        for column in (node.name, "MPS", "3/4", "True"):
            assert column in row, listed

        ill = node.value(node.seen(1, health=Health(False, "Xid", "XID 79")))
        writer.update({**both, second: ill})
        changed = await shown(cluster, node, lambda all_: "XID 79" in str(all_[second]), "the XID is told")
        assert changed[first] == found[first]
        writer.update(both)
        well = await shown(cluster, node, lambda all_: "XID 79" not in str(all_[second]), "it is well again")

        async def told() -> bool:
            return {("Warning", "GpuUnhealthy"), ("Normal", "GpuHealthy")} <= set(await events(cluster, second.lower()))

        await until(told, "both transitions are Events")
        assert writer.problems() == ()
    assert set(await events(cluster, first.lower())) == {("Normal", "PolicyInForce")}

    async with publisher(cluster.kubeconfig, node, wall) as writer:
        writer.update({first: both[first]}, complete=False)
        writer.update({**both, second: node.value(node.seen(1), node.held(1, 0))})
        after = await shown(cluster, node, lambda all_: all_[second] != well[second], "the next run follows")
        assert after[first] == well[first]
        writer.update({second: both[second]})
        await shown(cluster, node, lambda all_: set(all_) == {second}, "the object of a card that is gone is deleted")


async def test_what_nobody_acts_on_is_written_seldom(cluster: Cluster, node: Node) -> None:
    """A heartbeat once a minute, the number of MPS clients every 10 s; and nothing else of the object changes then."""
    wall, clock = Wall(), Wall()
    first, second = node.uuids
    mps = MpsStatus(MpsPhase.RUNNING, 7, clients=5)
    busier = node.value(node.seen(0, mps=mps))

    def both(value: dict[str, Any], slots: int) -> dict[str, Any]:
        return by_uuid(value, node.value(node.seen(1), node.held(1, *range(slots))))

    async def written(slots: int) -> Any:
        """The first GPU, when the second, which comes after it, is written."""
        found = await shown(
            cluster,
            node,
            lambda all_: all_.get(second, {}).get("status", {}).get("summary") == f"{slots}/4",
            f"{slots} slots are held",
        )
        return found[first]

    async with publisher(cluster.kubeconfig, node, wall, clock) as writer:
        writer.update(both(node.value(node.seen(0)), 0))
        before = await written(0)
        writer.update(both(busier, 1))
        assert await written(1) == before
        clock.now += timedelta(seconds=11)
        writer.update(both(busier, 2))
        after = await written(2)
        assert after["status"]["mps"]["clients"] == 5
        assert {**after["status"], "mps": {}} == {**before["status"], "mps": {}}
        wall.now += timedelta(seconds=61)
        writer.update(both(busier, 3))
        later = await written(3)
        assert later["status"]["heartbeat"] != after["status"]["heartbeat"]
        assert {**later["status"], "heartbeat": ""} == {**after["status"], "heartbeat": ""}


async def test_what_is_deleted_or_edited_comes_back(cluster: Cluster, node: Node) -> None:
    """The agent alone says what a GPU is like; what others add to the metadata stays."""
    first = node.uuids[0]
    async with publisher(cluster.kubeconfig, node) as writer:
        writer.update(by_uuid(node.value(node.seen(0))))
        before = (await shown(cluster, node, lambda all_: "status" in all_.get(first, ()), "the GPU is there"))[first]
        await cluster.kubectl("delete", "gpu", first.lower())
        again = await shown(
            cluster,
            node,
            lambda all_: (
                "status" in all_.get(first, ()) and all_[first]["metadata"]["uid"] != before["metadata"]["uid"]
            ),
            "the GPU is there again",
        )
        assert {**again[first]["status"], "heartbeat": ""} == {**before["status"], "heartbeat": ""}
        patch = '{"status": {"summary": "0/0"}, "metadata": {"labels": {"team": "a"}}}'
        await cluster.kubectl("label", "gpu", first.lower(), "team=a")
        await cluster.kubectl("patch", "gpu", first.lower(), "--subresource=status", "--type=merge", f"--patch={patch}")
        mended = await shown(cluster, node, lambda all_: all_[first]["status"]["summary"] == "0/4", "it is mended")
        assert mended[first]["metadata"]["labels"]["team"] == "a"


async def test_the_newest_word_wins_when_the_api_server_is_back(cluster: Cluster, node: Node, proxy: ApiProxy) -> None:
    """What was said while it was away is not written one by one; until then there is a problem with words."""
    first = node.uuids[0]
    async with publisher(proxy.kubeconfig, node) as writer:
        writer.update(by_uuid(node.value(node.seen(0))))
        await shown(cluster, node, lambda all_: "status" in all_.get(first, ()), "the GPU is there")
        await proxy.down()
        for slots in range(1, 5):
            writer.update(by_uuid(node.value(node.seen(0), node.held(0, *range(slots)))))

        async def told() -> bool:
            return any("not written" in problem.message for problem in writer.problems())

        await until(told, "the problem is told")
        proxy.asked.clear()
        await proxy.up()
        await shown(cluster, node, lambda all_: all_[first]["status"]["summary"] == "4/4", "the newest is there")
        assert sum(asked.startswith("PATCH gpus") for asked in proxy.asked) == 1
        await problems(writer, 0)


async def test_an_object_of_another_node_is_left_alone(cluster: Cluster, node: Node) -> None:
    """Two nodes that claim one GPU: the second says so, in words that help. Neither that nor an object that the API
    server refuses keeps the others from being written."""
    other = Node(f"{node.name}-b", "")
    first, second = node.uuids
    other.uuids = (first, second)
    bad = replace(node.seen(0).gpu, uuid="GPU_0")
    async with publisher(cluster.kubeconfig, node) as writer, publisher(cluster.kubeconfig, other) as late:
        writer.update(by_uuid(node.value(node.seen(0))))
        before = await shown(cluster, node, lambda all_: "status" in all_.get(first, ()), "the GPU is there")
        late.update(by_uuid(*(other.value(seen) for seen in (node.seen(0), node.seen(1), node.seen(0, gpu=bad)))))
        await shown(cluster, other, lambda all_: "status" in all_.get(second, ()), "the other GPU is there")
        claimed, refused = await problems(late, 2)
        assert (claimed.where, refused.where) == (f"GPU {first.lower()}", "GPU gpu_0")
        assert f"it is of node {node.name}" in claimed.message
        assert f"kubectl delete gpu {first.lower()}" in claimed.message
        assert "is not written" in refused.message
        assert await gpus(cluster, node) == before
        late.update({})
        await shown(cluster, other, lambda all_: not all_, "objects of its own are deleted")
        assert await gpus(cluster, node) == before


# ------------------------------------------------------------------------------------------------------- what is learnt


@asynccontextmanager
async def view(
    kubeconfig: Path, node: str, file: PolicyFile | None = None, start_s: float = DEADLINE_S
) -> AsyncIterator[tuple[Client, ClusterView]]:
    async with connect(kubeconfig) as client:
        found = ClusterView(client, node, file=file, pace=QUICK)
        await found.start(start_s)
        try:
            yield client, found
        finally:
            await found.stop()


async def learnt(view: ClusterView, holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not holds():
            await view.wait_changed()


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "meshctl.io/v1alpha1", "kind": "GPUSharingPolicy", "metadata": {"name": name}, "spec": spec}


def pod(node: str, name: str) -> dict[str, Any]:
    limits = {RESOURCE: "2", "cpu": "1"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "annotations": {"meshctl.io/gpu-product": "V100", "other.io/x": "y"}},
        "spec": {
            "nodeName": node,
            "initContainers": [{"name": "i", "image": "i", "restartPolicy": "Always"}],
            "containers": [{"name": "c", "image": "i", "resources": {"limits": limits}}],
        },
    }


async def test_the_agent_learns_of_its_node_its_pods_and_the_policies(cluster: Cluster, node: Node) -> None:
    """Of these what it needs, of others nothing; a status of a policy that others write is no news."""
    namespace = await cluster.namespace("watch")
    async with view(cluster.kubeconfig, node.name) as (_, seen):
        assert seen.node_labels is not None
        assert seen.node_labels["pool"] == node.name
        assert seen.node_uid == node.uid
        assert (seen.pods(), seen.problems()) == ([], ())

        def ours() -> dict[str, int | None]:
            return {one.name: one.spec.replicas for one in seen.policies() or () if one.name.startswith(node.name)}

        await cluster.apply(
            policy(f"{node.name}-a", nodeSelector={"pool": node.name}, replicas=4, resourceName=RESOURCE)
        )
        await learnt(seen, lambda: ours() == {f"{node.name}-a": 4})
        await cluster.apply(
            policy(f"{node.name}-a", nodeSelector={"pool": node.name}, replicas=5, resourceName=RESOURCE)
        )
        await learnt(seen, lambda: ours() == {f"{node.name}-a": 5})

        created = [pod(node.name, "here"), pod("elsewhere", "there")]
        await cluster.kubectl("create", f"--namespace={namespace}", "--filename=-", stdin=_documents(created))
        await learnt(seen, lambda: bool(seen.pods()))
        (found,) = seen.pods() or ()
        metadata = found["metadata"]
        assert (metadata["namespace"], metadata["name"]) == (namespace, "here")
        assert metadata["annotations"] == {"meshctl.io/gpu-product": "V100"}
        assert set(metadata) == {"name", "namespace", "uid", "creationTimestamp", "annotations"}
        assert found["spec"] == {
            "initContainers": [{"name": "i", "restartPolicy": "Always"}],
            "containers": [{"name": "c", "resources": {"limits": {RESOURCE: "2"}}}],
        }
        assert await seen.fresh_pods(DEADLINE_S) == [found]
        await cluster.kubectl("delete", "gpusharingpolicy", f"{node.name}-a")
        await learnt(seen, lambda: ours() == {})
        await cluster.kubectl("label", "node", node.name, "pool=other", "--overwrite")
        await learnt(seen, lambda: (seen.node_labels or {}).get("pool") == "other")
        await cluster.kubectl("delete", "pod", "here", f"--namespace={namespace}", "--force", "--grace-period=0")
        await learnt(seen, lambda: not seen.pods())


async def test_an_agent_that_starts_without_the_api_server_catches_up(
    cluster: Cluster, node: Node, proxy: ApiProxy
) -> None:
    """Until then nothing is known, which is not the same as nothing being there."""
    await proxy.down()
    async with view(proxy.kubeconfig, node.name, start_s=0.2) as (_, seen):
        assert (seen.node_labels, seen.node_uid, seen.policies(), seen.pods()) == (None, "", None, None)
        assert len(seen.problems()) >= 3
        with pytest.raises(UnavailableError):
            await seen.fresh_pods(0.2)
        await proxy.up()
        await learnt(seen, lambda: seen.policies() is not None and seen.node_labels is not None)
        await learnt(seen, lambda: seen.problems() == ())


async def test_a_policy_of_another_schema_leaves_its_last_version(
    cluster: Cluster, node: Node, proxy: ApiProxy
) -> None:
    """With a problem that names it; so does a kind that the API server does not know."""
    name = f"{node.name}-p"
    await cluster.apply(policy(name, nodeSelector={"pool": node.name}, replicas=4, resourceName=RESOURCE))
    async with view(proxy.kubeconfig, node.name) as (client, seen):
        found = [one for one in seen.policies() or () if one.name == name]
        assert [one.spec.replicas for one in found] == [4]
        live = (await client.list("GPUSharingPolicy")).items
        newer = next(item for item in live if item["metadata"]["name"] == name)
        newer = {**newer, "spec": {**newer["spec"], "futures": True}}

        async def watched() -> bool:
            return proxy.watched("WATCH gpusharingpolicies")

        await until(watched, "the view hears what is said")
        proxy.say("WATCH gpusharingpolicies", {"type": "MODIFIED", "object": newer})
        await learnt(seen, lambda: any("futures" in problem.message for problem in seen.problems()))
        (problem,) = seen.problems()
        assert problem.where == f"GPUSharingPolicy {name}"
        assert problem.message.endswith("(its last valid version stays in force)")
        assert [one for one in seen.policies() or () if one.name == name] == found
    proxy.answer("LIST gpusharingpolicies", 404, body=b"404 page not found\n")
    async with view(proxy.kubeconfig, node.name) as (_, seen):
        await learnt(seen, lambda: seen.policies() is not None)
    await cluster.kubectl("delete", "gpusharingpolicy", name)


async def test_policies_of_a_file_count_instead_of_the_clusters(cluster: Cluster, node: Node, tmp_path: Path) -> None:
    """Labels and pods still are those of the cluster; a change of the file is a change."""
    path = tmp_path / "policy.yaml"
    path.write_text(_documents([policy("file", replicas=3)]))
    async with view(cluster.kubeconfig, node.name, PolicyFile(path)) as (_, seen):
        assert [(one.name, one.spec.replicas) for one in seen.policies() or ()] == [("file", 3)]
        assert (seen.node_labels or {})["pool"] == node.name
        path.write_text(_documents([policy("file", replicas=2)]))
        await learnt(seen, lambda: [one.spec.replicas for one in seen.policies() or ()] == [2])


def _documents(values: list[dict[str, Any]]) -> str:
    return "\n---\n".join(orjson.dumps(value).decode() for value in values)
