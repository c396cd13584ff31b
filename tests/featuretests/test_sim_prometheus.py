"""A real Prometheus scrapes the simulated fleet and understands all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshctl.sim.faults import Faults
from tests.harness import fleet as harness
from tests.harness.prometheus import PrometheusProcess

pytestmark = pytest.mark.prometheus


async def test_prometheus_scrapes_every_series_and_sees_a_crash(tmp_path: Path) -> None:
    """Counters, gauges and labels arrive as they are; a crashed server is down, back up its counters are reset."""
    servers = {"gpu": "V100", "count": 2, "service": {"base": "1ms", "perItem": "0s"}, "metricsPort": 0}
    async with harness.running(harness.config(servers)) as (fleet, [client, other]):
        targets = [f"127.0.0.1:{c.server.metrics_port}" for c in (client, other)]
        instance = f'{{instance="{targets[0]}"}}'
        async with PrometheusProcess(tmp_path, {"triton": targets}) as prometheus:
            for _ in range(5):
                await client.infer(headers={"x-batch-size": "8"})
            await fleet.set_faults("v100-0", Faults(foreign_ratio=0.25))

            await prometheus.until(f"nv_inference_count{instance} == 40")
            await prometheus.until(f"nv_inference_request_success{instance} == 5")
            await prometheus.until(f"nv_inference_compute_infer_duration_us{instance} > 4000")
            await prometheus.until(f'DCGM_FI_DEV_GPU_UTIL{{UUID="{client.server.gpu_uuid}"}} == 25')
            await prometheus.until("count(nv_gpu_utilization) == 2")
            await fleet.set_faults("v100-0", Faults(crash=True))
            await prometheus.until(f"up{instance} == 0")
            await fleet.set_faults("v100-0", Faults())
            await prometheus.until(f"up{instance} == 1 and on(instance) resets(nv_inference_count{instance}[5m]) == 1")
            assert await prometheus.value(f'sum(up{{instance="{targets[1]}"}})') == 1
