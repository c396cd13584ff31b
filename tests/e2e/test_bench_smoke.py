"""The benches run and print what they promise; what they measure is not judged here, but for what must be zero."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.harness.envoy import require_envoy
from tests.harness.tools import DEADLINE_S

BENCH = Path(__file__).parents[2] / "bench"


async def report(name: str, *options: str) -> dict[str, Any]:
    """What `python bench/NAME.py --json` prints, on standard output and nothing else."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(BENCH / f"{name}.py"), "--json", "--quick", *options, stdout=pipe, stderr=pipe
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), 2 * DEADLINE_S)
    finally:
        if process.returncode is None:
            process.terminate()  # it ends its own children
            await process.wait()
    assert process.returncode == 0, err.decode()
    found: dict[str, Any] = orjson.loads(out)
    assert found["bench"] == name
    assert {"cores", "processor", "load_average"} <= found["machine"].keys()
    return found


def values(found: dict[str, Any], part: str) -> list[float]:
    """Of the figures whose names contain `part`."""
    return [figure["value"] for figure in found["figures"] if part in figure["name"]]


async def test_the_solver_bench_prints_its_figures() -> None:
    """Cold, warm and naive times, a decision for routes that do not change, and no write for them."""
    found = await report("solver", "--routes", "30")
    for part in ("solve, cold", "solve, warm", "naive / ours", "30 unchanged routes", "30 new routes"):
        assert values(found, part), part
    assert values(found, "writes caused")[0] == 0


@pytest.mark.alone
@pytest.mark.envoy
async def test_the_loop_bench_fails_no_request() -> None:
    """Decisions reach a real Envoy, and changes under load fail nothing."""
    require_envoy()
    found = await report("loop", "--only", "apply", "--only", "changes")
    assert len(values(found, "decision -> acknowledged")) == 2
    assert len(values(found, "requests on the old weights")) == 1
    assert values(found, "failed requests") == [0]


async def test_the_agent_bench_knows_of_every_slot() -> None:
    """Allocates and restarts of the kubelet are timed, and the agent's slots are the kubelet's afterwards."""
    found = await report("agent", "--only", "allocate", "--only", "restart")
    for part in ("Allocate, p99", "GetPreferredAllocation, p99", "answered at once, p99", "idle", "resident"):
        assert values(found, part), part
    assert len(values(found, "back -> Register")) == 3
    assert values(found, "know otherwise") == [0, 0, 0]


async def test_the_extender_bench_places_every_pod() -> None:
    """A small cluster: Filters by names and with whole nodes are timed, and memory is weighed."""
    found = await report("extender")
    for part in ("Filter by names, p99", "Bind, p99", "Filter / receive and parse", "resident when ready"):
        assert values(found, part), part
    assert values(found, "pods that found no node") == [0]


@pytest.mark.envoy
async def test_the_xds_bench_loses_no_client_and_no_request() -> None:
    """Every row of its table is there: bytes, a few streams of each kind, decisions and changes in a real Envoy."""
    require_envoy()
    found = await report("xds", "--streams", "10", "--routes", "5")
    for part in (
        "every weight changed",
        "one weight changed",
        "full snapshot from nothing",
        "one route changed",
        "first request, parsed",
        "ACK, parsed",
        "one change, all ACKed, p50",
        "one change, all ACKed, p99",
        "all clients reconnect",
        "memory per idle stream",
        "decision -> ACKed by Envoy, 5 routes",
        "decision -> first answer by it, 5 routes",
    ):
        assert values(found, part), part
    assert values(found, "refused for good") == [0, 0]
    assert values(found, "failed requests") == [0]
