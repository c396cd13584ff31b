"""Everything for real but the GPUs: a simulated fleet, a `meshctl run` child, an Envoy, and load through it.

The guard is short, so that a fault and its end show within seconds; waits are for what the controller says, or Envoy.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson

from meshctl.sim.envoy import EnvoyProcess, gateway
from meshctl.sim.fleet import Fleet, ServerInfo
from meshctl.sim.load import Load, LoadConfig, LoadResult
from tests.harness import fleet, manifests
from tests.harness.controller import RunProcess, api, run_process
from tests.harness.envoy import require_envoy
from tests.harness.prometheus import PrometheusProcess
from tests.harness.tools import DEADLINE_S, free_ports

ROUTE = "default/served"
GUARD = {
    "smoothing": "1s",
    "dwell": "1s",
    "maxStep": 1,
    "hangAfter": "1s",
    "recoverAfter": "3s",
    "staleAfter": "3s",
    "decay": "3s",
}
RUN = ("--tick", "250ms", "--window", "2s")
V100 = {"gpu": "V100", "service": {"base": "5ms", "perItem": "0.5ms"}}

View = dict[str, Any]
"""What `explain` says, as JSON."""


def endpoint(server: ServerInfo) -> str:
    return f"{server.address}:{server.port}"


def manifest_endpoint(server: ServerInfo) -> dict[str, Any]:
    return {
        "address": server.address,
        "port": server.port,
        "metricsPort": server.metrics_port,
        "gpu": server.gpu,
        "gpuUUID": server.gpu_uuid,
    }


def write_manifests(directory: Path, endpoints: Sequence[dict[str, Any]], **spec: Any) -> None:
    """The route `ROUTE` over `endpoints`, and the V100's profile, in one file that appears whole."""
    directory.mkdir(exist_ok=True)
    route = manifests.route(
        ROUTE.partition("/")[2], **{"backend": {"endpoints": list(endpoints)}, "guard": GUARD, **spec}
    )
    text = manifests.text(route, manifests.profile(service=V100["service"]))
    written = directory / "served.tmp"  # not a name that is read
    written.write_text(text)
    written.rename(directory / "served.yaml")


def weights(view: View) -> dict[str, int]:
    """Endpoint -> the sum of its weights over the size classes."""
    return {e["endpoint"]: sum(e["weights"].values()) for e in view["endpoints"]}


def codes(view: View, subject: str = "") -> set[str]:
    """Codes of the reasons about `subject`: an endpoint, a size class; "" is the route."""
    if not subject:
        return {r["code"] for r in view["reasons"]}
    parts = [*view["endpoints"], *view["sizes"]]
    (found,) = (p for p in parts if subject in (p.get("endpoint"), p.get("size")))
    return {r["code"] for r in found["reasons"]}


async def explained(controller: RunProcess, holds: Callable[[View], bool] = bool) -> View:
    """What is explained of the route as soon as it `holds`."""
    view: View = await api(controller, f"explain/{ROUTE}", holds)
    return view


async def explain(controller: RunProcess) -> View:
    """What `meshctl explain -o json` prints."""
    command = (sys.executable, "-m", "meshctl", "explain", ROUTE, "--admin", controller.admin, "-o", "json")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        out, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    view: View = orjson.loads(out)
    return view


@dataclass
class Driven:
    """An Envoy, the controller that drives it, and where its signals come from one, a Prometheus."""

    controller: RunProcess
    envoy: EnvoyProcess
    prometheus: PrometheusProcess | None
    manifests: Path


@asynccontextmanager
async def driven(directory: Path, metrics: Sequence[str] = ()) -> AsyncIterator[Driven]:
    """Over the manifests in `directory`/manifests. With `metrics` (``host:port`` pages), signals come from a real
    Prometheus that scrapes those and the Envoy; without, from a direct scrape. Skips where a program is missing."""
    require_envoy()
    async with AsyncExitStack() as stack:
        # The Envoy is first, as Prometheus must know where its metrics are and the controller where Prometheus is.
        xds = f"127.0.0.1:{free_ports(1)[0]}"
        envoy = await stack.enter_async_context(
            EnvoyProcess(directory / "envoy", gateway(xds, "gw"), wait_ready=False, timeout_s=DEADLINE_S)
        )
        prometheus, signals = None, ["--scrape"]
        if metrics:
            jobs: dict[str, Sequence[str]] = {"servers": metrics, "envoy": [envoy.admin]}
            prometheus = await stack.enter_async_context(PrometheusProcess(directory / "prometheus", jobs, 0.25))
            signals = ["--prometheus", prometheus.url]
        run = run_process(
            directory / "manifests", directory / "state.json", directory / "run.log", *RUN, *signals, "--xds", xds
        )
        controller = await stack.enter_async_context(run)
        await envoy.wait_ready()
        yield Driven(controller, envoy, prometheus, directory / "manifests")


@asynccontextmanager
async def loaded(
    envoy: EnvoyProcess, rate_rps: float = 60.0, body: Callable[[int], bytes] | None = None
) -> AsyncIterator[Load]:
    """Poisson load while the block runs; `load.window(...)` tells of it meanwhile."""
    mix = ((1, 0.8), (8, 0.2))
    load = Load(LoadConfig((envoy.url,), rate_rps, mix, float("inf"), model=fleet.MODEL, body=body))
    task: asyncio.Task[LoadResult] = asyncio.create_task(load.run())
    try:
        yield load
    finally:
        load.stop()
        await task


def all_measured(view: View) -> bool:
    """Every endpoint has answered requests and nothing is on its way."""
    seen = all("ObservedServiceTime" in codes(view, e["endpoint"]) for e in view["endpoints"])
    return seen and not codes(view) & {"StepLimited", "Dwell"} and "LoadObserved" in codes(view)


@dataclass
class Served:
    """A fleet behind what drives it."""

    fleet: Fleet
    driven: Driven
    session: aiohttp.ClientSession

    @property
    def controller(self) -> RunProcess:
        return self.driven.controller

    @property
    def servers(self) -> tuple[ServerInfo, ...]:
        return self.fleet.info.servers

    async def explained(self, holds: Callable[[View], bool] = bool) -> View:
        return await explained(self.controller, holds)

    async def measured(self) -> View:
        return await self.explained(all_measured)

    async def statuses(self, count: int) -> list[int]:
        """Of `count` requests, one after the other."""
        found = []
        for _ in range(count):
            url = f"{self.driven.envoy.url}/v2/models/{fleet.MODEL}/infer"
            async with self.session.post(url, headers={"x-batch-size": "1"}) as response:
                await response.read()
                found.append(response.status)
        return found

    def loaded(self) -> AbstractAsyncContextManager[Load]:
        return loaded(self.driven.envoy)


@asynccontextmanager
async def served(directory: Path, *, prometheus: bool = False, **spec: Any) -> AsyncIterator[Served]:
    """Three equal simulated GPUs behind one Envoy that a real controller drives."""
    require_envoy()
    async with AsyncExitStack() as stack:
        running, _ = await stack.enter_async_context(fleet.running(fleet.config({**V100, "count": 3})))
        servers = running.info.servers
        write_manifests(directory / "manifests", [manifest_endpoint(s) for s in servers], **spec)
        metrics = [f"{s.address}:{s.metrics_port}" for s in servers] if prometheus else []
        control = await stack.enter_async_context(driven(directory, metrics))
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        yield Served(running, control, session)
