"""Weights and their changes in a real Envoy."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from meshctl.model import LbPolicy, LoadBalancer
from meshctl.sim.envoy import Balancing, EnvoyProcess, balanced, gateway
from tests.harness.envoy import Backends, load, plan, request, require_envoy, route_plan, xds_server

pytestmark = pytest.mark.envoy
SYNC_S = 30.0


@pytest.fixture(autouse=True)
def _envoy() -> None:
    require_envoy()


async def test_requests_follow_the_weights(tmp_path: Path) -> None:
    """700:300:0 in the plan is 70:30:0 of a hundred requests, give or take one."""
    async with Backends(3) as backends, xds_server() as server:
        a, b, c = backends.addresses
        assert server.apply(plan(route_plan("default/r", {a: 700, b: 300, c: 0}))) == 9
        async with EnvoyProcess(tmp_path, gateway(server.address, "gw")) as envoy, aiohttp.ClientSession() as session:
            await server.wait_synced(SYNC_S)
            for _ in range(100):
                assert (await request(session, envoy.url))[0] == 200
            # Envoy begins its schedule anywhere: a request more or less
            assert backends.served == {a: pytest.approx(70, abs=1), b: pytest.approx(30, abs=1)}
            assert envoy.version.startswith("envoy 1.")


async def test_round_robin_follows_the_weights(tmp_path: Path) -> None:
    """The table is in force with the other load balancer too."""
    balancer = LoadBalancer(policy=LbPolicy.ROUND_ROBIN)
    async with Backends(2) as backends, xds_server() as server:
        a, b = backends.addresses
        server.apply(plan(route_plan("default/r", {a: 900, b: 100}, balancer=balancer)))
        async with EnvoyProcess(tmp_path, gateway(server.address, "gw")) as envoy, aiohttp.ClientSession() as session:
            for _ in range(100):
                await request(session, envoy.url)
            assert backends.served == {a: pytest.approx(90, abs=1), b: pytest.approx(10, abs=1)}


async def test_all_zero_and_not_ready(tmp_path: Path) -> None:
    """All-zero weights use the ready endpoints alike; no ready endpoint is a 503 and no missing virtual host."""
    async with Backends(3) as backends, xds_server() as server:
        a, b, c = backends.addresses
        zero = route_plan("default/zero", {a: 0, b: 0, c: 0}, hosts=("zero",), not_ready=(c,))
        none = route_plan("default/none", {a: 500, b: 500}, hosts=("none",), not_ready=(a, b))
        server.apply(plan(zero, none, route_plan("default/empty", {}, hosts=("empty",))))
        async with EnvoyProcess(tmp_path, gateway(server.address, "gw")) as envoy, aiohttp.ClientSession() as session:
            for _ in range(40):
                assert (await request(session, envoy.url, host="zero"))[0] == 200
            assert set(backends.served) == {a, b}
            assert (await request(session, envoy.url, host="none"))[0] == 503
            assert (await request(session, envoy.url, host="empty"))[0] == 503
            assert (await request(session, envoy.url, host="unknown"))[0] == 404


async def test_a_hundred_changes_under_load_fail_no_request(tmp_path: Path) -> None:
    """100 weight changes, each acknowledged, under load: every request is answered, and the last weights hold."""
    async with Backends(3) as backends, xds_server() as server:
        a, b, c = backends.addresses
        server.apply(plan(route_plan("default/r", {a: 500, b: 500, c: 0})))
        async with EnvoyProcess(tmp_path, gateway(server.address, "gw"), concurrency=2) as envoy:
            async with load(envoy.url) as outcome:
                for step in range(100):
                    weights = {a: 1000 - 10 * step, b: 10 * step, c: 5 * (step % 3)}
                    assert server.apply(plan(route_plan("default/r", weights))) == 4
                    await server.wait_synced(SYNC_S)
            assert outcome.failed == 0, outcome.statuses
            assert outcome.statuses[200] > 100
            dump = await envoy.config_dump()
            assert "dynamic_warming_clusters" not in str(dump)


async def test_several_envoys_get_the_same(tmp_path: Path) -> None:
    """Each gateway follows the weights, in either protocol; one that leaves disturbs nobody."""
    async with Backends(2) as backends, xds_server() as server:
        a, b = backends.addresses
        server.apply(plan(route_plan("default/r", {a: 1000, b: 0})))
        async with (
            EnvoyProcess(tmp_path / "1", gateway(server.address, "gw-1")) as one,
            EnvoyProcess(tmp_path / "2", gateway(server.address, "gw-2", delta=True)) as two,
            aiohttp.ClientSession() as session,
        ):
            await server.wait_synced(SYNC_S, proxies=2)
            status = server.status()
            assert [(p.node, p.admin, p.synced) for p in status.proxies] == [
                ("gw-1", one.admin, True),
                ("gw-2", two.admin, True),
            ]
            server.apply(plan(route_plan("default/r", {a: 0, b: 1000})))
            await server.wait_synced(SYNC_S, proxies=2)
            assert {(await request(session, envoy.url))[1] for envoy in (one, two)} == {b}
            await two.stop()
            while len(server.status().proxies) == 2:
                await server.wait_changed()
            server.apply(plan(route_plan("default/r", {a: 1000, b: 0})))
            await server.wait_synced(SYNC_S)
            assert (await request(session, one.url))[1] == a


@pytest.mark.parametrize("balancing", Balancing)
async def test_the_fixed_configurations_serve(tmp_path: Path, balancing: Balancing) -> None:
    """What meshctl is compared with runs in the same Envoy and uses every endpoint."""
    async with (
        Backends(3) as backends,
        EnvoyProcess(tmp_path, balanced(backends.addresses, balancing)) as envoy,
        aiohttp.ClientSession() as session,
    ):
        for _ in range(60):
            assert (await request(session, envoy.url))[0] == 200
        assert set(backends.served) == set(backends.addresses)
