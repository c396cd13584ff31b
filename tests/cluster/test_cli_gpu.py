"""`meshctl gpu map` and `plan` on a real API server, and `map` on an agent's admin API."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web
from typer.testing import CliRunner, Result

from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.adapters.kubernetes.kinds import KINDS
from meshctl.cli.app import app
from meshctl.errors import InputError, MeshctlError, RefusedError, UnavailableError
from meshctl.extender.movable import SAFE_TO_EVICT
from meshctl.ports import ObjectKey
from tests.cluster.cluster import Cluster
from tests.harness.gpus import NOW, gpu_object
from tests.harness.tools import completed

pytestmark = pytest.mark.cluster
NODE = f"map-{os.urandom(4).hex()}"
UUIDS = (f"GPU-{NODE}-a", f"GPU-{NODE}-b")
AWAY = """
apiVersion: v1
kind: Config
clusters: [{name: away, cluster: {server: "http://127.0.0.1:1"}}]
contexts: [{name: away, context: {cluster: away}}]
current-context: away
"""
OBJECTS = (
    gpu_object(NODE, UUIDS[0], 4, [("serving", "resnet", "server", [0, 1]), ("serving", "bert", "server", [2])]),
    gpu_object(NODE, UUIDS[1], 4, [("research", "train", "main", [3])]),
)


@pytest.fixture(scope="module")
def written(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster with two GPU objects of a node of their own."""
    stdin = "\n---\n".join(orjson.dumps(data).decode() for data in OBJECTS)
    cluster.kubectl_now("create", "--filename=-", stdin=stdin)
    for data in OBJECTS:
        patch = orjson.dumps({"status": data["status"]}).decode()
        name = data["metadata"]["name"]
        cluster.kubectl_now("patch", "gpu", name, "--subresource=status", "--type=merge", f"--patch={patch}")
    yield cluster
    cluster.kubectl_now("delete", "gpu", *(data["metadata"]["name"] for data in OBJECTS))


def ran(command: str, *arguments: object) -> Result:
    """`meshctl gpu COMMAND`, without error. Raises what it raises."""
    result = CliRunner().invoke(app, ["gpu", command, *map(str, arguments)])
    if isinstance(result.exception, MeshctlError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def run(*arguments: object) -> str:
    """What `meshctl gpu map` prints."""
    return ran("map", *arguments).stdout


def proposed(*arguments: object) -> str:
    """What `meshctl gpu plan` prints."""
    return ran("plan", *arguments).stdout


def test_map_shows_what_the_api_server_has(written: Cluster) -> None:
    """As text, and as the objects themselves for programs."""
    options = ("--kubeconfig", written.kubeconfig, "--node", NODE)
    text = run(*options)
    assert f"{NODE}  hpe.com/gpus 4 of 8 used, 4 free, but at most 3 on one GPU" in text
    assert "AAB·" in text
    assert "···C" in text
    assert "serving/resnet[server]" in text
    objects = orjson.loads(run(*options, "-o", "json"))
    assert [one["spec"]["uuid"] for one in objects] == list(UUIDS)
    assert [one["status"]["slots"]["free"] for one in objects] == [1, 3]
    assert "uuid: " + UUIDS[0] in run(*options, "-o", "yaml")
    columns = {line.split()[0]: line for line in written.kubectl_now("get", "gpus").splitlines()}
    assert all(f" {one['status']['summary']} " in columns[one["metadata"]["name"]] for one in objects)


def test_node_without_gpus_is_the_callers_mistake(written: Cluster) -> None:
    """The nodes that have some are named."""
    with pytest.raises(InputError, match=rf"no GPU objects of node nowhere; nodes that have some: .*{NODE}"):
        run("--kubeconfig", written.kubeconfig, "--node", "nowhere")


async def test_who_may_not_see_gpus_is_told_so(written: Cluster) -> None:
    """In the API server's words."""
    namespace = await written.namespace("map")
    kubeconfig = await written.kubeconfig_for(f"{namespace}/default")
    with pytest.raises(RefusedError, match=r"403 Forbidden: .* cannot list resource \"gpus\""):
        await completed(run, "--kubeconfig", kubeconfig)


async def test_who_sees_gpus_but_no_pods_gets_the_map_without_stranded_ones(written: Cluster) -> None:
    """And is told what is missing; a plan is refused to him."""
    namespace = await written.namespace("map")
    account = f"--serviceaccount={namespace}:default"
    await written.kubectl("create", "clusterrole", namespace, "--verb=list", "--resource=gpus.meshctl.io")
    await written.kubectl("create", "clusterrolebinding", namespace, f"--clusterrole={namespace}", account)
    options = ("--kubeconfig", await written.kubeconfig_for(f"{namespace}/default"), "--node", NODE)
    shown = await completed(ran, "map", *options)
    assert "hpe.com/gpus 4 of 8 used" in shown.stdout
    assert "stranded GPUs are not shown: list nodes: 403 Forbidden: nodes is forbidden" in shown.stderr
    with pytest.raises(RefusedError, match=r"403 Forbidden: .* cannot list resource \"nodes\""):
        await completed(proposed, *options)
    await written.kubectl("delete", "clusterrolebinding,clusterrole", namespace)


async def test_plan_reads_the_cluster_and_changes_nothing(cluster: Cluster) -> None:
    """Two GPUs half free, and a pod that waits for more: of those who run there the one moves that may."""
    namespace = await cluster.namespace("plan")
    uuids = [f"GPU-{namespace}-{letter}" for letter in "ab"]
    async with connect(cluster.kubeconfig) as client:
        await _half_free(client, namespace, uuids)
        before = await cluster.get("pods", f"--namespace={namespace}")
        options = ("--kubeconfig", cluster.kubeconfig, "--node", namespace)
        data = orjson.loads(await completed(proposed, *options, f"--pod={namespace}/large", "--output=json"))
        (move,) = data["moves"]
        assert (move["pod"], move["from"]["gpus"], move["to"]["gpus"]) == ("p0", {uuids[0]: 2}, {uuids[1]: 2})
        assert data["fits"] == {"node": namespace, "gpus": {uuids[0]: 3}}
        text = await completed(proposed, *options, "--for=3", "--cpu=1")
        assert "1 move proposed, nothing was changed" in text
        assert f"kubectl delete pod --namespace={namespace} p0" in text
        shown = await completed(run, "--kubeconfig", cluster.kubeconfig, "--node", namespace)
        assert "4 of 8 used, 4 free, but at most 2 on one GPU" in shown
        assert "; 0.5 GPUs stranded for want of CPU" in shown
        assert await cluster.get("pods", f"--namespace={namespace}") == before
        for kind, names in (("Node", [namespace]), ("GPU", [uuid.lower() for uuid in uuids])):
            for name in names:
                await client.delete(ObjectKey(kind, "", name))


async def _half_free(client: Client, namespace: str, uuids: list[str]) -> None:
    """A node named like the namespace, where `p0` and `p1` run with 2 slots of 4; `large` waits for 3."""
    allocatable = {"cpu": "6", "memory": "8Gi", "pods": "10"}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": namespace, "labels": {"only": namespace}}}
    await client.create(node | {"status": {"allocatable": allocatable, "capacity": allocatable}})
    await client.merge_patch(ObjectKey("Node", "", namespace), {"spec": {"taints": None}})  # it counts as not ready
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner", "namespace": namespace}}
    uid = (await client.create(owner))["metadata"]["uid"]
    owned = [{"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid, "controller": True}]
    for number, uuid in enumerate(uuids):
        gpu = gpu_object(namespace, uuid, 4, [(namespace, f"p{number}", "server", [0, 1])])
        await client.create(gpu)
        await client.merge_patch(KINDS["GPU"].key(gpu), {"status": gpu["status"]}, subresource="status")
        running = _pod(f"p{number}", namespace, 2, owned) | {"status": {"phase": "Running", "startTime": NOW}}
        running["spec"]["nodeName"] = namespace
        running["metadata"]["annotations"] = {SAFE_TO_EVICT: str(number == 0).lower()}
        await client.create(running)
        await client.merge_patch(KINDS["Pod"].key(running), {"status": running["status"]}, subresource="status")
    await client.create(_pod("large", namespace, 3, owned))


def _pod(name: str, namespace: str, slots: int, owned: list[dict[str, Any]]) -> dict[str, Any]:
    resources = {"limits": {"hpe.com/gpus": str(slots)}, "requests": {"cpu": "2"}}
    server = {"name": "server", "image": "i", "resources": resources}
    spec = {"schedulerName": "nobody", "containers": [server], "nodeSelector": {"only": namespace}}
    metadata = {"name": name, "namespace": namespace, "ownerReferences": owned}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@pytest.fixture
async def agent() -> AsyncIterator[str]:
    """The address of something that answers as an agent's admin API does."""

    timeless = orjson.loads(orjson.dumps(OBJECTS))  # times come with the write to an API server
    for data in timeless:
        for one in data["status"]["conditions"]:
            del one["lastTransitionTime"]

    async def gpus(_: web.Request) -> web.Response:
        return web.json_response(timeless)

    async def others(_: web.Request) -> web.Response:
        return web.json_response([{"spec": {}}])

    served = web.Application()
    served.router.add_get("/api/v1/gpus", gpus)
    served.router.add_get("/other/api/v1/gpus", others)
    runner = web.AppRunner(served)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address: Any = runner.addresses[0]
    yield f"127.0.0.1:{address[1]}"
    await runner.cleanup()


async def test_agent_is_asked_where_there_is_no_cluster(agent: str) -> None:
    """The same map, from one node."""
    text = await completed(run, "--agent", agent)
    assert f"{NODE}  hpe.com/gpus 4 of 8 used" in text


async def test_what_is_no_agent_is_said_to_be_none(agent: str) -> None:
    """Nobody there, something else there, and options that contradict each other."""
    with pytest.raises(MeshctlError, match=r"cannot reach the agent at http://127\.0\.0\.1:1: .*is `meshctl agent` up"):
        await completed(run, "--agent", "127.0.0.1:1")
    with pytest.raises(MeshctlError, match=r"did not answer as a meshctl agent of this version; is --agent right\?"):
        await completed(run, "--agent", f"http://{agent}/elsewhere")
    with pytest.raises(MeshctlError, match="did not answer as a meshctl agent"):
        await completed(run, "--agent", f"http://{agent}/other")
    with pytest.raises(InputError, match="give one of them"):
        await asyncio.to_thread(run, "--agent", agent, "--kubeconfig", "x")
    with pytest.raises(InputError, match="--watch draws: leave it out for -o json"):
        await asyncio.to_thread(run, "--agent", agent, "--watch", "-o", "json")


async def test_where_the_api_server_is_away_an_agent_may_be_asked(tmp_path: Path) -> None:
    """The error says so: at the worst hour the map is still to be had, node by node."""
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(AWAY)
    with pytest.raises(UnavailableError, match=r"an agent answers without it: --agent HOST:18002"):
        await completed(run, "--kubeconfig", kubeconfig)
