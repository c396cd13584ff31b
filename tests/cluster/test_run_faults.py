"""`meshctl run` on a real cluster of which parts are missing, go away, or answer badly: no request is lost, no weight
moves, nothing is written twice, and people are told."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.cluster.cluster import OUR_CRDS, Cluster, KubectlError
from tests.cluster.world import World, decisions, problems, world
from tests.harness.controller import RunProcess
from tests.harness.tools import completed, page, until

pytestmark = pytest.mark.cluster


async def test_everything_is_missing_or_goes_away_once_and_no_request_is_lost(tmp_path: Path) -> None:
    """Istio comes after the controller; then, under load, the controller, the API server and istiod are killed or
    frozen, one after the other, and what is changed meanwhile is put in force once; last, an object is not valid."""
    async with Cluster(tmp_path / "cluster") as cluster, world(cluster, tmp_path) as here:
        await here.apply(policy="Proportional")
        async with here.controller() as first:
            await _istio_comes_late(here, first)
        async with here.confirming() as second:
            await decisions(second, 4)
            async with here.load() as outcome:
                weights = await here.weights()
                before = await here.istio_versions()
                await second.end(signal.SIGKILL)
                async with here.confirming() as third:
                    await decisions(third, 4)
                    assert await here.istio_versions() == before
                    await _api_server_is_killed(here, third)
                    await _api_server_freezes(here, third)
                    await _istiod_is_killed(here)
                    assert await here.weights() == weights
                    await _object_is_not_valid(here)
                    assert await here.weights() == weights
    assert outcome.failed == 0, outcome.statuses
    assert outcome.statuses[200] > 100


async def _istio_comes_late(here: World, controller: RunProcess) -> None:
    """Without its CRDs the route says what is missing, and the loop goes on; with them it is served."""
    await here.until_condition("Programmed", "False", "Pending")
    said = await here.message("Programmed")
    assert "are Istio's CRDs installed?" in said
    assert "the CRD of serviceentries.networking.istio.io" in said
    await decisions(controller, 4)
    assert await here.conditions() == {**await here.conditions(), "Ready": ("False", "Pending")}
    assert [line for line in controller.lines() if line["event"] == "failed"] == []
    await here.cluster.start_istio()
    await here.served()
    await here.until_condition("Ready", "True")
    assert "istio" not in await problems(controller, lambda said: "istio" not in said)


async def _api_server_is_killed(here: World, controller: RunProcess) -> None:
    """Decisions go on for 10 s, and say what is wrong; then there is nothing to write, until something changes."""
    before = await here.istio_versions()
    await here.cluster.stop_apiserver()
    assert here.cluster.server in await problems(controller, lambda said: "may be behind" in said)
    await decisions(controller, 40)
    await here.cluster.start_apiserver()
    assert await problems(controller, lambda said: not said) == ""
    assert await here.istio_versions() == before
    await _timeout(here, "20s")


async def _api_server_freezes(here: World, controller: RunProcess) -> None:
    """In the moment of a change."""
    await here.patch('{"spec": {"timeout": "21s"}}')
    here.cluster.freeze()
    await decisions(controller, 12)
    here.cluster.thaw()
    await _timeout(here, "21s", patch=False)


async def _istiod_is_killed(here: World) -> None:
    """A change made before it is back arrives in its gateways after it."""
    istiod = here.cluster.istiod
    assert istiod is not None
    await istiod.end(signal.SIGKILL)
    await _timeout(here, "22s")
    await here.cluster.restart_istiod()

    async def arrived() -> bool:
        dumped = await completed(
            page, f"http://{here.cluster.gateway().admin}/config_dump?resource=dynamic_route_configs"
        )
        return '"timeout": "22s"' in (dumped or "")

    await until(arrived, "the gateway has the change")
    await here.until_condition("Programmed", "True", "Acknowledged")


async def _timeout(here: World, timeout: str, *, patch: bool = True) -> None:
    """A change arrives in the VirtualService, by one write, and in nothing else."""
    generation = (await here.get("VirtualService"))["metadata"]["generation"] if patch else 0
    entries = await here.istio_versions("ServiceEntry")
    if patch:
        await here.patch(_json({"spec": {"timeout": timeout}}))

    async def live() -> bool:
        return {rule["timeout"] for rule in (await here.get("VirtualService"))["spec"]["http"]} == {timeout}

    await until(live, f"the VirtualService says {timeout}")
    if patch:
        assert (await here.get("VirtualService"))["metadata"]["generation"] == generation + 1
    assert await here.istio_versions("ServiceEntry") == entries


async def _object_is_not_valid(here: World) -> None:
    """An older schema let it in: its last valid version stays in force, and the route says so, with our schema back as
    well, until it is valid again."""
    crd = await here.cluster.get("crd", "modelroutes.meshctl.io")
    for version in crd["spec"]["versions"]:
        version["schema"]["openAPIV3Schema"]["properties"]["spec"] = {
            "type": "object",
            "x-kubernetes-preserve-unknown-fields": True,
        }
    await here.cluster.kubectl("replace", "--filename=-", stdin=_json(crd))

    async def taken() -> bool:
        try:
            await here.patch('{"spec": {"timeout": "soon"}}')
        except KubectlError:
            return False
        return True

    await until(taken, "the API server takes what the older schema allows")
    before = await here.istio_versions()
    await here.until_condition("Resolved", "False", "InvalidInput")
    assert "the last good version is in force" in await here.message("Resolved")
    assert "timeout" in await here.message("Resolved")
    await here.cluster.kubectl("apply", "--server-side", "--force-conflicts", f"--filename={OUR_CRDS}")
    await here.until_condition("Ready", "True")
    assert await here.istio_versions() == before
    await here.patch('{"spec": {"timeout": "22s"}}')
    await here.until_condition("Resolved", "True")
    assert await here.istio_versions() == before


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
