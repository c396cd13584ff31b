"""bench/routing.py runs and prints what docs/benchmarks.md needs; its numbers are judged there, not here."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.harness.envoy import require_envoy

DEADLINE_S = 170.0
SCRIPT = Path(__file__).parents[2] / "bench" / "routing.py"


async def bench(*options: str) -> dict[str, Any]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(SCRIPT), "--json", "--quick", *options), stdout=pipe, stderr=pipe
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    finally:
        if process.returncode is None:
            process.terminate()  # it ends what it started
            await process.wait()
    assert process.returncode == 0, err.decode()
    found: dict[str, Any] = orjson.loads(out)
    return found


async def test_the_event_simulation_has_every_policy_and_its_targets() -> None:
    """Eight policies, one and 16 Envoys, two loads; meshctl's table meets the targets at 16."""
    found = await bench("--only", "tables")
    cells = {(cell["policy"], cell["gateways"], cell["load_ratio"]): cell for cell in found["tables"]}
    assert len(cells) == 8 * 2 * 2
    assert all(0 <= cell["worst_class"] <= cell["goodput"] <= 1 for cell in cells.values())
    assert [(f["target"]["value"], f["met"]) for f in found["figures"]] == [(99.0, True), (97.0, True)]
    for load in (0.75, 0.85):
        ours, istio = cells["Balanced", 16, load], cells["Istio's default (least of 2)", 16, load]
        assert ours["goodput"] - istio["goodput"] > 0.2


@pytest.mark.alone
@pytest.mark.envoy
async def test_the_real_comparison_prints_its_targets_and_what_was_real() -> None:
    """Both policies with the same requests; the ratio, goodput and worst class with their targets."""
    require_envoy()
    found = await bench("--only", "real", "--load", "0.4")
    real = found["real"]
    assert real["what"].startswith("real Envoys")
    (before,), (after,) = real["runs"]["istio-default"], real["runs"]["meshctl"]
    assert before["requests"] == after["requests"] > 0
    targets = {f["name"]: f["target"]["value"] for f in found["figures"] if f["target"]}
    assert targets == {
        "p99 of Istio's default / p99 of meshctl": 5,
        "meshctl goodput": 99.5,
        "meshctl worst class": 97,
    }
    sizes = {size for weights in real["weights"].values() for size in weights} - {"gpu"}
    assert sizes == {"small", "medium", "large", "default"}
