"""PrometheusSignals and ScrapeSignals on a real Prometheus and the pages it scrapes: the same numbers, both ways."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from meshctl.adapters.prometheus import PrometheusSignals
from meshctl.adapters.scrape import ScrapeSignals
from meshctl.controller.clock import MonotonicClock
from meshctl.model import DesiredRoute, EndpointSignals, RouteSignals, Signal
from meshctl.ports import Observed, SignalSource
from tests.harness.pages import Pages, http, route, server
from tests.harness.prometheus import PrometheusProcess
from tests.harness.tools import until

pytestmark = pytest.mark.prometheus

RATE_RPS = 40.0
ADDRESS = "127.0.0.1:8000"
POLL_DEADLINE_S = 20.0
SCRAPE_S, WINDOW_S = 0.25, 3.0
RELATIVE = 0.4
"""Of rates: a page is made some time after Prometheus looks at its clock. A wrong formula is off by two or more."""


class Exporters:
    """Triton's, DCGM's and a proxy's pages of one endpoint that has served RATE_RPS since it was started."""

    def __init__(self) -> None:
        self.started_s = time.monotonic()
        self.history = 0.0
        """Requests counted before."""
        self.down = False

    def restart(self) -> None:
        self.started_s, self.history = time.monotonic(), 0.0

    @property
    def served(self) -> float:
        return self.history + RATE_RPS * (time.monotonic() - self.started_s)

    def server(self, path: str) -> bytes:
        if self.down:
            return http("starting", 503)
        n, labels = self.served, '{model="resnet50",version="1"}'
        other = '{model="bert",version="1"}'
        return http(
            f"nv_inference_request_success{labels} {n}\n"
            f"nv_inference_request_success{other} {7 * n}\n"
            f'nv_inference_request_failure{{model="resnet50",reason="BACKEND",version="1"}} {n / 10}\n'
            f'nv_inference_request_failure{{model="resnet50",reason="OTHER",version="1"}} {n / 10}\n'
            f"nv_inference_count{labels} {8 * n}\n"
            f"nv_inference_exec_count{labels} {n / 2}\n"
            f"nv_inference_queue_duration_us{labels} {3000 * n}\n"
            f"nv_inference_compute_input_duration_us{labels} {500 * n}\n"
            f"nv_inference_compute_infer_duration_us{labels} {19000 * n}\n"
            f"nv_inference_compute_output_duration_us{labels} {500 * n}\n"
            f"nv_inference_pending_request_count{labels} 6\n"
            'nv_gpu_utilization{gpu_uuid="GPU-1"} 0.99\n'
        )

    def dcgm(self, path: str) -> bytes:
        return http(
            'DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",UUID="GPU-1"} 9223372036854775794\n'
            'DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-1"} 63\n'
        )

    def proxy(self, path: str) -> bytes:
        lines = []
        for size, share in (("small", 0.75), ("large", 0.25)):
            cluster = f'envoy_cluster_name="demo/resnet/{size}"'
            at = f'{{{cluster},envoy_endpoint_address="{ADDRESS}"}}'
            n = share * self.served
            lines += [
                f"envoy_cluster_upstream_rq_total{{{cluster}}} {n}",
                f"envoy_cluster_endpoint_rq_success{at} {n}",
                f"envoy_cluster_endpoint_rq_error{at} {n / 10}",
                f"envoy_cluster_endpoint_rq_active{at} 2",
            ]
        lines.append(f'envoy_cluster_upstream_rq_total{{envoy_cluster_name="outbound|80||web"}} {9 * self.served}')
        lines += self.gateway()
        return http("\n".join(lines) + "\n")

    def gateway(self) -> list[str]:
        """As an Istio gateway writes it: each size class of a route is seen in another of its statistics."""
        n, host = self.served, "{}.r.one.team.sizes.meshctl.internal"
        at = f'{{envoy_cluster_name="outbound|80||{host.format("large")};",envoy_endpoint_address="{ADDRESS}"}}'
        standard = (
            'source_workload="istio-ingressgateway",source_workload_namespace="istio-system",'
            'destination_workload="unknown",destination_service_name="{0}",destination_service="{0}",'
            'destination_service_namespace="team",request_protocol="http",response_code="200",response_flags="-",'
            'connection_security_policy="unknown"'
        ).format(host.format("default"))
        return [
            f'envoy_cluster_upstream_rq_total{{cluster_name="outbound|80||{host.format("small")}"}} {n / 2}',
            f'envoy_cluster_upstream_rq_total{{cluster_name="outbound|443||kubernetes.default.svc.cluster.local"}} {n}',
            f"envoy_cluster_endpoint_rq_total{at} {n / 4}",
            f"envoy_cluster_endpoint_rq_success{at} {n / 4}",
            f"envoy_cluster_endpoint_rq_error{at} 0",
            f"envoy_cluster_endpoint_rq_active{at} 3",
            f'istio_requests_total{{reporter="source",{standard}}} {n / 8}',
            f'istio_requests_total{{reporter="destination",{standard}}} {7 * n}',
        ]


class World:
    """The exporters on sockets, twice a proxy, and the route that they tell of."""

    def __init__(self, exporters: Exporters, pages: dict[str, Pages], prometheus: PrometheusProcess) -> None:
        self.exporters, self.prometheus = exporters, prometheus
        self.metrics = pages["server"].address
        self.proxies = (pages["proxy"].address, pages["proxy2"].address)
        self.dcgm = pages["dcgm"].address
        self.route: DesiredRoute = route(server(self.metrics, ADDRESS, gpu_uuid="GPU-1"))
        behind_istio = route(server("", ADDRESS), name="team/r.one")
        self.meshed = replace(behind_istio, spec=replace(behind_istio.spec, gateways=("istio-system/gateway",)))

    async def poll(self, source: SignalSource) -> tuple[RouteSignals, EndpointSignals, Observed]:
        observed = await source.poll({r.spec.id: r for r in (self.route, self.meshed)}, self.proxies, POLL_DEADLINE_S)
        found = observed.routes[self.route.spec.id]
        return found, found.endpoints[self.route.endpoints[0].id], observed


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = Exporters()
    async with (
        Pages(made.server) as triton,
        Pages(made.dcgm) as dcgm,
        Pages(made.proxy) as proxy,
        Pages(made.proxy) as proxy2,
        PrometheusProcess(
            tmp_path,
            {"triton": [triton.address], "dcgm": [dcgm.address], "envoy": [proxy.address, proxy2.address]},
            SCRAPE_S,
        ) as prometheus,
    ):
        pages = {"server": triton, "dcgm": dcgm, "proxy": proxy, "proxy2": proxy2}
        await prometheus.until("count(count_over_time(nv_inference_request_success[3s]) > 9) >= 2")
        await prometheus.until("count(count_over_time(envoy_cluster_endpoint_rq_success[3s]) > 9) >= 4")
        yield World(made, pages, prometheus)


def assert_numbers(found: RouteSignals, endpoint: EndpointSignals) -> None:
    """The signals are what Exporters does. Rates are within what the times of scrapes leave open."""
    assert endpoint.service_s.value == pytest.approx(0.020)
    assert endpoint.queue_s.value == pytest.approx(0.003)
    assert endpoint.batch.value == pytest.approx(8.0)
    assert endpoint.pending.value == 6.0
    assert endpoint.gpu_utilization_ratio.value == pytest.approx(0.63)
    assert endpoint.busy_ratio.value == pytest.approx(RATE_RPS * 0.019 / 2, rel=RELATIVE)
    assert endpoint.completed_rps.value == pytest.approx(RATE_RPS, rel=RELATIVE)
    assert endpoint.failed_rps.value == pytest.approx(0.2 * RATE_RPS, rel=RELATIVE)
    assert endpoint.proxy_rps.value == pytest.approx(2 * 1.1 * RATE_RPS, rel=RELATIVE)
    assert endpoint.proxy_failed_rps.value == pytest.approx(2 * 0.1 * RATE_RPS, rel=RELATIVE)
    assert endpoint.proxy_active.value == 8.0
    assert found.arrivals_rps["small"].value == pytest.approx(2 * 0.75 * RATE_RPS, rel=RELATIVE)
    assert found.arrivals_rps["large"].value == pytest.approx(2 * 0.25 * RATE_RPS, rel=RELATIVE)
    assert found.arrivals_rps["default"] is Signal.ABSENT


def assert_gateways_numbers(found: RouteSignals, standard_rps: float | None) -> None:
    """The same of the route behind Istio; two gateways, each with a part of the requests of each size class."""
    (endpoint,) = found.endpoints.values()
    assert endpoint.proxy_active.value == 6.0
    assert endpoint.proxy_rps.value == pytest.approx(RATE_RPS / 2, rel=RELATIVE)
    assert found.arrivals_rps["small"].value == pytest.approx(RATE_RPS, rel=RELATIVE)
    assert found.arrivals_rps["large"].value == pytest.approx(RATE_RPS / 2, rel=RELATIVE)
    if standard_rps is None:
        assert found.arrivals_rps["default"] is Signal.ABSENT
    else:
        assert found.arrivals_rps["default"].value == pytest.approx(standard_rps, rel=RELATIVE)


async def test_prometheus_and_scrape_say_the_same(world: World) -> None:
    """All twelve signals have the right values both ways, behind Istio too, and none a Problem but DCGM's sentinel."""
    clock = MonotonicClock()
    ways: list[SignalSource] = [
        PrometheusSignals(world.prometheus.url, clock, WINDOW_S),
        ScrapeSignals(clock, exporters=(world.dcgm,), timeout_s=POLL_DEADLINE_S),
    ]
    for source, standard_rps in zip(ways, (RATE_RPS / 4, None), strict=True):
        await world.poll(source)

        async def spans_two_seconds(source: SignalSource = source, since_s: float = clock.now_s()) -> bool:
            return clock.now_s() - since_s > 2.0

        await until(spans_two_seconds, "two seconds between the pages")
        found, endpoint, observed = await world.poll(source)
        assert_numbers(found, endpoint)
        assert_gateways_numbers(observed.routes[world.meshed.spec.id], standard_rps)
        assert [p.message for p in observed.problems if "DCGM_FI_PROF_GR_ENGINE_ACTIVE" not in p.message] == []
        assert endpoint.pending.at_s is not None
        assert endpoint.pending.at_s <= clock.now_s()
        await source.stop()


async def test_a_target_that_is_down_ages(world: World) -> None:
    """Prometheus cannot scrape the server: its signals stay with their time, the proxies' are new; then it recovers."""
    source = PrometheusSignals(world.prometheus.url, MonotonicClock(), WINDOW_S)
    _, before, _ = await world.poll(source)
    assert before.pending.value == 6.0
    world.exporters.down = True
    await world.prometheus.until('up{job="triton"} == 0')
    _, down, _ = await world.poll(source)
    assert down.pending.value == 6.0
    assert down.service_s.value == pytest.approx(0.020)
    held = down.pending.at_s
    await world.prometheus.until('sum_over_time((1 - up{job="triton"})[2s:250ms]) >= 6')
    _, later, _ = await world.poll(source)
    assert later.pending == Signal(6.0, held)
    assert later.proxy_active.at_s is not None
    assert held is not None
    assert later.proxy_active.at_s > held
    world.exporters.down = False
    await world.prometheus.until('up{job="triton"} == 1')
    _, back, _ = await world.poll(source)
    assert back.pending.at_s is not None
    assert back.pending.at_s > held
    await source.stop()


async def test_a_restart_is_no_negative_or_absurd_rate(world: World) -> None:
    """Counters that fall from a million to 0 keep the rate where it is."""
    world.exporters.history = 1e6
    source = PrometheusSignals(world.prometheus.url, MonotonicClock(), WINDOW_S)
    await world.prometheus.until('min_over_time(nv_inference_request_success{model="resnet50"}[3s]) > 1e6')
    world.exporters.restart()
    await world.prometheus.until('resets(nv_inference_request_success{model="resnet50"}[3s]) == 1')
    _, endpoint, _ = await world.poll(source)
    assert endpoint.completed_rps.value is not None
    assert 0.5 * RATE_RPS < endpoint.completed_rps.value < 1.5 * RATE_RPS
    assert endpoint.service_s.value == pytest.approx(0.020)
    await source.stop()


async def test_a_frozen_prometheus_leaves_the_last_signals(world: World) -> None:
    """It hangs: the poll ends by its deadline with the last signals; it goes on: so do they."""
    source = PrometheusSignals(world.prometheus.url, MonotonicClock(), WINDOW_S)
    _, before, _ = await world.poll(source)
    world.prometheus.freeze()
    routes = {world.route.spec.id: world.route}
    frozen = await source.poll(routes, (), 1.0)
    assert frozen.routes[world.route.spec.id].endpoints[world.route.endpoints[0].id] == before
    assert any("in time" in problem.message for problem in frozen.problems)
    world.prometheus.thaw()
    _, after, observed = await world.poll(source)
    assert after.pending.value == 6.0
    assert [p for p in observed.problems if "DCGM" not in p.message] == []
    await source.stop()
