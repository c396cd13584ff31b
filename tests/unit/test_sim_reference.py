"""The reference fleet is the one that the project's numbers speak of."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshctl.adapters.files import FileSource
from meshctl.model import RouteId
from meshctl.sim import reference
from meshctl.sim.config import server_plans
from meshctl.sim.fleet import ServerInfo


def test_capacity_is_the_published_one() -> None:
    """744.5 requests/s: the sum of 1 / E[S] over the twelve servers."""
    assert reference.capacity_rps() == pytest.approx(744.5, abs=0.1)


def test_the_fleet_has_three_servers_of_each_gpu_with_its_profile() -> None:
    """What is started is what the capacity was computed from."""
    plans = server_plans(reference.fleet_config())

    assert [plan.identity.gpu for plan in plans] == [gpu for gpu in ("V100", "P100", "T4", "K40") for _ in range(3)]
    for plan in plans:
        assert plan.profile == reference.PROFILES[plan.identity.gpu]


async def test_its_manifests_are_read_back_as_the_same_fleet(tmp_path: Path) -> None:
    """The route names every server with its GPU, and each GPU has its profile; nothing is complained of."""
    servers = [
        ServerInfo(f"{gpu}-0", gpu, f"GPU-{gpu}", "127.0.0.1", 9000 + i, 9100 + i, reference.MODEL, 1)
        for i, gpu in enumerate(reference.SERVICE_S)
    ]
    text = reference.manifests(servers, expected_load_rps=595.6, policy="RoundRobin")
    (tmp_path / "reference.yaml").write_text(text)
    source = FileSource(tmp_path)
    await source.start()
    desired = source.desired()
    await source.stop()

    assert desired.problems == ()
    route = desired.routes[RouteId("default/reference")]
    assert [(e.port, e.metrics, e.gpu, e.gpu_uuid) for e in route.endpoints] == [
        (s.port, f"127.0.0.1:{s.metrics_port}", s.gpu, s.gpu_uuid) for s in servers
    ]
    assert route.spec.sizes == reference.SIZES
    assert (route.spec.slo_s, route.spec.percentile) == (0.15, 0.99)
    assert (route.spec.expected_load_rps, route.spec.policy) == (595.6, "RoundRobin")
    assert dict(route.profiles) == dict(reference.PROFILES)
