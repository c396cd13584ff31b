"""A stand on which routing policies meet: one fleet, one load, and a real Envoy per policy, one at a time.

Invariant: the fleet and the load are the same for every policy (the same seed sends the same requests at the same
times), each run starts on a drained fleet with a warm-up that is not counted, and never do two policies run at once:
they would measure each other. Real are the Envoys, the controller (a `meshctl run` of its own), its signals and the
requests; simulated is what the GPUs do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from meshctl.controller.views import RouteView
from meshctl.model import ReasonCode
from meshctl.sim.children import Controller, Prometheus, prometheus_binary, unless_ended
from meshctl.sim.envoy import Balancing, EnvoyProcess, balanced, free_port, gateway
from meshctl.sim.faults import Faults
from meshctl.sim.fleet import FleetProcess, ServerInfo
from meshctl.sim.load import Load, LoadConfig, LoadResult
from meshctl.sim.reference import MIX, MODEL, ROUTE, SIZES, SLO_S, fleet_config, manifests

MESHCTL = "meshctl"
"""The policy under test; the others are named by their `Balancing`."""
LAG_LIMIT_MS = 0.05 * 1e3 * SLO_S
"""A generator whose p99 is later than this measures the machine. Its lag is part of every latency: it flatters none."""
WARMUP_S = 5.0
SETTLED_S = 4.0
"""Weights that stay this long under load, four ticks of the loop, have settled."""
SETTLE_LIMIT_S = 60.0
REACTED = 0.9
"""The loop has reacted when a slow server's part of all weights is below this much of what it was."""
_KNOWN = 0.97
"""Part of the load sent that must be solved for; headroom puts it above 1 at last."""
_LOOK_S = 0.25
SETTLE_SEED = 10_000
"""Added to the seed for load that is not measured."""
_ROUTE_ID = f"default/{ROUTE}"
_MOVING = {ReasonCode.STEP_LIMITED, ReasonCode.DWELL}

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """One policy under one load; the fields of `meshctl demo --once --json`."""

    name: str
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    goodput: float | None
    goodput_by_size: dict[str, float]
    """By size class."""
    requests: int
    failed: int
    send_lag_p99_ms: float | None

    @staticmethod
    def of(name: str, result: LoadResult) -> Measured:
        sizes = {str(batch): size.name for (batch, _), size in zip(MIX, SIZES, strict=True)}
        return Measured(
            name=name,
            p50_ms=result.p50_ms,
            p99_ms=result.p99_ms,
            p999_ms=result.p999_ms,
            goodput=result.goodput,
            goodput_by_size={sizes[batch]: ratio for batch, ratio in result.goodput_by_size.items()},
            requests=result.requests,
            failed=result.failed,
            send_lag_p99_ms=result.send_lag_p99_ms,
        )

    @property
    def valid(self) -> bool:
        """The generator kept up."""
        return self.send_lag_p99_ms is not None and self.send_lag_p99_ms <= LAG_LIMIT_MS


@dataclass
class Stand:
    """What runs; made by `stand`."""

    fleet: FleetProcess
    controller: Controller
    urls: Mapping[str, str]
    """Where each policy takes requests."""
    data_plane: str
    """What the proxies are, and their version."""
    rate_rps: float
    hosts: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """The Host header by policy, where one URL serves several."""
    slo_s: float = field(default=SLO_S, kw_only=True)
    ends: list[Callable[[], Awaitable[str]]] = field(default_factory=list, kw_only=True)

    def load(self, policy: str, seed: int, seconds: float = inf, warmup_s: float = 0.0) -> Load:
        """Open-loop load through one policy's Envoy, not started."""
        url, rate, host = self.urls[policy], self.rate_rps, self.hosts.get(policy, "")
        return Load(LoadConfig((url,), rate, MIX, seconds, seed, warmup_s, self.slo_s, model=MODEL, host=host))

    async def measure(self, policy: str, seed: int, seconds: float) -> Measured:
        """`seconds` through one policy, after a warm-up; returns when the fleet has drained."""
        return Measured.of(policy, await self.load(policy, seed, seconds, WARMUP_S).run())

    async def settle(self, seed: int, limit_s: float = SETTLE_LIMIT_S) -> float | None:
        """Load through meshctl until its weights stay; seconds that took, None when they still move at the limit."""
        async with self.loaded(MESHCTL, seed):
            return await self.settled(limit_s)

    @asynccontextmanager
    async def loaded(self, policy: str, seed: int) -> AsyncIterator[Load]:
        """Load while the block runs; drained on leaving."""
        load = self.load(policy, seed)
        task = asyncio.create_task(load.run())
        try:
            yield load
        finally:
            load.stop()
            await task

    async def settled(self, limit_s: float = SETTLE_LIMIT_S) -> float | None:
        """Wait, under a load that somebody else sends, until the controller has seen it and its weights stay."""
        start_s = since_s = time.monotonic()
        weights: object = None
        while (now_s := time.monotonic()) - start_s < limit_s:
            view = await self.route()
            if (new := weights_of(view)) != weights or not self._at_rest(view):
                weights, since_s = new, now_s
            if now_s - since_s >= SETTLED_S:
                return since_s - start_s
            await asyncio.sleep(_LOOK_S)  # another process: its API is all there is to wait on
        return None

    async def route(self) -> RouteView:
        """What the controller says of the fleet's route."""
        return await self.controller.route(_ROUTE_ID)

    def servers(self, gpu: str) -> list[ServerInfo]:
        return [server for server in self.fleet.info.servers if server.gpu == gpu]

    async def set_faults(self, server: ServerInfo, faults: Faults) -> None:
        await self.fleet.set_faults(server.name, faults)

    async def run(self, work: Awaitable[None]) -> None:
        """`work`, or MeshctlError as soon as a child ends."""
        await unless_ended(work, *self.ends)

    def _at_rest(self, view: RouteView) -> bool:
        """The load is known, all of it (its mean grows for some seconds when it sets in), and no move is under way."""
        codes = {reason.code for reason in view.reasons}
        known = ReasonCode.LOAD_OBSERVED in codes and view.load_rps >= _KNOWN * self.rate_rps
        return known and not codes & _MOVING


@dataclass
class LocalStand(Stand):
    """Without a cluster: an Envoy for each policy, manifests in a file."""

    envoy: EnvoyProcess
    """meshctl's."""
    manifest: Path

    def write_manifests(self, **spec: Any) -> None:
        """The route and profiles, with `spec` on top; the controller sees the change by itself."""
        new = self.manifest.with_suffix(".new")
        new.write_text(manifests(self.fleet.info.servers, **spec))
        new.replace(self.manifest)


def weights_of(view: RouteView) -> dict[str, dict[str, int]]:
    """Endpoint -> size class -> weight in force."""
    return {e.endpoint: dict(e.weights) for e in view.endpoints}


def part_of(view: RouteView, endpoint: str) -> float:
    """The endpoint's part of all weights of the declared size classes, 0..1."""
    table = weights_of(view)
    sizes = [size.size for size in view.sizes if size.min_batch is not None]
    total = sum(row[size] for row in table.values() for size in sizes)
    return sum(table[endpoint][size] for size in sizes) / max(total, 1)


def endpoint_of(server: ServerInfo) -> str:
    """How the controller names a server."""
    return f"{server.address}:{server.port}"


@asynccontextmanager
async def stand(
    rate_rps: float,
    *,
    with_prometheus: bool = False,
    peers: Sequence[Balancing] = (Balancing.ISTIO_DEFAULT,),
    say: Say = lambda _: None,
) -> AsyncIterator[LocalStand]:
    """Everything started, in a directory that goes with it. Raises MeshctlError with the log of what did not start."""
    if with_prometheus:
        prometheus_binary()  # say what is missing before anything starts
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(TemporaryDirectory(prefix="meshctl-demo-")))
        say("starting the simulated fleet: 12 GPU servers that speak Triton's protocol")
        fleet = await stack.enter_async_context(FleetProcess(fleet_config()))
        directory = root / "manifests"
        directory.mkdir()
        manifest = directory / "reference.yaml"
        manifest.write_text(manifests(fleet.info.servers))
        say("starting the controller and the Envoys")
        prometheus = f"127.0.0.1:{free_port()}" if with_prometheus else None
        url = f"http://{prometheus}" if prometheus else None
        source = ("--manifests", directory, "--state", root / "state.json")
        controller = await stack.enter_async_context(Controller(root, source, url))
        addresses = [endpoint_of(server) for server in fleet.info.servers]
        configs = {str(peer): balanced(addresses, peer) for peer in peers}
        configs[MESHCTL] = gateway(controller.xds, "demo")
        envoys = {
            name: await stack.enter_async_context(EnvoyProcess(root / name, config)) for name, config in configs.items()
        }
        urls = {name: envoy.url for name, envoy in envoys.items()}
        made = LocalStand(fleet, controller, urls, envoys[MESHCTL].version, rate_rps, envoys[MESHCTL], manifest)
        made.ends = [fleet.ended, controller.ended, *(envoy.ended for envoy in envoys.values())]
        if prometheus:
            say("starting Prometheus")
            metrics = [f"{server.address}:{server.metrics_port}" for server in fleet.info.servers]
            jobs = {"triton": metrics, "envoy": [envoys[MESHCTL].admin]}
            made.ends.append((await stack.enter_async_context(Prometheus(root, prometheus, jobs))).ended)
        yield made


def ratio(worse: float | None, better: float | None) -> float | None:
    """How many times as long; None without both."""
    return round(worse / better, 2) if worse and better else None
