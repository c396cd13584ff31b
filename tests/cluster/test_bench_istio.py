"""The bench of weights through Istio runs; what it measures is not judged here, but for what must be zero."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.istio import bench_apply, bench_changes
from bench.istiorun import bench_pod, bench_route
from bench.report import Report
from tests.cluster.cluster import Cluster

pytestmark = pytest.mark.cluster


def values(report: Report, part: str) -> list[float]:
    """Of the figures whose names contain `part`."""
    return [figure.value for figure in report.figures if part in figure.name]


async def test_the_bench_sees_weights_routes_and_pods_arrive_and_fails_no_request(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Decisions, ModelRoutes and deleted pods show in the gateway, and changes under load fail nothing."""
    report = Report("istio")
    await bench_apply(report, cluster, tmp_path, 2)
    await bench_changes(report, cluster, tmp_path, 3)
    await bench_route(report, cluster, tmp_path, 1)
    await bench_pod(report, cluster, tmp_path, 1)
    assert len(values(report, "requests follow")) == 2
    assert values(report, "failed requests") == [0]
    assert len(values(report, "first answer, by weights")) == 3
    assert len(values(report, "out of Envoy")) == 3
