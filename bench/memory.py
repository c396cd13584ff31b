"""What a controller of a thousand routes weighs: a real `meshctl run`, all its signals fresh, a real Envoy connected.

Every endpoint has an address of its own; the metrics pages are those of a few simulated servers, shared by many
endpoints, so that each of the ten thousand is measured in full without ten thousand processes. Nobody sends requests.
Linux only: the sizes are /proc's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from bench.report import Figure, Report, at_most, progress
from meshctl.api.base import API_VERSION
from meshctl.sim.envoy import EnvoyProcess, gateway
from meshctl.sim.fleet import FleetProcess, ServerInfo
from meshctl.sim.reference import MODEL, fleet_config, manifests
from tests.harness.controller import RunProcess, run_process

ROUTES, ENDPOINTS = 1000, 10
TARGET_MB = 200.0
FIRST_PORT = 20_000
"""Of the endpoints, which nobody connects to: an address needs its own port, not a listener."""
DEADLINE_S = 300.0
SETTLED_S = 60.0
"""Watched for this long after the last route is in force: several ticks of everything."""


async def measure_memory(report: Report, directory: Path, routes: int = ROUTES) -> None:
    """Adds the resident size after the start, when all is settled, and at its highest."""
    folder = directory / "manifests"
    folder.mkdir()
    async with FleetProcess(fleet_config(1)) as fleet:
        _write(folder, fleet.info.servers, routes)
        began_s = time.monotonic()
        async with (
            run_process(folder, directory / "state.json", directory / "run.log") as controller,
            EnvoyProcess(directory / "envoy", gateway(controller.xds, "gw"), wait_ready=False) as envoy,
        ):
            synced_s = await _synced(controller, routes) - began_s
            progress(f"{routes} routes acknowledged after {synced_s:.0f} s; watching for {SETTLED_S:.0f} s")
            await asyncio.sleep(SETTLED_S)  # a measurement's length, not a wait for something
            await _synced(controller, routes)
            size, highest = memory_mb(controller.process.pid)
            envoy_mb, _ = memory_mb(envoy.pid)
    what = f"{routes} routes x {ENDPOINTS} endpoints, one Envoy of {envoy_mb:.0f} MB, scrape"
    report.add(
        Figure("controller, resident", size, "MB", at_most(TARGET_MB), what),
        Figure("controller, highest resident", highest, "MB", note="reading a thousand manifests included"),
        Figure("start to acknowledged", synced_s, "s", note=what),
    )


def _write(folder: Path, servers: Sequence[ServerInfo], routes: int) -> None:
    """A hundred routes a file, and the fleet's profiles."""
    profiles = manifests(servers).partition("---")[2]
    (folder / "profiles.yaml").write_text(profiles)
    for first in range(0, routes, 100):
        documents = [_route(number, servers) for number in range(first, min(first + 100, routes))]
        (folder / f"routes-{first:04}.yaml").write_bytes(b"---\n".join(orjson.dumps(d) + b"\n" for d in documents))


def _route(number: int, servers: Sequence[ServerInfo]) -> dict[str, Any]:
    endpoints = [
        {
            "address": "127.0.0.1",
            "port": FIRST_PORT + number * ENDPOINTS + i,
            "metricsPort": servers[i % len(servers)].metrics_port,
            "gpu": servers[i % len(servers)].gpu,
        }
        for i in range(ENDPOINTS)
    ]
    sizes = [("small", 1, 4, 1, 0.8), ("medium", 5, 16, 8, 0.15), ("large", 17, 128, 64, 0.05)]
    classes = [dict(zip(("name", "min", "max", "batch", "share"), size, strict=True)) for size in sizes]
    name = f"r{number:04}"
    spec = {
        "hosts": [f"{name}.example"],
        "model": MODEL,
        "slo": {"latency": "150ms"},
        "requestSize": {"classes": classes},
        "backend": {"endpoints": endpoints},
    }
    return {"apiVersion": API_VERSION, "kind": "ModelRoute", "metadata": {"name": name}, "spec": spec}


async def _synced(controller: RunProcess, routes: int) -> float:
    """When (monotonic) all routes were in force in the Envoy."""
    timeout = aiohttp.ClientTimeout(total=30.0)
    async with asyncio.timeout(DEADLINE_S), aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            async with session.get(f"{controller.admin}/api/v1/status") as response:
                view = await response.json()
            proxies = view["proxies"]
            if len(view["routes"]) == routes and proxies and all(p["synced"] for p in proxies):
                return time.monotonic()
            await asyncio.sleep(0.5)  # its API is all there is to wait on


def memory_mb(pid: int) -> tuple[float, float]:
    """Resident size now and at its highest, in MB (10**6 bytes)."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    now, highest = (int(lines[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "VmHWM"))
    return now, highest


def cpu_s(pid: int) -> float:
    """Of the process alone, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
