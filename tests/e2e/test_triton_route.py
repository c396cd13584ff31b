"""Real Tritons behind a real Envoy that a real controller drives: requests go where they are answered sooner."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.harness.prometheus import PrometheusProcess
from tests.harness.served import (
    GUARD,
    View,
    all_measured,
    driven,
    explained,
    loaded,
    weights,
    write_manifests,
)
from tests.harness.triton import TritonModel, TritonProcess, infer_body

pytestmark = [pytest.mark.envoy, pytest.mark.triton]

FAST = TritonModel(base_s=0.005, per_item_s=0.0005)
SLOW = TritonModel(base_s=0.040, per_item_s=0.004)
"""Eight times as long as its profile says: what moves the weights is what is observed."""


def manifest_endpoint(triton: TritonProcess) -> dict[str, Any]:
    host, _, port = triton.address.rpartition(":")
    return {"address": host, "port": int(port), "metricsPort": int(triton.metrics.rpartition(":")[2]), "gpu": "V100"}


def service_ms(view: View, name: str) -> float | None:
    """The observed service time in the reasons of endpoint `name`, None while there is none."""
    (found,) = (e for e in view["endpoints"] if e["endpoint"] == name)
    (reason,) = (r for r in found["reasons"] if r["code"] == "ObservedServiceTime")
    value: float | None = {i["name"]: i["value"] for i in reason["inputs"]}["service time"]
    return value


@pytest.mark.parametrize("signals", ["scrape", pytest.param("prometheus", marks=pytest.mark.prometheus)])
async def test_the_faster_of_two_tritons_gets_more(tmp_path: Path, signals: str) -> None:
    """Both have the same profile; the slower one loses weight, explain shows its service time, nothing fails."""
    async with AsyncExitStack() as stack:
        tritons = [TritonProcess(tmp_path / "fast", FAST), TritonProcess(tmp_path / "slow", SLOW)]
        for triton in tritons:
            await stack.enter_async_context(triton)
        fast, slow = (triton.address for triton in tritons)
        write_manifests(tmp_path / "manifests", [manifest_endpoint(triton) for triton in tritons], guard=GUARD)
        metrics = [triton.metrics for triton in tritons] if signals == "prometheus" else []
        run = await stack.enter_async_context(driven(tmp_path, metrics))
        load = await stack.enter_async_context(loaded(run.envoy, 20.0, infer_body))

        def told(view: View) -> bool:
            measured = all_measured(view) and None not in {service_ms(view, triton.address) for triton in tritons}
            return measured and 2 * weights(view)[slow] < weights(view)[fast]

        view = await explained(run.controller, told)
        assert (service_ms(view, fast) or 0.0) >= 1e3 * (FAST.base_s + FAST.per_item_s)
        assert (service_ms(view, slow) or 0.0) >= 1e3 * (SLOW.base_s + SLOW.per_item_s)
        assert isinstance(run.prometheus, PrometheusProcess) == (signals == "prometheus")
        assert load.window(600.0).failed == 0
