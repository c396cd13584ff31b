"""The writer on a real API server, istiod and gateways: what it writes is in force, and no request fails meanwhile."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp
import pytest

from istio.confirm import Istiod
from istio.names import DESTINATION_RULE, OURS, SERVICE_ENTRY, VIRTUAL_SERVICE
from istio.writer import IstioWriter
from meshctl.adapters.kubernetes.client import connect
from meshctl.adapters.kubernetes.store import ClusterObjects
from meshctl.controller.clock import MonotonicClock
from meshctl.model import Mechanism, Origin, Plan, RouteId, RoutePlan
from meshctl.ports import ObjectKey
from tests.cluster.cluster import Cluster
from tests.harness import manifests
from tests.harness.envoy import Backends, load, request
from tests.harness.istio_plans import meshed
from tests.harness.tools import until

pytestmark = pytest.mark.cluster

START_S = 30.0
LONGEST_S = 1.0
"""Nothing else changes in the test's cluster, so istiod's longest debounce is its shortest."""


class Meshing:
    """A writer over a namespace of its own."""

    def __init__(self, cluster: Cluster, objects: ClusterObjects, namespace: str) -> None:
        self.cluster, self.objects, self.namespace = cluster, objects, namespace
        self.confirmation = Istiod([cluster.istiod_debug], MonotonicClock(), longest_s=LONGEST_S)
        self.plans: Mapping[RouteId, RoutePlan] = {}
        self.writer = IstioWriter(
            objects,
            self.confirmation,
            MonotonicClock(),
            routes=lambda: {route: plan.route for route, plan in self.plans.items()},
            namespaces=(namespace,),
        )

    @property
    def host(self) -> str:
        return f"{self.namespace}.example"

    @property
    def route(self) -> RouteId:
        return RouteId(f"{self.namespace}/resnet")

    def key(self, kind: str, name: str = "resnet") -> ObjectKey:
        return ObjectKey(kind, self.namespace, name)

    def apply(self, *plans: RoutePlan) -> float:
        """Put these in force; when that was asked for."""
        self.plans = {plan.route.spec.id: plan for plan in plans}
        self.writer.apply(Plan(self.plans))
        return time.monotonic()

    def plan(self, weights: Mapping[str, int], gpus: tuple[str, ...] = (), **changes: object) -> RoutePlan:
        plan = meshed(self.route, weights, hosts=(self.host,), **changes)
        named = zip(plan.route.endpoints, gpus or ("",) * len(plan.route.endpoints), strict=True)
        endpoints = tuple(dataclasses.replace(e, gpu=gpu) for e, gpu in named)
        return dataclasses.replace(plan, route=dataclasses.replace(plan.route, endpoints=endpoints))

    async def until(self, holds: Callable[[], bool], what: str) -> float:
        async def asked() -> bool:
            return holds()

        await until(asked, f"{what}; {self.writer.status()}")
        return time.monotonic()

    async def settled(self) -> None:
        def quiet() -> bool:
            status = self.writer.status()
            return self.writer.idle() and not status.waiting

        await self.until(quiet, "everything is in force")

    async def served(self, gateway: int = 0) -> float:
        """When the route is served."""
        async with aiohttp.ClientSession() as session:

            async def answered() -> bool:
                return (await request(session, self.cluster.gateway(gateway).url, host=self.host))[0] == 200

            await until(answered, f"{self.host} is served; {self.writer.status()}")
        return time.monotonic()

    def live(self) -> list[str]:
        return sorted(str(key) for kind in OURS for key in self.objects.every(kind) if key.namespace == self.namespace)


@asynccontextmanager
async def meshing(cluster: Cluster) -> AsyncIterator[Meshing]:
    namespace = await cluster.namespace("writer")
    async with connect(cluster.kubeconfig) as client:
        objects = await ClusterObjects(client, namespaces=(namespace,), istio=True).start(START_S)
        it = Meshing(cluster, objects, namespace)
        it.writer.start()
        try:
            yield it
        finally:
            await it.writer.stop()
            await objects.stop()


async def test_a_route_through_istio_from_its_beginning_to_its_end(cluster: Cluster) -> None:
    """It appears, moves weights and changes its mechanism under load, and goes: no request fails in between."""
    async with Backends(3) as backends, meshing(cluster) as it:
        a, b, c = backends.addresses
        took: dict[str, float] = {}
        began = it.apply(it.plan({a: 500, b: 500}))
        took["route -> served"] = await it.served() - began
        await it.served(1)
        await it.settled()
        assert len(it.writer.status().proxies) >= 2
        async with (
            load(cluster.gateway(0).url, host=it.host, workers=2) as first,
            load(cluster.gateway(1).url, host=it.host, workers=2) as second,
        ):
            for step, weights in enumerate(({a: 1000}, {b: 1000}, {a: 400, b: 300, c: 300})):
                began = it.apply(it.plan({a: 0, b: 0, c: 0} | weights))
                if step < 2:
                    (only,) = weights
                    await _only(backends, only)
                    took[f"weights {step} -> in force at both gateways"] = time.monotonic() - began
            classes = ("A100", "A100", "L4")
            for mechanism, what in ((Mechanism.SUBSETS, 2), (Mechanism.ENDPOINTS, 5)):
                began = it.apply(it.plan({a: 400, b: 300, c: 300}, classes, mechanism=mechanism))
                await it.until(lambda n=what: len(it.live()) == n + 1, f"only {mechanism} is left")  # type: ignore[misc]
                await it.settled()
                took[f"{mechanism} -> in force, the other one pruned"] = time.monotonic() - began
        assert (first.failed, second.failed) == (0, 0), (first.statuses, second.statuses)
        assert set(first.bodies) == set(second.bodies) == {a, b, c}
        it.apply()
        await it.until(lambda: not it.live(), "all of it is gone")
    sys.stdout.write("".join(f"{what}: {1000 * seconds:.0f} ms\n" for what, seconds in took.items()))  # with pytest -s


async def _only(backends: Backends, address: str) -> None:
    """Until nobody but `address` is asked any more."""

    async def alone() -> bool:
        before = dict(backends.served)

        async def more() -> bool:
            return backends.served[address] >= before.get(address, 0) + 20

        await until(more, f"{address} is asked")
        return all(backends.served[other] == before.get(other, 0) for other in backends.addresses if other != address)

    await until(alone, f"only {address} is asked")


async def test_somebodys_edit_is_a_conflict_until_resumed(cluster: Cluster) -> None:
    """What kubectl changed stays as it is, and the status says who and what; weights of the rest go on."""
    async with Backends(2) as backends, meshing(cluster) as it:
        a, b = backends.addresses
        route = manifests.route("resnet")
        await cluster.apply({**route, "metadata": {**route["metadata"], "namespace": it.namespace}})
        owner = (await cluster.get("modelroute", "resnet", "--namespace", it.namespace))["metadata"]["uid"]
        it.apply(it.plan({a: 500, b: 500}, origin=Origin(owner, 1)))
        await it.served()
        await it.settled()
        patch = '[{"op": "replace", "path": "/spec/http/0/timeout", "value": "3s"}]'
        edit = ("patch", "virtualservice", "resnet", "--namespace", it.namespace, "--type=json", f"--patch={patch}")
        await cluster.kubectl(*edit, "--field-manager=kubectl-edit")
        await it.until(lambda: it.route in it.writer.status().conflicts, "the conflict shows")
        assert "kubectl-edit (spec.http)" in it.writer.status().conflicts[it.route]
        theirs = it.objects.find(it.key(VIRTUAL_SERVICE))
        it.apply(it.plan({a: 100, b: 900}, timeout_s=9.0, origin=Origin(owner, 1)))
        await it.until(
            lambda: it.writer.in_force()[it.route]["small"] == {a: 100, b: 900}, "the weights of the rest go on"
        )
        assert it.objects.find(it.key(VIRTUAL_SERVICE)) is theirs
        it.apply(it.plan({a: 100, b: 900}, timeout_s=9.0, origin=Origin(owner, 1, "2026-01-01T00:00:00Z")))
        await it.until(lambda: not it.writer.status().conflicts, "it is taken back")
        await it.settled()
        mine = it.objects.find(it.key(VIRTUAL_SERVICE))
        assert mine is not None
        assert mine["spec"]["http"][0]["timeout"] == "9s"


async def test_what_is_live_can_be_kept_by_the_api_server_as_it_is(cluster: Cluster) -> None:
    """A second writer over the same objects writes nothing: the server's copy is the same as what was rendered."""
    async with Backends(2) as backends, meshing(cluster) as it:
        plan = it.plan(dict.fromkeys(backends.addresses, 500))
        it.apply(plan)
        await it.served()
        await it.settled()
        before = {kind: dict(it.objects.every(kind)) for kind in (SERVICE_ENTRY, DESTINATION_RULE, VIRTUAL_SERVICE)}
        await it.writer.stop()
        again = Meshing(cluster, it.objects, it.namespace)
        again.writer.start()
        again.apply(plan)
        await again.settled()
        assert again.writer.in_force() == {it.route: plan.weights}
        await again.writer.stop()
        assert {kind: dict(it.objects.every(kind)) for kind in before} == before
