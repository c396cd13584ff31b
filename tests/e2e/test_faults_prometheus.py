"""A Prometheus that hangs takes the signals away, not the service."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.served import codes, explain, served, weights

pytestmark = [pytest.mark.envoy, pytest.mark.prometheus]


async def test_a_prometheus_that_hangs_freezes_the_weights(tmp_path: Path) -> None:
    """Frozen, with the reason and the problem named; every request is answered; back, the signals count again."""
    async with served(tmp_path, prometheus=True) as run, run.loaded() as load:
        await run.measured()
        prometheus = run.driven.prometheus
        assert prometheus is not None
        before = weights(await run.explained())
        prometheus.freeze()
        await run.explained(lambda view: "Frozen" in codes(view))
        view = await explain(run.controller)
        assert "Frozen" in codes(view)
        assert weights(view) == before
        assert all("SignalStale" in codes(view, name) for name in before)
        assert await run.statuses(100) == [200] * 100
        prometheus.thaw()
        await run.explained(lambda view: not codes(view) & {"Frozen"} and "LoadObserved" in codes(view))
        assert await run.statuses(30) == [200] * 30
        assert load.window(600.0).failed == 0
