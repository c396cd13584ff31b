"""The whole product on this machine: Kubernetes, Istio with a gateway, a simulated fleet, Prometheus, and meshctl.

Real are the API server, istiod, the Envoy, Prometheus and the controller; simulated is what the GPUs do.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from meshctl.sim.children import Controller
from meshctl.sim.envoy import Balancing
from meshctl.sim.fleet import FleetProcess
from meshctl.sim.reference import fleet_config, manifests
from meshctl.sim.versus import MESHCTL, Say, Stand
from tests.cluster.cluster import GATEWAY, Cluster
from tests.harness.prometheus import PrometheusProcess

HOST = "resnet50.example"
BEFORE_HOST = "istio-default.example"
STATS = Path(__file__).parents[2] / "deploy" / "istio" / "stats.yaml"
"""The EnvoyFilter that makes a gateway count requests by endpoint."""
SCRAPE_S = 1.0


@dataclass
class Local:
    """What runs."""

    cluster: Cluster
    fleet: FleetProcess
    controller: Controller
    prometheus: PrometheusProcess

    @property
    def ends(self) -> list[Callable[[], Awaitable[str]]]:
        """Each returns, with words, when its process ends."""
        return [self.fleet.ended, self.controller.ended]


@asynccontextmanager
async def local(directory: Path, say: Say = lambda _: None, **spec: Any) -> AsyncIterator[Local]:
    """Everything started in `directory`, the reference route (with `spec` on top) and its baseline applied.

    `HOST` is served by meshctl, `BEFORE_HOST` by the same endpoints as Istio does by default.
    """
    async with AsyncExitStack() as stack:
        say("starting Kubernetes, Istio and its gateway")
        cluster = await stack.enter_async_context(Cluster(directory, istio=True))
        await cluster.apply(STATS)
        say("starting the simulated fleet: 12 GPU servers that speak Triton's protocol")
        fleet = await stack.enter_async_context(FleetProcess(fleet_config()))
        metrics = [f"{server.address}:{server.metrics_port}" for server in fleet.info.servers]
        jobs = {"triton": metrics, "envoy": [cluster.gateway().admin]}
        say("starting Prometheus and meshctl")
        prometheus = await stack.enter_async_context(PrometheusProcess(directory / "prometheus", jobs, SCRAPE_S))
        source = ("--kubeconfig", cluster.kubeconfig, "--istio", "--istiod", cluster.istiod_debug)
        controller = await stack.enter_async_context(Controller(directory, source, prometheus.url))
        await cluster.apply(manifests(fleet.info.servers, hosts=[HOST], gateways=[GATEWAY], **spec), *_baseline(fleet))
        yield Local(cluster, fleet, controller, prometheus)


@asynccontextmanager
async def cluster_stand(rate_rps: float, say: Say, **spec: Any) -> AsyncIterator[Stand]:
    """`local` as a stand on which Istio's default and meshctl meet, both through the one gateway."""
    with TemporaryDirectory(prefix="meshctl-cluster-") as directory:
        async with local(Path(directory), say, **spec) as running:
            before, url = str(Balancing.ISTIO_DEFAULT), running.cluster.gateway().url
            yield Stand(
                running.fleet,
                running.controller,
                {before: url, MESHCTL: url},
                f"Envoy, configured by istiod ({spec.get('mechanism', 'Endpoints')})",
                rate_rps,
                hosts={before: BEFORE_HOST, MESHCTL: HOST},
                ends=running.ends,
            )


def _baseline(fleet: FleetProcess) -> list[dict[str, Any]]:
    """All servers behind one host, with nothing said about how to balance."""
    kind = {"apiVersion": "networking.istio.io/v1", "metadata": {"name": "istio-default", "namespace": "default"}}
    endpoints = [{"address": server.address, "ports": {"http": server.port}} for server in fleet.info.servers]
    host = "all.istio-default.internal"
    entry = {
        "hosts": [host],
        "location": "MESH_INTERNAL",
        "resolution": "STATIC",
        "ports": [{"number": 80, "name": "http", "protocol": "HTTP"}],
        "endpoints": endpoints,
    }
    http = [{"route": [{"destination": {"host": host}}], "timeout": "30s"}]
    service = {"hosts": [BEFORE_HOST], "gateways": [GATEWAY], "http": http}
    return [kind | {"kind": "ServiceEntry", "spec": entry}, kind | {"kind": "VirtualService", "spec": service}]
