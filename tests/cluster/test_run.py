"""`meshctl run` on a real cluster: from a ModelRoute in kubectl to weights in a real gateway, and what goes wrong."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import orjson
import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.world import LEASE, NAME, World, decisions, meshctl, world
from tests.harness.tools import until

pytestmark = pytest.mark.cluster


async def test_a_route_is_served_says_so_and_then_nothing_is_written(cluster: Cluster, tmp_path: Path) -> None:
    """Applied with kubectl, it is served by weights; status and Events tell; decisions that change nothing write
    nothing, and neither does a restart after a kill."""
    async with world(cluster, tmp_path) as here:
        await here.apply()
        async with here.confirming() as controller:
            await here.served()
            await here.until_condition("Programmed", "True", "Acknowledged")
            await here.until_condition("Ready", "True")
            names = {name.split("/", 1)[0] for name in await here.objects()}
            route = await here.get()
            printed = await cluster.kubectl("get", "mr", f"--namespace={here.namespace}")
            before = await here.versions()
            await decisions(controller, 8)
            assert await here.versions() == before
            await controller.end(signal.SIGKILL)
        async with here.confirming() as controller:
            await decisions(controller, 8)
            assert await here.versions() == before
            assert await controller.end(signal.SIGTERM) == 0
        events = (await cluster.get("events", f"--namespace={here.namespace}"))["items"]
    assert names == {"VirtualService", "DestinationRule", "ServiceEntry"}
    assert route["status"]["observedGeneration"] == route["metadata"]["generation"]
    assert route["status"]["readyEndpoints"] == 2
    assert {"ATTAINMENT", "READY"} <= set(printed.split("\n")[0].split())
    assert any(e["involvedObject"]["name"] == NAME for e in events)


async def test_weights_classes_and_endpoints_change_without_a_failed_request(cluster: Cluster, tmp_path: Path) -> None:
    """Under load: an endpoint of another GPU class comes and goes, a size class comes and goes."""
    async with world(cluster, tmp_path, backends=3) as here:
        two, even = {"endpoints": here.endpoints(0, 1)}, "Proportional"
        await here.apply(backend=two, policy=even)
        async with here.confirming():
            await here.served()
            async with here.load() as outcome:
                await here.apply(policy=even)
                await here.until_weights(lambda weights: len(weights) == 3, "the third endpoint has weight")
                three = [
                    {"name": n, "min": a, "max": b} for n, a, b in (("small", 1, 4), ("mid", 5, 8), ("large", 9, 64))
                ]
                await here.apply(requestSize={"classes": three}, policy=even)
                await here.until_weights(lambda weights: len(weights) > 0, "the new class is there", size="mid")
                await here.until_condition("Programmed", "True")
                await here.apply(backend=two, policy=even)
                await here.until_weights(lambda weights: len(weights) == 2, "the third endpoint is gone")

                async def pruned() -> bool:
                    return f"ServiceEntry/{NAME}.mid.size" not in await here.objects()

                await until(pruned, "the class that is gone is pruned")
    assert outcome.failed == 0
    assert outcome.statuses[200] > 100


async def test_what_somebody_else_changes_is_left_alone_until_it_is_taken_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    """`kubectl edit` of our VirtualService: a Conflict and no rewriting, not even after a change of the route; requests
    are served as the edit says; `meshctl resume` takes it back."""
    async with world(cluster, tmp_path) as here:
        await here.apply()
        async with here.confirming() as controller:
            await here.until_condition("Ready", "True")
            ours = (await here.get("VirtualService"))["spec"]["http"]
            edited = [*ours[:-1], {**ours[-1], "timeout": "7s"}]
            await here.patch(_json({"spec": {"http": edited}}), kind="VirtualService", manager="kubectl-edit")
            await here.until_condition("Conflict", "True")
            await here.patch('{"spec": {"timeout": "20s"}}')
            await decisions(controller, 8)
            assert (await here.get("VirtualService"))["spec"]["http"] == edited
            await here.served()
            await meshctl("resume", f"{here.namespace}/{NAME}", "--kubeconfig", str(cluster.kubeconfig))
            await here.until_condition("Conflict", "False")
            await here.until_condition("Ready", "True")
            taken = (await here.get("VirtualService"))["spec"]["http"]
    assert {rule["timeout"] for rule in taken} == {"20s"}


async def test_a_deleted_route_takes_its_objects_along_and_a_paused_one_stays(cluster: Cluster, tmp_path: Path) -> None:
    """`meshctl pause` freezes the weights against a change that would move them; deletion leaves nothing behind."""
    async with world(cluster, tmp_path) as here:
        await here.apply(policy="Proportional")
        async with here.confirming() as controller:
            await here.until_condition("Ready", "True")
            await meshctl("pause", f"{here.namespace}/{NAME}", "--kubeconfig", str(cluster.kubeconfig))
            await here.until_condition("Ready", "True", "Suspended")
            before = {name: value["spec"] for name, value in (await here.objects()).items()}
            await here.patch('{"spec": {"policy": "RoundRobin"}}')
            await decisions(controller, 4)
            entries = {name: value["spec"] for name, value in (await here.objects()).items() if "ServiceEntry" in name}
            assert entries == {name: spec for name, spec in before.items() if "ServiceEntry" in name}
            await cluster.kubectl("delete", "modelroute", NAME, f"--namespace={here.namespace}")

            async def gone() -> bool:
                return not await here.objects()

            await until(gone, "nothing of Istio's is left")


async def test_a_replica_takes_over_from_a_killed_one_and_moves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """kill -9 of the holder of the Lease under load: no request fails, no object is written until something changes,
    and then the other replica writes it."""
    async with world(cluster, tmp_path) as here:
        await here.apply()
        lease = ("--lease", LEASE)
        async with here.confirming(*lease) as first:
            await here.until_condition("Ready", "True")
            async with here.confirming(*lease) as second:
                await decisions(second, 4)
                before = await here.versions()
                async with here.load() as outcome:
                    await first.end(signal.SIGKILL)
                    await here.patch('{"spec": {"timeout": "20s"}}')
                    waited_s = await _until_timeout(here, "20s")
                    after = await here.objects()
    assert outcome.failed == 0
    assert waited_s > 1, "while the Lease was held nobody wrote"
    entries = {name: v["metadata"]["resourceVersion"] for name, v in after.items() if "ServiceEntry" in name}
    assert entries == {name: version for name, version in before.items() if "ServiceEntry" in name}


async def _until_timeout(here: World, timeout: str) -> float:
    """Wait until every rule of the live VirtualService has `timeout`; how long."""
    began_s = time.monotonic()

    async def live() -> bool:
        return {rule["timeout"] for rule in (await here.get("VirtualService"))["spec"]["http"]} == {timeout}

    await until(live, f"the VirtualService says {timeout}")
    return time.monotonic() - began_s


def _json(value: object) -> str:
    return orjson.dumps(value).decode()
