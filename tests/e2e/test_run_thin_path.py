"""The thin path: one manifest, two servers, one controller process, one real Envoy, one request."""

from __future__ import annotations

import signal
from pathlib import Path

import aiohttp
import pytest

from meshctl.sim.envoy import EnvoyProcess, gateway
from tests.harness import manifests
from tests.harness.controller import api, run_process
from tests.harness.envoy import Backends, request, require_envoy

pytestmark = pytest.mark.envoy


async def test_a_request_is_answered_through_envoy_and_still_is_when_the_controller_has_gone(tmp_path: Path) -> None:
    """Manifest -> decision -> Envoy -> server; the controller's end takes nothing away."""
    require_envoy()
    directory = tmp_path / "manifests"
    directory.mkdir()
    async with Backends(2) as backends, aiohttp.ClientSession() as session:
        endpoints = [
            {"address": host, "port": int(port), "metricsPort": int(port), "gpu": "V100"}
            for host, _, port in (address.rpartition(":") for address in backends.addresses)
        ]
        text = manifests.text(manifests.route(backend={"endpoints": endpoints}), manifests.profile())
        (directory / "fleet.yaml").write_text(text)
        async with (
            run_process(directory, tmp_path / "state.json", tmp_path / "run.log") as controller,
            EnvoyProcess(tmp_path / "envoy", gateway(controller.xds, "gw")) as envoy,
        ):
            status, body = await request(session, envoy.url, [("x-batch-size", "1")])
            assert (status, body in backends.addresses) == (200, True)
            view = await api(
                controller, "routes/default/resnet", lambda view: view["conditions"][0]["status"] == "True"
            )
            assert {endpoint["endpoint"] for endpoint in view["endpoints"]} == set(backends.addresses)
            assert await controller.end(signal.SIGTERM) == 0
            for _ in range(10):
                assert (await request(session, envoy.url, [("x-batch-size", "1")]))[0] == 200
