"""Make before break, restarts and faults, under load through a real Envoy."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import aiohttp
import pytest
from envoy_data_plane.envoy.config.cluster.v3 import Cluster

from meshctl.errors import MeshctlError
from meshctl.model import RouteId, SizeClass
from meshctl.sim.envoy import EnvoyProcess, gateway
from tests.harness.envoy import SIZES, Backends, load, plan, request, require_envoy, route_plan, xds_server
from xds.translate import Resources, cluster, translate

pytestmark = pytest.mark.envoy
SYNC_S = 30.0


@pytest.fixture(autouse=True)
def _envoy() -> None:
    require_envoy()


@pytest.fixture(params=[False, True], ids=["state of the world", "delta"])
def delta(request: pytest.FixtureRequest) -> bool:
    """Which protocol the Envoy speaks."""
    return bool(request.param)


async def counter(envoy: EnvoyProcess, pattern: str) -> dict[str, int]:
    """Envoy's counters whose names match `pattern`."""
    lines = (await envoy.get(f"/stats?filter={pattern}")).splitlines()
    return {name: int(value) for name, _, value in (line.partition(": ") for line in lines)}


async def test_routes_come_and_go_under_load(tmp_path: Path, delta: bool) -> None:
    """Routes are added, get other size classes (other clusters) and are removed: no request of any host fails."""
    async with Backends(2) as backends, xds_server() as server:
        a, b = backends.addresses
        stable = route_plan("default/stable", {a: 1000}, hosts=("stable",))
        other = (SizeClass("one", 1, 1, 1, 0.5), SizeClass("rest", 2, 128, 64, 0.5))
        server.apply(plan(stable))
        async with (
            EnvoyProcess(tmp_path, gateway(server.address, "gw", delta=delta), concurrency=2) as envoy,
            aiohttp.ClientSession() as session,
            load(envoy.url, workers=4, host="stable") as outcome,
        ):
            for step in range(10):
                sizes = SIZES if step % 2 else other
                server.apply(plan(stable, route_plan("default/new", {b: 1000}, hosts=("new",), sizes=sizes)))
                await server.wait_synced(SYNC_S)
                assert await request(session, envoy.url, [("x-batch-size", "1")], host="new") == (200, b)
                async with load(envoy.url, workers=4, host="new") as moving:
                    changed = SIZES if sizes is other else other
                    server.apply(plan(stable, route_plan("default/new", {b: 1000}, hosts=("new",), sizes=changed)))
                    await server.wait_synced(SYNC_S)
                assert moving.failed == 0, moving.statuses
                server.apply(plan(stable))
                await server.wait_synced(SYNC_S)
                assert (await request(session, envoy.url, host="new"))[0] == 404
            names = set(re.findall(r"default/\w+/\w+", await envoy.get("/clusters")))
            assert {name.split("/")[1] for name in names} == {"stable"}, "removed clusters are pruned"
        assert outcome.failed == 0, outcome.statuses


async def test_a_restart_of_the_server_moves_and_resends_nothing(tmp_path: Path, delta: bool) -> None:
    """The Envoy serves while the server is away; the same plan from a new server is no update at all."""
    async with Backends(2) as backends:
        a, b = backends.addresses
        route = route_plan("default/r", {a: 600, b: 400})
        async with xds_server() as server:
            server.apply(plan(route))
            address, port = server.address, server.port
            async with EnvoyProcess(tmp_path, gateway(address, "gw", delta=delta)) as envoy:
                await server.wait_synced(SYNC_S)
                assert [s.protocol for s in server.streams()] == ["delta" if delta else "sotw"]
                before = await counter(envoy, "update_success|update_attempt")
                async with load(envoy.url, workers=2) as outcome:
                    await server.stop()
                    async with xds_server(port) as second:
                        # Connected, but silent until it knows a plan: "nothing" is no plan.
                        while not second.status().proxies:
                            await asyncio.wait_for(second.wait_changed(), SYNC_S)
                        second.apply(plan(replace(route)))
                        await second.wait_synced(SYNC_S)
                        after = await counter(envoy, "update_success|update_attempt")
                        success = {name for name in before if "success" in name and after[name] != before[name]}
                        assert success == set()
                        second.apply(plan(route_plan("default/r", {a: 400, b: 600})))
                        await second.wait_synced(SYNC_S)
                assert outcome.failed == 0, outcome.statuses


async def test_an_envoy_that_starts_first_waits_for_its_routes(tmp_path: Path, delta: bool) -> None:
    """Without a control plane it is not ready, and takes no request that it could only answer 404; then it serves."""
    async with Backends(1) as backends:
        (a,) = backends.addresses
        async with xds_server() as gone:
            port = gone.port
        async with (
            EnvoyProcess(tmp_path, gateway(f"127.0.0.1:{port}", "gw", delta=delta), wait_ready=False) as envoy,
            aiohttp.ClientSession() as session,
        ):
            with pytest.raises(MeshctlError, match="answers 503"):
                await envoy.get("/ready")
            async with xds_server(port) as server:
                server.apply(plan(route_plan("default/r", {a: 1000})))
                await envoy.wait_ready()
                assert await request(session, envoy.url) == (200, a)


async def test_an_envoy_that_is_killed_in_mid_push_comes_back(tmp_path: Path, delta: bool) -> None:
    """Its successor gets everything; the server notices that it went."""
    async with Backends(2) as backends, xds_server() as server:
        a, b = backends.addresses
        server.apply(plan(route_plan("default/r", {a: 1000})))
        async with EnvoyProcess(tmp_path / "1", gateway(server.address, "gw", delta=delta)) as envoy:
            await server.wait_synced(SYNC_S)
            server.apply(plan(route_plan("default/r", {b: 1000}), route_plan("default/s", {b: 1000}, hosts=("s",))))
            os.kill(envoy.pid, signal.SIGKILL)
            async with asyncio.timeout(SYNC_S):
                while server.status().proxies:
                    await server.wait_changed()
        async with (
            EnvoyProcess(tmp_path / "2", gateway(server.address, "gw", delta=delta)) as again,
            aiohttp.ClientSession() as session,
        ):
            await server.wait_synced(SYNC_S)
            assert await request(session, again.url) == (200, b)


async def test_a_refused_route_goes_back_to_its_last_good_state(tmp_path: Path, delta: bool) -> None:
    """A cluster that Envoy refuses is quarantined with Envoy's words; its route keeps serving, the others move on."""
    async with Backends(2) as backends, xds_server() as server:
        a, b = backends.addresses
        good = plan(route_plan("default/bad", {a: 1000}, hosts=("bad",)), route_plan("default/ok", {a: 1000}))
        server.apply(good)
        async with (
            EnvoyProcess(tmp_path, gateway(server.address, "gw", delta=delta)) as envoy,
            aiohttp.ClientSession() as session,
        ):
            await server.wait_synced(SYNC_S)
            moved = plan(route_plan("default/bad", {b: 1000}, hosts=("bad",)), route_plan("default/ok", {b: 1000}))
            server.publish(spoiled(translate(moved), RouteId("default/bad")))
            while not server.status().quarantined:
                await asyncio.wait_for(server.wait_changed(), SYNC_S)
            await server.wait_synced(SYNC_S)
            quarantined = server.status().quarantined
            assert list(quarantined) == ["default/bad"]
            assert quarantined[RouteId("default/bad")].startswith("gw: ")
            assert await request(session, envoy.url, host="bad") == (200, a)
            assert await request(session, envoy.url, host="ok") == (200, b)
            refused = await counter(envoy, "cluster_manager.cds.update_rejected")
            assert server.publish(spoiled(translate(moved), RouteId("default/bad"))) == 0
            await server.wait_synced(SYNC_S)
            assert await counter(envoy, "cluster_manager.cds.update_rejected") == refused
            server.apply(moved)
            await server.wait_synced(SYNC_S)
            assert await request(session, envoy.url, host="bad") == (200, b)
            assert server.status().quarantined == {}


def spoiled(resources: Resources, route: RouteId) -> Resources:
    """`resources` with one cluster of `route` that Envoy refuses: no name of a service, no type, a negative timeout."""
    bundle = resources.routes[route]
    name = next(iter(bundle.clusters))
    bad = cluster(route, name, bytes(Cluster(connect_timeout=timedelta(seconds=-1))))
    return Resources({**resources.routes, route: replace(bundle, clusters={**bundle.clusters, name: bad})})
