"""Status and Events on a real API server, as kubectl shows them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from meshctl.adapters.kubernetes.client import connect
from meshctl.adapters.kubernetes.source import KubernetesSource
from meshctl.adapters.kubernetes.status import KubernetesStatus
from meshctl.adapters.kubernetes.store import ClusterObjects
from meshctl.controller.clock import MonotonicClock
from meshctl.controller.objectstatus import StatusWriter
from meshctl.controller.state import State
from meshctl.core.decide import Memory, decide
from meshctl.model import DataPlaneStatus, ProxyStatus, RouteId, Snapshot
from meshctl.ports import Desired, Observed
from tests.cluster.cluster import Cluster
from tests.harness.manifests import changed, profile, route
from tests.harness.tools import DEADLINE_S

pytestmark = pytest.mark.cluster


def state(desired: Desired, route_id: RouteId, dataplane: DataPlaneStatus) -> State:
    """What the loop would know, without any metrics."""
    plan, _ = decide(Snapshot(desired.routes, {}), Memory(), 1000.0)
    assert route_id in plan.routes
    return State(
        now_s=1000.0,
        started_s=0.0,
        plan=plan,
        published=True,
        desired=desired,
        observed=Observed({}),
        dataplane=dataplane,
        gateways=1,
        failures=(),
        reconciles=1,
    )


async def live(cluster: Cluster, namespace: str) -> Any:
    return await cluster.get("modelroute", "resnet", "--namespace", namespace)


def told(found: Mapping[str, Any]) -> dict[str, str]:
    return {c["type"]: c["status"] for c in found["status"]["conditions"]}


async def test_kubectl_tells_what_holds_and_why(cluster: Cluster) -> None:
    """`get` and `describe` have conditions, shares and Events; the spec stays, and nothing is written twice."""
    namespace = await cluster.namespace("status")
    for manifest in (route(), profile()):
        await cluster.apply(changed(manifest, "metadata.namespace", namespace))
    route_id = RouteId(f"{namespace}/resnet")
    served = DataPlaneStatus((ProxyStatus("proxy", "", synced=True),))
    async with connect(cluster.kubeconfig) as client, asyncio.timeout(DEADLINE_S):
        store = await ClusterObjects(client, namespaces=(namespace,)).start(DEADLINE_S)
        try:
            source = KubernetesSource(store.reader(), store.problems)
            await source.start()
            before = await live(cluster, namespace)
            api = KubernetesStatus(client, "one")
            writer = StatusWriter(store.reader(), api, lambda: True, MonotonicClock(), settle_s=0.0)
            await writer.write(state(source.desired(), route_id, served))
            assert writer.problems() == ()

            after = await live(cluster, namespace)
            assert after["spec"] == before["spec"]
            assert after["metadata"]["generation"] == after["status"]["observedGeneration"] == 1
            assert (told(after)["Ready"], told(after)["Programmed"], told(after)["Conflict"]) == (
                "True",
                "True",
                "False",
            )
            assert told(await cluster.get("modelprofile", profile()["metadata"]["name"], "--namespace", namespace)) == {
                "Accepted": "True"
            }
            described = await cluster.kubectl("describe", "mr", "resnet", "--namespace", namespace)
            for words in ("SLOFeasible", "Worst Class:", "Share:", "Programmed", "meshctl.io/controller"):
                assert words in described, described
            listed = await cluster.kubectl("get", "mr", "resnet", "--namespace", namespace)
            assert after["status"]["attainment"] in listed

            await until_shown(store, after)
            for again in (writer, StatusWriter(store.reader(), api, lambda: True, MonotonicClock(), settle_s=0.0)):
                await again.write(state(source.desired(), route_id, served))
            assert await live(cluster, namespace) == after

            conflict = DataPlaneStatus(served.proxies, conflicts={route_id: "kubectl-edit changed spec.http"})
            await StatusWriter(store.reader(), api, lambda: True, MonotonicClock()).write(
                state(source.desired(), route_id, conflict)
            )
            assert told(await live(cluster, namespace))["Conflict"] == "True"
            assert "kubectl-edit changed spec.http" in await cluster.kubectl(
                "events", "--for=modelroute/resnet", "--namespace", namespace
            )
        finally:
            await store.stop()


async def until_shown(store: ClusterObjects, wanted: Mapping[str, Any]) -> None:
    """The copy has the object as it is."""
    reader = store.reader()
    versions = {wanted["metadata"]["resourceVersion"]}
    while not versions & {value["metadata"]["resourceVersion"] for value in reader.every("ModelRoute").values()}:
        await reader.wait_changed()
