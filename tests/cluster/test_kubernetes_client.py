"""Requests to the real API server: what they do, how they fail, and when they are tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.adapters.kubernetes.faults import AbsentError, ChangedError, ExistsError, ExpiredError, ForbiddenError
from meshctl.adapters.kubernetes.kinds import GPUS, KINDS, MANDATORY
from meshctl.adapters.kubernetes.reflector import Pace
from meshctl.adapters.kubernetes.store import ClusterObjects
from meshctl.errors import FieldConflictError, RefusedError, UnavailableError
from meshctl.ports import KubeObject, ObjectKey
from tests.cluster.cluster import Cluster
from tests.cluster.proxy import ApiProxy
from tests.harness.tools import DEADLINE_S

pytestmark = pytest.mark.cluster


@pytest.fixture
async def namespace(cluster: Cluster) -> str:
    return await cluster.namespace()


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[Client]:
    async with connect(cluster.kubeconfig) as client:
        yield client


@pytest.fixture
async def proxy(cluster: Cluster, tmp_path: Path) -> AsyncIterator[ApiProxy]:
    async with ApiProxy(cluster.kubeconfig, tmp_path) as proxy:
        yield proxy


def virtual_service(namespace: str, weight: int, name: str = "route") -> KubeObject:
    split = [{"destination": {"host": f"{index}.example"}, "weight": weight} for index in range(2)]
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "VirtualService",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/managed-by": "meshctl"}},
        "spec": {"http": [{"route": split}]},
    }


async def test_a_field_that_another_manager_owns_is_a_conflict_until_forced(client: Client, namespace: str) -> None:
    """The error names the object, the manager and the field; `force` takes the field back."""
    key = ObjectKey("VirtualService", namespace, "route")
    await client.apply(virtual_service(namespace, 1))
    await client.merge_patch(key, {"spec": {"http": []}}, manager="kubectl-edit")
    with pytest.raises(FieldConflictError, match=rf'{key}: 409 Conflict: .*"kubectl-edit".*\.spec\.http'):
        await client.apply(virtual_service(namespace, 2))
    taken = await client.apply(virtual_service(namespace, 2), force=True)
    assert taken["spec"]["http"][0]["route"][0]["weight"] == 2
    assert (await client.apply(virtual_service(namespace, 2)))["metadata"]["resourceVersion"] == (
        taken["metadata"]["resourceVersion"]
    )


async def test_what_the_server_will_not_take_is_refused_in_its_words(client: Client, namespace: str) -> None:
    """An invalid value, a wrong type, an unknown field, an unknown namespace: at once, with no second try."""
    wanted = dict(virtual_service(namespace, 1))
    with pytest.raises(RefusedError, match=r"422 Invalid: .*metadata\.name"):
        await client.apply(virtual_service(namespace, 1, "Not_A_Name"))
    with pytest.raises(RefusedError, match="weight: expected numeric"):
        await client.apply(wanted | {"spec": {"http": [{"route": [{"destination": {"host": "h"}, "weight": "x"}]}]}})
    with pytest.raises(RefusedError, match="nonsense: field not declared"):
        await client.apply(wanted | {"spec": {"nonsense": 1}})
    with pytest.raises(AbsentError, match='namespaces "no-such" not found'):
        await client.apply(virtual_service("no-such", 1))


async def test_an_object_is_deleted_only_if_it_is_the_one_that_was_meant(client: Client, namespace: str) -> None:
    """By UID; one that is gone already is no error."""
    key = ObjectKey("VirtualService", namespace, "route")
    made = await client.apply(virtual_service(namespace, 1))
    await client.delete(key, uid="another")
    assert await client.get(key) is not None
    await client.delete(key, uid=made["metadata"]["uid"])
    assert await client.get(key) is None
    await client.delete(key, uid=made["metadata"]["uid"])
    await client.delete(key)


async def test_what_exists_is_not_created_and_what_changed_is_not_replaced(client: Client, namespace: str) -> None:
    """The one who was too late learns it, whoever it was."""
    wanted = virtual_service(namespace, 1)
    first = await client.create(wanted)
    with pytest.raises(ExistsError, match="already exists"):
        await client.create(wanted)
    second = await client.replace({**first, "spec": virtual_service(namespace, 2)["spec"]})
    assert second["spec"]["http"][0]["route"][0]["weight"] == 2
    with pytest.raises(ChangedError, match="the object has been modified"):
        await client.replace(first)


async def test_pages_are_one_list(client: Client, namespace: str) -> None:
    """With one version; by label where asked for."""
    for name in "abcde":
        await client.apply(virtual_service(namespace, 1, name))
    kind = KINDS["VirtualService"]
    pages = [page async for page in client.pages(kind, namespace, page=2)]
    assert [[item["metadata"]["name"] for item in page.items] for page in pages] == [["a", "b"], ["c", "d"], ["e"]]
    assert len({page.resource_version for page in pages}) == 1
    assert len((await client.list("VirtualService", namespace)).items) == 5
    assert (await client.list("VirtualService", namespace, label_selector="no=such")).items == ()


async def test_only_what_may_be_repeated_is_tried_again(proxy: ApiProxy, namespace: str) -> None:
    """What the server did not carry out, and what is the same when done twice; Retry-After is kept to."""
    post, patch = "POST virtualservices", "PATCH virtualservices"
    async with connect(proxy.kubeconfig) as client:
        proxy.answer(patch, 500)
        proxy.answer(patch, 429, {"Retry-After": "0"})
        await client.apply(virtual_service(namespace, 1))
        assert proxy.asked.count(patch) == 3
        proxy.answer(post, 429, {"Retry-After": "0"})
        proxy.answer(post, 500, body={"message": "etcdserver: request timed out"})
        with pytest.raises(UnavailableError, match="500: etcdserver: request timed out"):
            await client.create(virtual_service(namespace, 1, "another"))
        assert proxy.asked.count(post) == 2
        proxy.answer(patch, 429, {"Retry-After": "30"}, {"message": "slow down"})
        with pytest.raises(UnavailableError, match="slow down"):
            await client.apply(virtual_service(namespace, 1), deadline_s=5)
        assert proxy.asked.count(patch) == 4


async def test_an_api_server_that_is_away_is_unavailable(proxy: ApiProxy, namespace: str) -> None:
    """In time, with the address, and the object that was meant."""
    async with connect(proxy.kubeconfig) as client:
        await proxy.down()
        with pytest.raises(UnavailableError, match=r"^apply VirtualService .*/route: .*127\.0\.0\.1"):
            await client.apply(virtual_service(namespace, 1), deadline_s=0.3)
        await proxy.up()
        assert (await client.apply(virtual_service(namespace, 1)))["metadata"]["name"] == "route"
        proxy.answer("GET virtualservices", 200, body=b"<html>welcome</html>")
        with pytest.raises(UnavailableError, match="unexpected character"):
            await client.get(ObjectKey("VirtualService", namespace, "route"), retry=False)


async def test_a_right_that_is_missing_is_named(cluster: Cluster, namespace: str) -> None:
    """In the API server's words, which name the account, the verb and the resource."""
    mine = await cluster.kubeconfig_for(f"{namespace}/default")
    async with connect(mine) as client:
        with pytest.raises(
            ForbiddenError, match=f"403 Forbidden: .*{namespace}:default.* cannot patch .*virtualservices"
        ):
            await client.apply(virtual_service(namespace, 1))


async def test_a_watch_from_a_version_that_is_forgotten_has_expired(client: Client, namespace: str) -> None:
    """The real API server's own 410, as its ERROR event or its answer."""
    with pytest.raises(ExpiredError, match="410"):
        async for _ in client.watch(KINDS["VirtualService"], namespace, "1", timeout_s=5, silence_s=5):
            pass


# ------------------------------------------------------------------------------------------------------------ the store


async def test_the_store_reads_what_it_wrote(proxy: ApiProxy, namespace: str) -> None:
    """Before the watch tells; each reader is told of each change; what is not watched is said to be so."""
    key = ObjectKey("VirtualService", namespace, "route")
    async with connect(proxy.kubeconfig) as client:
        store = ClusterObjects(client, namespaces=(namespace,), istio=True)
        await store.start(DEADLINE_S)
        try:
            assert store.problems() == ()
            assert [store.missing(kind) for kind in ("ModelRoute", "VirtualService", "Pod")] == ["", "", ""]
            assert "not watched" in store.missing("Event")
            proxy.deafen()
            one, other = store.reader(), store.reader()
            made = await one.apply(virtual_service(namespace, 1))
            assert one.find(key) == made == other.every("VirtualService")[key]
            assert made["metadata"]["managedFields"][0]["manager"] == "meshctl"
            for reader in (one, other):
                await asyncio.wait_for(reader.wait_changed(), DEADLINE_S)
            proxy.cut()
            await one.delete(key, made["metadata"]["uid"])
            async with asyncio.timeout(DEADLINE_S):
                while other.find(key):
                    await other.wait_changed()
        finally:
            await store.stop()


async def test_a_cluster_without_the_crds_of_gpu_sharing_is_no_problem(proxy: ApiProxy, namespace: str) -> None:
    """The store starts, says nothing of it to people, and knows the kinds when they come."""
    for kind in GPUS:
        proxy.answer(f"LIST {KINDS[kind].plural}", 404)
    async with connect(proxy.kubeconfig) as client:
        store = ClusterObjects(client, namespaces=(namespace,), pace=Pace(refused_s=0.1))
        missing: list[str] = []
        problems: list[str] = []

        def hear(key: ObjectKey | None) -> None:
            if key is None:
                missing.extend(store.missing(kind) for kind in GPUS)
                problems.extend(problem.message for problem in store.problems())

        store.listen(hear)
        try:
            await store.start(DEADLINE_S)
            reader = store.reader()
            async with asyncio.timeout(DEADLINE_S):
                while any(store.missing(kind) for kind in GPUS):
                    await reader.wait_changed()
        finally:
            await store.stop()
    absent = [f"is the CRD of {KINDS[kind].resource} installed?" for kind in GPUS]
    assert all(any(words in why for why in missing) for words in absent)
    assert not any(words in why for why in problems for words in absent)


async def test_the_store_starts_without_what_is_optional(cluster: Cluster, namespace: str) -> None:
    """Nodes and Istio's kinds that may not be listed are problems in words; a kind that is needed is waited for."""
    mine = await cluster.kubeconfig_for(f"{namespace}/default")
    async with connect(mine) as client:
        store = ClusterObjects(client, namespaces=(namespace,))
        with pytest.raises(UnavailableError, match=r"not all objects are known: .*modelroutes.* \(grant get"):
            await store.start(1.0)
        kinds = ",".join(KINDS[kind].resource for kind in MANDATORY)
        rule = ("--verb=get,list,watch", f"--resource={kinds}", "-n", namespace)
        await cluster.kubectl("create", "role", "meshctl", *rule)
        account = f"--serviceaccount={namespace}:default"
        await cluster.kubectl("create", "rolebinding", "meshctl", "--role=meshctl", account, "-n", namespace)
        store = ClusterObjects(client, namespaces=(namespace,))
        await store.start(DEADLINE_S)
        await store.stop()
        assert [problem.where.split()[-1] for problem in store.problems()] == [
            "nodes",
            "gpus.meshctl.io",
            "gpusharingpolicies.meshctl.io",
        ]
        assert "(grant get, list and watch on nodes)" in store.missing("Node")
