"""ScrapeSignals on a real Envoy whose clusters have Istio's names, with stock tags and with Istio's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from istio.names import size_host, subsets_host
from meshctl.adapters.scrape import ScrapeSignals
from meshctl.address import Address
from meshctl.controller.clock import MonotonicClock
from meshctl.model import DEFAULT_CLASS, DesiredRoute, RouteId, Signal, cluster_name
from meshctl.sim.envoy import EnvoyProcess
from tests.cluster.processes import ISTIO_TAGS
from tests.harness.envoy import require_envoy
from tests.harness.pages import route, server
from xds.bootstrap import base, listener, static_assignment

pytestmark = pytest.mark.envoy

ENDPOINT = Address("127.0.0.1", 8000)
STOCK: dict[str, Any] = {}
ISTIO: dict[str, Any] = {"stats_config": {"use_all_default_tags": False, "stats_tags": ISTIO_TAGS}}
PLAIN, SIZED, CLASSED = RouteId("demo/resnet.v2"), RouteId("team/r.one"), RouteId("team/three")


def cluster(name: str, *, istio: bool = True) -> dict[str, Any]:
    """As istiod sends it, with the EnvoyFilter of docs/reference/signals.md; or as our own server does."""
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "track_cluster_stats": {"per_endpoint_stats": True},
        "load_assignment": static_assignment(name, [ENDPOINT]),
        **({"alt_stat_name": f"{name};"} if istio else {}),
    }


CLUSTERS = [
    cluster(cluster_name(PLAIN, "small"), istio=False),
    cluster(f"outbound|80||{size_host(SIZED, 'small')}"),
    cluster(f"outbound|80|v100|{subsets_host(CLASSED)}"),
    cluster("outbound|80||web.default.svc.cluster.local"),
]


def routes() -> dict[RouteId, DesiredRoute]:
    found = {name: route(server("", str(ENDPOINT)), name=name) for name in (PLAIN, SIZED, CLASSED)}
    for name in (SIZED, CLASSED):
        found[name] = replace(found[name], spec=replace(found[name].spec, gateways=("istio-system/gateway",)))
    return found


@pytest.mark.parametrize("tags", [STOCK, ISTIO], ids=["stock tags", "Istio's tags"])
async def test_what_envoy_shows_of_istios_clusters_is_found(tmp_path: Path, tags: Mapping[str, Any]) -> None:
    """No requests yet: every arrival and every endpoint is a fresh 0, none is absent, and other hosts are not asked."""
    require_envoy()

    def bootstrap(admin: Address) -> dict[str, Any]:
        nothing = {"route_config": {"virtual_hosts": [{"name": "none", "domains": ["*"]}]}}
        resources = {"clusters": CLUSTERS, "listeners": [listener(Address("127.0.0.1", 0), nothing)]}
        return {**base(admin, "gw"), **tags, "static_resources": resources}

    async with EnvoyProcess(tmp_path, bootstrap) as envoy:
        gateways = (envoy.admin_url.removeprefix("http://"),)
        source = ScrapeSignals(MonotonicClock(), timeout_s=20.0, gateways=gateways)
        for _ in range(2):
            observed = await source.poll(routes(), (), 30.0)
        await source.stop()
    assert observed.problems == ()
    values = {name: {s: v.value for s, v in found.arrivals_rps.items()} for name, found in observed.routes.items()}
    assert values[SIZED] == {"small": 0.0, "large": None, DEFAULT_CLASS: None}
    assert values[CLASSED] == {"small": 0.0, "large": 0.0, DEFAULT_CLASS: 0.0}
    if tags is STOCK:  # our own clusters are served by Envoys with our own bootstrap
        assert values[PLAIN] == {"small": 0.0, "large": None, DEFAULT_CLASS: None}
    for found in observed.routes.values():
        (endpoint,) = found.endpoints.values()
        assert (endpoint.proxy_rps.value, endpoint.proxy_failed_rps.value, endpoint.proxy_active.value) == (0, 0, 0)
        assert endpoint.pending is Signal.ABSENT
