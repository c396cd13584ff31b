"""Inference servers that come, go, die and flap behind a route of `meshctl run`, on a real cluster."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from istio.names import size_host
from meshctl.model import RouteId
from meshctl.ports import ObjectKey
from tests.cluster.cluster import Cluster
from tests.cluster.world import NAME, World, world
from tests.harness.envoy import Outcome
from tests.harness.tools import completed, page, until

pytestmark = pytest.mark.cluster

TESTER = "tester"
CHURN_S, CHANGES = 5.0, 50
T4, NONE = "Tesla-T4", "unknown"


async def test_a_server_that_ends_or_dies_under_load_loses_no_request(cluster: Cluster, tmp_path: Path) -> None:
    """Connections that are refused are tried elsewhere, before anybody took the server out of the weights; and with
    spec.retry.idempotent so are requests that the server had."""
    async with world(cluster, tmp_path, backends=3) as here:
        await here.apply(policy="Proportional")
        async with here.confirming():
            await here.served()
            async with here.load() as outcome:
                await _more(outcome, 100)
                before = await here.weights()
                await here.backends.leave(0)
                await _more(outcome, 300)
                assert await here.weights() == before
                assert {outcome.bodies[address] > 0 for address in here.backends.addresses} == {True}
                alive = {"endpoints": here.endpoints(1, 2)}
                await here.apply(policy="Proportional", backend=alive, retry={"idempotent": True})
                await here.until_weights(lambda weights: len(weights) == 2, "the one that ended is out")
                await until(lambda: _retries_resets(here), "the gateway retries requests that were reset")
                await here.backends.die(1)
                await _more(outcome, 300)
    assert outcome.failed == 0, outcome.statuses


async def test_pods_of_a_service_come_and_go_and_flap(cluster: Cluster, tmp_path: Path) -> None:
    """From a Service without pods: GPUs from the nodes' labels, a class of its own for those that are unknown, and
    reasons; a pod that goes is out of the ServiceEntry and of Envoy; pods that flap cost few writes and end right."""
    async with world(cluster, tmp_path) as here:
        pods = Pods(here)
        try:
            await pods.create_nodes_and_service()
            await here.apply(policy="Proportional", backend={"service": {"name": "triton", "port": "http"}})
            async with here.confirming() as controller:
                await here.until_condition("Resolved", "False", "NoEndpoints")
                assert "app=triton" in await here.message("Resolved")
                await here.until_condition("Programmed", "True")
                assert set((await pods.entries()).values()) == {frozenset()}

                await pods.run("t-0", "t-1", "t-2", on="labelled")
                await pods.until({"10.64.0.0", "10.64.0.1", "10.64.0.2"})
                await here.until_condition("Resolved", "False", "NoProfile")
                assert f"no ModelProfile for resnet50 on {T4}" in await here.message("Resolved")
                await pods.run("u-3", on="bare")
                await pods.until({"10.64.0.0", "10.64.0.1", "10.64.0.2", "10.64.0.3"})
                assert await pods.gpus() == {"10.64.0.0": T4.lower(), "10.64.0.3": NONE} | await pods.gpus()
                await until(lambda: _says(here, "the GPU of u-3"), "the status says whose GPU is unknown")

                gone_s = [await pods.gone(name) for name in ("t-0", "u-3")]
                sys.stdout.write(f"a pod goes: out of the ServiceEntry and of Envoy after {gone_s} s\n")

                generations, began_s = await pods.generations(), time.monotonic()
                for change in range(CHANGES):
                    await pods.set_ready(f"t-{1 + change % 2}", ready=change % 4 < 2)
                    await asyncio.sleep(CHURN_S / CHANGES)  # the pace of the churn
                await pods.run("t-4", on="labelled")  # where this one is, all of the above is
                await pods.until({"10.64.0.1", "10.64.0.2", "10.64.0.4"})
                lasted_s, after = time.monotonic() - began_s, await pods.generations()
                writes = {name: after[name] - generations[name] for name in after}
                sys.stdout.write(f"{CHANGES} changes in {lasted_s:.1f} s: writes {writes}\n")
                assert max(writes.values()) <= lasted_s / 0.1
                await here.steady(controller)
                assert await pods.in_envoy() == {"10.64.0.1", "10.64.0.2", "10.64.0.4"}
        finally:
            await pods.remove_nodes()


class Pods:
    """Pods without a kubelet, on nodes that are names, behind the Service ``triton`` of a world."""

    def __init__(self, here: World) -> None:
        self._here = here
        self._mark = {"namespace": here.namespace}

    async def create_nodes_and_service(self) -> None:
        product = {"nvidia.com/gpu.product": T4}
        ports = [{"name": "http", "port": 80, "targetPort": "http"}]
        service = {"selector": {"app": "triton"}, "ports": ports}
        await self._here.cluster.apply(
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self._node("labelled"), "labels": product}},
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": self._node("bare")}},
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "triton", **self._mark}, "spec": service},
        )

    async def remove_nodes(self) -> None:
        await self._here.cluster.kubectl("delete", "node", self._node("labelled"), self._node("bare"))

    async def run(self, *names: str, on: str) -> None:
        """Pods that are ready at 10.64.0.N, N from their names."""
        containers = [{"name": "triton", "image": "triton", "ports": [{"name": "http", "containerPort": 8000}]}]
        spec = {"nodeName": self._node(on), "containers": containers, "terminationGracePeriodSeconds": 600}
        for name in names:
            metadata = {"name": name, "labels": {"app": "triton"}, **self._mark}
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
            await self._here.api.apply(pod, manager=TESTER)
            await self.set_ready(name, ready=True)

    async def set_ready(self, name: str, *, ready: bool) -> None:
        """What the kubelet would say of it."""
        address = _address(name)
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "conditions": conditions}
        key = ObjectKey("Pod", self._here.namespace, name)
        await self._here.api.merge_patch(key, {"status": status}, subresource="status", manager=TESTER)

    async def gone(self, name: str) -> float:
        """Delete it, as a roll-out does: seconds until it is in no ServiceEntry and not in Envoy."""
        began_s, address = time.monotonic(), _address(name)
        await self._here.api.delete(ObjectKey("Pod", self._here.namespace, name))

        async def out() -> bool:
            written = all(address not in addresses for addresses in (await self.entries()).values())
            return written and address not in await self.in_envoy()

        await until(out, f"{name} is out")
        return round(time.monotonic() - began_s, 3)

    async def until(self, addresses: set[str]) -> None:
        """Wait until these, and no others, are in every ServiceEntry and in Envoy."""

        async def so() -> bool:
            return set((await self.entries()).values()) == {frozenset(addresses)} and await self.in_envoy() == addresses

        await until(so, f"{sorted(addresses)} are served")

    async def entries(self) -> Mapping[str, frozenset[str]]:
        """ServiceEntry -> addresses."""
        listed = (await self._here.api.list("ServiceEntry", self._here.namespace)).items
        return {
            entry["metadata"]["name"]: frozenset(e["address"] for e in entry["spec"].get("endpoints", ()))
            for entry in listed
        }

    async def generations(self) -> dict[str, int]:
        return {name: value["metadata"]["generation"] for name, value in (await self._here.objects()).items()}

    async def gpus(self) -> dict[str, str]:
        """Address -> GPU class."""
        listed = (await self._here.api.list("ServiceEntry", self._here.namespace)).items
        return {e["address"]: e["labels"]["meshctl.io/gpu"] for entry in listed for e in entry["spec"]["endpoints"]}

    async def in_envoy(self) -> set[str]:
        """Addresses of the size class ``small`` that the gateway balances over."""
        text = await completed(page, f"http://{self._here.cluster.gateway().admin}/clusters") or ""
        name = re.escape(size_host(RouteId(f"{self._here.namespace}/{NAME}"), "small"))
        return set(re.findall(rf"^outbound\|80\|\|{name};?::([0-9.]+):8000::cx_active", text, re.MULTILINE))

    def _node(self, kind: str) -> str:
        return f"{self._here.namespace}-{kind}"


def _address(name: str) -> str:
    return f"10.64.0.{name.rpartition('-')[2]}"


async def _says(here: World, words: str) -> bool:
    return words in await here.message("Resolved")


async def _retries_resets(here: World) -> bool:
    """The gateway has the newest rules of the route."""
    dumped: Any = await completed(
        page, f"http://{here.cluster.gateway().admin}/config_dump?resource=dynamic_route_configs"
    )
    found = re.findall(r'"retry_on": "([^"]*)"', (dumped or "").partition(here.namespace)[2])
    return "gateway-error" in found[0] if found else False


async def _more(outcome: Outcome, count: int) -> None:
    """Wait for `count` more answers."""
    goal = sum(outcome.statuses.values()) + count

    async def answered() -> bool:
        return sum(outcome.statuses.values()) >= goal

    await until(answered, f"{count} more answers")
