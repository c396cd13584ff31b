"""The watched copy against the real API server, with everything that can go wrong in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from meshctl.adapters.kubernetes.client import Client, connect
from meshctl.adapters.kubernetes.kinds import KINDS, Kind
from meshctl.adapters.kubernetes.reflector import FAILURES_TO_LIST, Pace, Reflector
from meshctl.ports import ObjectKey
from tests.cluster.cluster import Cluster
from tests.cluster.proxy import ApiProxy
from tests.harness.tools import DEADLINE_S, until

pytestmark = pytest.mark.cluster

QUICK = Pace(first_pause_s=0.02, longest_pause_s=0.1, refused_s=0.1)
GONE = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}


class Watched:
    """A reflector of one namespace's Services, running, and what it said."""

    def __init__(self, client: Client, namespace: str, pace: Pace = QUICK, kind: Kind = KINDS["Service"]) -> None:
        self.changes: list[str] = []
        self._moved = asyncio.Event()
        self.reflector = Reflector(
            client, kind, namespaces=(namespace,), on_change=self._change, on_state=self._moved.set, pace=pace
        )

    def _change(self, key: ObjectKey) -> None:
        self.changes.append(key.name)
        self._moved.set()

    @property
    def names(self) -> set[str]:
        return {key.name for key in self.reflector.objects}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await self._moved.wait()
                self._moved.clear()


@asynccontextmanager
async def watched(kubeconfig: Path, namespace: str, pace: Pace = QUICK) -> AsyncIterator[tuple[Client, Watched]]:
    async with connect(kubeconfig) as client:
        found = Watched(client, namespace, pace)
        task = asyncio.create_task(found.reflector.run())
        try:
            await found.until(lambda: found.reflector.synced)
            yield client, found
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def service(namespace: str, name: str, **labels: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"ports": [{"port": 80}]}}


@pytest.fixture
async def proxy(cluster: Cluster, tmp_path: Path) -> AsyncIterator[ApiProxy]:
    async with ApiProxy(cluster.kubeconfig, tmp_path) as proxy:
        yield proxy


async def test_what_is_created_changed_and_deleted_is_seen(cluster: Cluster) -> None:
    """Of each object what is kept of its kind, and no call for a change in what is not kept."""
    namespace = await cluster.namespace()
    async with watched(cluster.kubeconfig, namespace) as (client, seen):
        assert seen.names == set()
        await client.apply(service(namespace, "a", app="one"))
        await seen.until(lambda: seen.names == {"a"})
        key = ObjectKey("Service", namespace, "a")
        held = seen.reflector.objects[key]
        assert held["metadata"]["labels"] == {"app": "one"}
        assert set(held["metadata"]) == {"name", "namespace", "uid", "labels"}
        await client.merge_patch(key, {"metadata": {"annotations": {"somebody/else": "x"}}})
        await client.apply(service(namespace, "a", app="two"))
        await seen.until(lambda: seen.reflector.objects[key]["metadata"]["labels"] == {"app": "two"})
        await client.delete(key)
        await seen.until(lambda: seen.names == set())
    assert seen.changes == ["a", "a", "a"]


@pytest.mark.parametrize("by_event", [True, False], ids=["error-event", "status"])
async def test_after_410_what_was_deleted_meanwhile_is_gone(cluster: Cluster, proxy: ApiProxy, by_event: bool) -> None:
    """Whether the server says it when the watch is opened or in its midst; the rest is untouched."""
    namespace = await cluster.namespace()
    async with connect(cluster.kubeconfig) as direct, watched(proxy.kubeconfig, namespace) as (_, seen):
        for name in ("stays", "goes"):
            await direct.apply(service(namespace, name))
        await seen.until(lambda: seen.names == {"stays", "goes"})
        seen.changes.clear()
        lists = proxy.asked.count("LIST services")
        proxy.deafen()
        await direct.delete(ObjectKey("Service", namespace, "goes"))
        await direct.apply(service(namespace, "comes"))
        if by_event:
            proxy.say("WATCH services", {"type": "ERROR", "object": GONE})
        else:
            proxy.answer("WATCH services", 410, body=GONE)
            proxy.cut()
        await seen.until(lambda: seen.names == {"stays", "comes"})
        assert sorted(seen.changes) == ["comes", "goes"]
        assert proxy.asked.count("LIST services") == lists + 1


async def test_a_cut_connection_is_taken_up_where_it_was(cluster: Cluster, proxy: ApiProxy) -> None:
    """Without a new list; half a line is no event; what happened meanwhile is told once."""
    namespace = await cluster.namespace()
    async with connect(cluster.kubeconfig) as direct, watched(proxy.kubeconfig, namespace) as (_, seen):
        await direct.apply(service(namespace, "a"))
        await seen.until(lambda: seen.names == {"a"})
        lists = proxy.asked.count("LIST services")
        proxy.cut(b'{"type":"DELETED","object":{"metadata":{"name":"a"')
        await direct.apply(service(namespace, "b"))
        await seen.until(lambda: seen.names == {"a", "b"})
        assert seen.changes == ["a", "b"]
        assert proxy.asked.count("LIST services") == lists


async def test_a_silent_watch_is_taken_up_again(cluster: Cluster, proxy: ApiProxy) -> None:
    """A connection of which only this end is left says nothing, and no error either."""
    namespace = await cluster.namespace()
    pace = Pace(silence_s=0.3, first_pause_s=0.02, longest_pause_s=0.1)
    async with connect(cluster.kubeconfig) as direct, watched(proxy.kubeconfig, namespace, pace) as (_, seen):
        proxy.deafen()
        await direct.apply(service(namespace, "a"))
        await seen.until(lambda: seen.names == {"a"})


async def test_a_kind_of_which_nothing_changes_is_no_problem(cluster: Cluster, proxy: ApiProxy) -> None:
    """Not every API server sends bookmarks: each silent watch is taken up at once, without a new list or a word."""
    namespace = await cluster.namespace()
    pace = Pace(silence_s=0.1, steady_s=0.05, first_pause_s=0.02, longest_pause_s=60.0)
    async with connect(cluster.kubeconfig) as direct, watched(proxy.kubeconfig, namespace, pace) as (_, seen):
        said: set[str] = set()

        async def watched_often() -> bool:
            said.add(seen.reflector.problem)
            return proxy.asked.count("WATCH services") > 2 * FAILURES_TO_LIST

        await until(watched_often, "many watches were silent")
        assert proxy.asked.count("LIST services") == 1
        assert said == {""}
        await direct.apply(service(namespace, "a"))
        await seen.until(lambda: seen.names == {"a"})


async def test_an_api_server_that_is_away_leaves_the_copy(cluster: Cluster, proxy: ApiProxy) -> None:
    """Errors, refusals and silence are a problem in words, over when it answers; what happened meanwhile is seen."""
    namespace = await cluster.namespace()
    async with connect(cluster.kubeconfig) as direct, watched(proxy.kubeconfig, namespace) as (_, seen):
        await direct.apply(service(namespace, "a"))
        await seen.until(lambda: seen.names == {"a"})
        await proxy.down()
        await seen.until(lambda: "may be behind" in seen.reflector.problem)
        await direct.delete(ObjectKey("Service", namespace, "a"))
        assert seen.names == {"a"}
        assert seen.reflector.missing == ""
        for status in (500, 502, 429):
            proxy.answer("WATCH services", status, {"Retry-After": "0"}, b"<html>no</html>")
        await proxy.up()
        await seen.until(lambda: seen.names == set() and not seen.reflector.problem)


async def test_a_kind_that_does_not_exist_is_picked_up_when_it_comes(cluster: Cluster, proxy: ApiProxy) -> None:
    """Until then `missing` says so, in words that help; a kind that is forbidden likewise."""
    namespace = await cluster.namespace()
    async with connect(cluster.kubeconfig) as direct, connect(proxy.kubeconfig) as client:
        await direct.apply(service(namespace, "a"))
        for _ in range(3):
            proxy.answer("LIST services", 404, body=b"404 page not found\n")
        proxy.answer("LIST services", 403, body={"message": "services is forbidden", "reason": "Forbidden"})
        seen = Watched(client, namespace)
        assert seen.reflector.missing
        assert not seen.reflector.settled
        task = asyncio.create_task(seen.reflector.run())
        await seen.until(lambda: "404 page not found" in seen.reflector.missing)
        assert seen.reflector.settled
        assert not seen.reflector.synced
        await seen.until(lambda: "services is forbidden (grant get, list and watch" in seen.reflector.missing)
        await seen.until(lambda: seen.names == {"a"})
        assert seen.reflector.missing == ""
        task.cancel()
        await asyncio.wait({task})
