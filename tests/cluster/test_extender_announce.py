"""Two replicas of `meshctl extender`, each with a Pod object: the label that the Service selects is on who binds."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from meshctl.adapters.kubernetes.client import connect
from meshctl.extender.announce import LABEL
from meshctl.extender.ports import PodId
from meshctl.ports import ObjectKey
from tests.cluster.binding import Extender, Stand, key
from tests.cluster.cluster import Cluster
from tests.harness.tools import completed, page, until

pytestmark = pytest.mark.cluster


async def test_the_label_is_on_the_pod_of_who_binds(cluster: Cluster, tmp_path: Path) -> None:
    """Who stands by is ready, and takes off what a killed container of its pod left. The label goes to who follows; a
    killed one's stays until its next container runs; an end in good order takes it off."""
    async with connect(cluster.kubeconfig) as client:
        stand = Stand(client, await cluster.namespace("announce"))
        names = ("first", "second")
        pods = [await stand.pod(name) for name in names]
        first, second = [
            Extender(
                tmp_path / name,
                cluster.kubeconfig,
                f"{stand.namespace}/extender",
                environment={"NAMESPACE": stand.namespace, "POD_NAME": name},
            )
            for name in names
        ]
        await _label(stand, pods[1])
        async with first:
            async with second:  # ready: its label is off
                await _led_to(stand, "first")
                assert [await _binds(one) for one in (first, second)] == [True, False]
                assert "another replica" in await second.bind(pods[0], "anywhere")

                await first.end(signal.SIGKILL)
                lease = ObjectKey("Lease", stand.namespace, "extender")
                await client.merge_patch(lease, {"spec": {"leaseDurationSeconds": 1}})  # or wait for its 13 s
                await _led_to(stand, "first", "second")
                await completed(first.start)
                await _led_to(stand, "second")
                assert [await _binds(one) for one in (first, second)] == [False, True]
            await _led_to(stand, "first")
        await _led_to(stand)


async def _label(stand: Stand, pod: PodId) -> None:
    await stand.client.merge_patch(key(pod), {"metadata": {"labels": {LABEL: "true"}}})


async def _led_to(stand: Stand, *names: str) -> None:
    """Returns when the Service would select these pods."""

    async def holds() -> bool:
        found = await stand.client.list("Pod", stand.namespace, label_selector=f"{LABEL}=true")
        return sorted(raw["metadata"]["name"] for raw in found.items) == sorted(names)

    await until(holds, f"labelled: {names}")


async def _binds(one: Extender) -> bool:
    said = await completed(page, f"{one.url}/readyz")
    assert said is not None, "it is ready"
    return '"binds":true' in said.replace(" ", "")
