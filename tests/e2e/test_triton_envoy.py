"""What both sources of signals see of a real Envoy, driven by our xDS server, in front of real Tritons."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from meshctl.adapters.prometheus import PrometheusSignals
from meshctl.adapters.scrape import ScrapeSignals
from meshctl.controller.clock import MonotonicClock
from meshctl.model import DesiredRoute, EndpointId, RouteSignals, Signal
from meshctl.ports import SignalSource
from meshctl.sim.envoy import EnvoyProcess, gateway
from tests.harness.envoy import plan, require_envoy, route_plan, xds_server
from tests.harness.pages import route, server
from tests.harness.prometheus import PrometheusProcess
from tests.harness.tools import DEADLINE_S, until
from tests.harness.triton import TritonModel, TritonProcess, infer_body

pytestmark = [pytest.mark.envoy, pytest.mark.triton]

MODEL = TritonModel(base_s=0.002, per_item_s=0.0001)


class Mesh:
    """One Envoy in front of Tritons, and the route that names them."""

    def __init__(self, tritons: Sequence[TritonProcess], envoy: EnvoyProcess) -> None:
        self.tritons, self.envoy = tritons, envoy
        self.route = route_of(tritons)

    async def send(self, count: int, batch: int) -> list[int]:
        """Requests of `batch` one after the other; their statuses."""
        url = f"{self.envoy.url}/v2/models/{MODEL.name}/infer"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S)) as session:
            statuses = []
            for _ in range(count):
                headers = {"x-batch-size": str(batch)}
                async with session.post(url, data=infer_body(batch), headers=headers) as response:
                    statuses.append(response.status)
            return statuses

    async def poll(self, source: SignalSource) -> RouteSignals:
        observed = await source.poll({self.route.spec.id: self.route}, (self.envoy.admin,), 20.0)
        return observed.routes[self.route.spec.id]


def route_of(tritons: Sequence[TritonProcess]) -> DesiredRoute:
    return route(*(server(t.metrics, t.address) for t in tritons), model=MODEL.name)


@asynccontextmanager
async def mesh(tmp_path: Path, weights: Sequence[int]) -> AsyncIterator[Mesh]:
    """As many Tritons as `weights`, each with its weight for every size."""
    require_envoy()
    tritons = [TritonProcess(tmp_path / f"triton-{i}", MODEL) for i in range(len(weights))]
    try:
        await asyncio.gather(*(t.__aenter__() for t in tritons))
        table = {t.address: weight for t, weight in zip(tritons, weights, strict=True)}
        desired = route_of(tritons)
        decided = replace(route_plan(desired.spec.id, table, sizes=desired.spec.sizes), route=desired)
        async with xds_server() as xds:
            xds.apply(plan(decided))
            async with EnvoyProcess(tmp_path / "envoy", gateway(xds.address, "gw")) as envoy:
                await xds.wait_synced(DEADLINE_S)
                yield Mesh(tritons, envoy)
    finally:
        await asyncio.gather(*(t.end() for t in tritons))


@pytest.mark.alone
async def test_arrivals_and_ends_are_what_was_sent(tmp_path: Path) -> None:
    """30 small and 10 large requests at 3:1: arrivals by size, ends by endpoint, and what each Triton completed."""
    async with mesh(tmp_path, (750, 250)) as of:
        source = ScrapeSignals(MonotonicClock(), 60.0, timeout_s=20.0)
        await of.poll(source)
        assert set(await of.send(30, 1) + await of.send(10, 64)) == {200}
        found = await of.poll(source)
        await source.stop()
        small, large = (found.arrivals_rps[size].value or 0 for size in ("small", "large"))
        assert small > 0
        assert large == pytest.approx(small / 3)
        assert found.arrivals_rps["default"].value == 0.0
        one, two = (found.endpoints[EndpointId(t.address)] for t in of.tritons)
        ends = [one.proxy_rps.value or 0, two.proxy_rps.value or 0]
        assert sum(ends) == pytest.approx(small + large)
        assert ends[0] == pytest.approx(3 * ends[1], rel=0.4), "10 at 3:1 is 7:3 or 8:2"
        for seen in (one, two):
            assert seen.completed_rps.value == pytest.approx(seen.proxy_rps.value, rel=0.2)
            assert seen.proxy_failed_rps.value == 0.0
            assert seen.proxy_active.value == 0.0


async def test_a_hung_triton_shows_at_the_proxy_alone(tmp_path: Path) -> None:
    """A frozen Triton says nothing: its own signals age, those in flight at the proxy count up; the other's go on."""
    async with mesh(tmp_path, (500, 500)) as of:
        source = ScrapeSignals(MonotonicClock(), 60.0, timeout_s=1.0)
        await of.send(4, 1)
        await of.poll(source)
        of.tritons[0].freeze()
        sending = [asyncio.create_task(of.send(1, 1)) for _ in range(10)]
        hung, healthy = (EndpointId(t.address) for t in of.tritons)

        async def some_hang() -> bool:
            return ((await of.poll(source)).endpoints[hung].proxy_active.value or 0) > 0

        await until(some_hang, "some of ten requests hang")
        held = await of.poll(source)

        async def its_signals_age() -> bool:
            """A page may still be under way when the process is stopped: what stays is what comes after."""
            nonlocal held
            before, held = held, await of.poll(source)
            return held.endpoints[hung].pending == before.endpoints[hung].pending

        await until(its_signals_age, "the hung server's signals stay as they are")
        found = await of.poll(source)
        assert found.endpoints[hung].pending == held.endpoints[hung].pending
        assert found.endpoints[healthy].pending.at_s != held.endpoints[healthy].pending.at_s
        of.tritons[0].thaw()
        assert len(await asyncio.gather(*sending)) == 10, "answered in the end, well or ill"
        await source.stop()


@pytest.mark.prometheus
async def test_a_dead_triton_shows_as_failures_by_both_ways(tmp_path: Path) -> None:
    """Connections refused count as ends that failed, though Envoy's rq_total leaves them out."""
    async with mesh(tmp_path, (500, 500)) as of:
        jobs = {"triton": [t.metrics for t in of.tritons], "envoy": [of.envoy.admin]}
        async with PrometheusProcess(tmp_path / "prometheus", jobs, 0.25) as prometheus:
            clock = MonotonicClock()
            direct = ScrapeSignals(clock, 60.0, timeout_s=1.0)
            through = PrometheusSignals(prometheus.url, clock, 60.0)
            await of.send(4, 1)
            await prometheus.until("count(count_over_time(envoy_cluster_endpoint_rq_error[60s]) > 2) > 0")
            await of.poll(direct)
            await of.tritons[0].end()
            await of.send(20, 1)
            dead, alive = (EndpointId(t.address) for t in of.tritons)
            await prometheus.until("sum(increase(envoy_cluster_endpoint_rq_error[60s])) > 0")
            for source in (direct, through):
                found = (await of.poll(source)).endpoints
                assert (found[dead].proxy_failed_rps.value or 0) > 0
                assert found[alive].proxy_failed_rps.value == 0.0
                assert (found[alive].proxy_rps.value or 0) > 0
                assert found[dead].pending.value in (0.0, None), "held, or never seen"
                assert found[alive].pending != Signal.ABSENT
                await source.stop()
