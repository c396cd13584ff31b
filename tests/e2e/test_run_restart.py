"""`meshctl run` as a process: how it ends, and what an Envoy keeps when it is killed and started again."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import aiohttp
import orjson
import pytest

from meshctl.sim.envoy import EnvoyProcess, gateway
from tests.harness import manifests
from tests.harness.controller import DEADLINE_S, api, run_process
from tests.harness.envoy import Backends, request, require_envoy
from tests.harness.tools import until


def _manifests(directory: Path, addresses: list[str], t4_base: str = "5ms") -> None:
    endpoints = [
        {"address": host, "port": int(port), "metricsPort": int(port), "gpu": ("V100", "T4")[i % 2]}
        for i, (host, _, port) in enumerate(address.rpartition(":") for address in addresses)
    ]
    text = manifests.text(
        manifests.route(backend={"endpoints": endpoints}, expectedLoad=100, guard={"dwell": "1s", "maxStep": 0.02}),
        manifests.profile(),
        manifests.profile("resnet-t4", gpu="T4", service={"base": t4_base, "perItem": "800us"}),
    )
    written = directory / "fleet.tmp"  # not a name that is read: the file appears whole
    written.write_text(text)
    written.rename(directory / "fleet.yaml")


async def _in_force(envoy: EnvoyProcess) -> dict[str, dict[int, int]]:
    """Weight of each port, by cluster, that this Envoy balances by."""
    configs = (await envoy.config_dump())["configs"]
    dump = next(c for c in configs if "EndpointsConfigDump" in c["@type"])
    found = [e["endpoint_config"] for e in dump["dynamic_endpoint_configs"]]
    return {
        c["cluster_name"]: {
            e["endpoint"]["address"]["socket_address"]["port_value"]: e["load_balancing_weight"]
            for locality in c["endpoints"]
            for e in locality["lb_endpoints"]
        }
        for c in found
    }


@pytest.mark.envoy
async def test_a_kill_in_mid_shift_and_a_restart_take_nothing_back(tmp_path: Path) -> None:
    """Envoy keeps at the kill what it had, answers all the time, and after the restart the shift goes on from there.

    That the first decision after a restart moves nothing at all is shown to the integer, step by step, by
    tests/featuretests/test_decide_restart.py; here a second one may follow before anybody can look.
    """
    require_envoy()
    directory, state = tmp_path / "manifests", tmp_path / "state.json"
    directory.mkdir()
    async with Backends(4) as backends, aiohttp.ClientSession() as session:
        _manifests(directory, backends.addresses)
        # a slow tick: the kill falls between two steps of the shift, not between a step and its arrival at Envoy
        async with run_process(directory, state, tmp_path / "1.log", "--tick", "5s") as first:
            port = first.xds.rpartition(":")[2]
            async with EnvoyProcess(tmp_path / "envoy", gateway(first.xds, "gw")) as envoy:
                before = await _in_force(envoy)

                async def moved() -> bool:
                    return await _in_force(envoy) != before

                _manifests(directory, backends.addresses, t4_base="60ms")
                await until(moved, "the first step of the shift in force")
                await first.end(signal.SIGKILL)
                at_the_kill = await _in_force(envoy)
                assert (await request(session, envoy.url, [("x-batch-size", "1")]))[0] == 200
                async with run_process(
                    directory, state, tmp_path / "2.log", "--xds", f"127.0.0.1:{port}", "--tick", "60s"
                ) as second:
                    await api(second, "status", lambda view: any(p["synced"] for p in view["proxies"]))
                    after = await _in_force(envoy)
                    for cluster, weights in at_the_kill.items():
                        for there, weight in weights.items():
                            begun, now = before[cluster][there], after[cluster][there]
                            assert min(begun, now) <= weight <= max(begun, now), (cluster, there, begun, weight, now)
                    assert (await request(session, envoy.url, [("x-batch-size", "1")]))[0] == 200


async def test_a_termination_is_clean_and_keeps_the_state(tmp_path: Path) -> None:
    """SIGTERM: exit 0, the state file is whole, the log ends with it; SIGINT likewise."""
    directory, state = tmp_path / "manifests", tmp_path / "state.json"
    directory.mkdir()
    _manifests(directory, ["127.0.0.1:1", "127.0.0.1:2"])
    for number in (signal.SIGTERM, signal.SIGINT):
        async with run_process(directory, state, tmp_path / "run.log") as controller:
            await api(controller, "routes/default/resnet")
            assert await controller.end(number) == 0
            assert controller.lines()[-1]["event"] == "stopped"
            assert orjson.loads(state.read_bytes())["body"]["routes"].keys() == {"default/resnet"}


@pytest.mark.parametrize("spoilt", ["state file", "directory"])
async def test_a_start_that_cannot_be_exits_2_and_changes_nothing(tmp_path: Path, spoilt: str) -> None:
    """What is wrong, which option, no traceback."""
    directory, state = tmp_path / "manifests", tmp_path / "state.json"
    if spoilt == "state file":
        directory.mkdir()
        state.write_text("{")
    arguments = ["run", "--manifests", str(directory), "--state", str(state), "--xds", "127.0.0.1:0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "meshctl", *arguments, "--admin", "127.0.0.1:0", stderr=asyncio.subprocess.PIPE
    )
    try:
        _, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    last = err.decode().splitlines()[-1]
    assert (process.returncode, "Traceback" in err.decode()) == (2, False)
    assert last.startswith("meshctl: ")
    assert ("--state" if spoilt == "state file" else str(directory)) in last
    assert not state.exists() or state.read_text() == "{"
