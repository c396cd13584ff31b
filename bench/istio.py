"""Weights through Istio: how soon they hold in a real gateway, and what they are worth there.

    python bench/istio.py [--json] [--quick] [--only apply|changes|route|pod|failover|ratio] [--seconds 30]

Real are etcd, the API server with its EndpointSlice controller, istiod with its default debounce, the Envoy that it
configures as a gateway (with deploy/istio/stats.yaml), meshctl and the requests; simulated is what GPUs do.
`apply`: a plan is given to the writer; in force when every size class' requests follow it. `changes`: a hundred of them
under load. `route`, `pod`, `failover`: a real `meshctl run`, see `bench.istiorun`. `ratio`: Istio's default against
meshctl at 80 % load, both mechanisms, through the one gateway, one after the other.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
import uvloop

if not __package__:  # run as a file: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.istiorun import REST_S, Place, bench_failover, bench_pod, bench_route, place, shown
from bench.loop import random_weights
from bench.report import Figure, JsonOption, Report, at_least, at_most, progress, quantiles, quiet_logs
from bench.routing import measure, seeds_of
from istio.confirm import Istiod
from istio.tables import row_over
from istio.writer import IstioWriter
from meshctl.controller.clock import MonotonicClock
from meshctl.model import WEIGHT_TOTAL, DesiredRoute, EndpointId, Mechanism, RouteId, RoutePlan
from meshctl.openfiles import allow_many_connections
from meshctl.sim.children import until_signal
from meshctl.sim.envoy import Balancing
from meshctl.sim.fleet import FleetProcess
from meshctl.sim.load import Load, LoadConfig, calm_gc
from meshctl.sim.reference import MIX, MODEL, SIZES, capacity_rps, fleet_config
from meshctl.sim.versus import MESHCTL, SETTLE_SEED, Measured, Stand, endpoint_of, ratio
from tests.cluster.cluster import Cluster
from tests.cluster.local import STATS, cluster_stand
from tests.harness.envoy import TABLE, Backends, plan, request
from tests.harness.istio_plans import meshed

APPLY_MS = 200.0
RATIOS = {Mechanism.ENDPOINTS: 5.0, Mechanism.SUBSETS: 3.0}
APPLIES, CHANGES, ROUTES, PODS, FAILOVERS = 60, 100, 20, 30, 3
CHANGE_LOAD = 0.5
HEADERS = ([], *([("x-batch-size", str(int(size.batch)))] for size in SIZES))
"""Of a request of each size class, the default one first."""


class Part(StrEnum):
    APPLY = "apply"
    CHANGES = "changes"
    ROUTE = "route"
    POD = "pod"
    FAILOVER = "failover"
    RATIO = "ratio"


class Writing:
    """The writer, put together as `meshctl run` does, without a controller before it."""

    def __init__(self, here: Place) -> None:
        self.here, self.route = here, RouteId(f"{here.namespace}/r")
        self.url, self.host = here.cluster.gateway().url, here.host("r")
        self.plans: Mapping[RouteId, RoutePlan] = {}
        clock = MonotonicClock()
        confirmation = Istiod([here.cluster.istiod_debug], clock)
        self.writer = IstioWriter(here.objects.reader(), confirmation, clock, routes=self._routes)

    def _routes(self) -> Mapping[RouteId, DesiredRoute]:
        return {route: made.route for route, made in self.plans.items()}

    def apply(self, weights: Mapping[str, int]) -> None:
        """`weights` in proportion: a plan's sum to `WEIGHT_TOTAL`."""
        row = row_over({EndpointId(a): w for a, w in weights.items()}, [EndpointId(a) for a in weights])
        made = meshed(self.route, row, hosts=(self.host,), sizes=SIZES, balancer=TABLE)
        self.plans = {self.route: made}
        self.writer.apply(plan(made))

    async def written(self) -> float:
        """When (perf_counter) the API server had all of the last plan's weights."""
        wanted = self.plans[self.route].weights

        def there() -> bool:
            return self.writer.in_force().get(self.route) == wanted

        return await self.here.seen(there, "the last plan's weights are written")

    async def followed(self, address: str) -> float:
        """When (perf_counter) the requests of every size class went to `address`."""
        return max(await asyncio.gather(*[self._followed(address, headers) for headers in HEADERS]))

    async def _followed(self, address: str, headers: Sequence[tuple[str, str]]) -> float:
        """The first of two answers in a row: the other server gets every thousandth request, never two in a row."""
        first_s = 0.0

        async def twice() -> bool:
            nonlocal first_s
            for turn in range(2):
                status, body = await request(self.here.session, self.url, headers, host=self.host)
                if (status, body) != (200, address):
                    return False
                first_s = time.perf_counter() if turn == 0 else first_s
            return True

        await shown(twice, f"{headers or 'a request'} goes to {address}")
        return first_s


@asynccontextmanager
async def _writing(cluster: Cluster, directory: Path) -> AsyncIterator[Writing]:
    async with place(cluster, directory) as here:
        made = Writing(here)
        made.writer.start()
        try:
            yield made
        finally:
            await made.writer.stop()


# ------------------------------------------------------------------------------------------- a decision -> in force


async def bench_apply(report: Report, cluster: Cluster, directory: Path, repeats: int) -> None:
    """Weights 999:1 to 1:999 and back: nothing comes or goes, the weights alone change."""
    async with Backends(2) as backends, _writing(cluster, directory) as it:
        tables = [dict(zip(backends.addresses, (w, WEIGHT_TOTAL - w), strict=True)) for w in (999, 1)]
        random = np.random.default_rng(1)
        it.apply(tables[0])
        await it.followed(backends.addresses[0])
        written, proven = [], []
        for step in range(1, repeats + 1):
            await asyncio.sleep(REST_S + float(random.uniform(0, 0.1)))  # each change begins at rest, at any phase
            start_s = time.perf_counter()
            it.apply(tables[step % 2])
            written.append(1e3 * (await it.written() - start_s))
            # Asking before would only take the cores of those who write: it can't be in force yet.
            proven.append(1e3 * (await it.followed(backends.addresses[step % 2]) - start_s))
    note = f"{len(HEADERS)} ServiceEntries"
    report.add(
        *quantiles("decision -> written to the API server", written, "ms", {0.99: None}, note),
        *quantiles(
            "decision -> every size class' requests follow",
            proven,
            "ms",
            {0.99: at_most(APPLY_MS)},
            f"{note}; istiod waits for 100 ms of quiet",
        ),
    )


# ------------------------------------------------------------------------------------------------ changes under load


async def bench_changes(report: Report, cluster: Cluster, directory: Path, changes: int) -> None:
    """Random weights, some zero, servers that come and go, one change after the other was written and pushed."""
    async with FleetProcess(fleet_config()) as fleet, _writing(cluster, directory) as it:
        addresses = [endpoint_of(server) for server in fleet.info.servers]
        random = np.random.default_rng(1)
        it.apply(random_weights(random, addresses))
        await it.here.served(it.host, MODEL)
        rate_rps = CHANGE_LOAD * capacity_rps()
        load = Load(LoadConfig((it.url,), rate_rps, MIX, float("inf"), model=MODEL, host=it.host))
        sending = asyncio.create_task(load.run())
        for step in range(changes):
            some = addresses if step % 5 else addresses[: len(addresses) - 1 - int(random.integers(4))]
            it.apply(random_weights(random, some))
            await it.written()
            await asyncio.sleep(float(random.uniform(0, 0.4)))  # sometimes before istiod has pushed it
        await asyncio.sleep(REST_S)
        load.stop()
        result = await sending
    note = f"{result.requests} requests at {result.rate_rps:.0f}/s during {changes} changes in {result.seconds:.0f} s"
    report.add(Figure(f"failed requests during {changes} changes", result.failed, "requests", at_most(0), note))
    report.details["changes"] = {"failures": dict(result.failures), "p99_ms": result.p99_ms}


# --------------------------------------------------------------------------------------------- Istio's default or ours


async def bench_ratio(report: Report, mechanism: Mechanism, load: float, seconds: float, seeds: Sequence[int]) -> None:
    """The same requests at the same times through both, on the same machine."""
    async with cluster_stand(load * capacity_rps(), progress, mechanism=mechanism.value) as made:
        calm_gc()
        await made.run(_compare(report, made, mechanism, seconds, seeds))


async def _compare(report: Report, made: Stand, mechanism: Mechanism, seconds: float, seeds: Sequence[int]) -> None:
    runs: dict[str, list[Measured]] = {str(Balancing.ISTIO_DEFAULT): [], MESHCTL: []}
    settled: list[float | None] = []
    for seed in seeds:
        for policy, found in runs.items():
            if policy == MESHCTL:
                settled.append(await made.settle(seed + SETTLE_SEED))
            progress(f"{mechanism}, seed {seed}: {policy}, {seconds:g} s")
            found.append(await measure(made, policy, seed, seconds))
    before, ours = runs[str(Balancing.ISTIO_DEFAULT)], runs[MESHCTL]
    ratios = [ratio(b.p99_ms, a.p99_ms) or 0.0 for b, a in zip(before, ours, strict=True)]
    invalid = sum(not run.valid for found in runs.values() for run in found)
    lag_ms = max(run.send_lag_p99_ms or float("inf") for found in runs.values() for run in found)
    note = f"{made.rate_rps:.0f} requests/s, GPUs simulated; {_each(ratios)}"
    lag = f"{invalid} runs not valid, generator's lag up to {lag_ms:.1f} ms"
    failed = sum(run.failed for found in runs.values() for run in found)
    report.add(
        Figure(f"{mechanism}: p99 ratio", float(np.mean(ratios)), "", at_least(RATIOS[mechanism]), f"{note}; {lag}"),
        _mean(f"{mechanism}: Istio's default, p99", [run.p99_ms for run in before], "ms"),
        _mean(f"{mechanism}: meshctl, p99", [run.p99_ms for run in ours], "ms"),
        _mean(f"{mechanism}: Istio's default, goodput", [100 * (run.goodput or 0.0) for run in before], "%"),
        _mean(f"{mechanism}: meshctl, goodput", [100 * (run.goodput or 0.0) for run in ours], "%"),
        Figure(f"{mechanism}: failed requests", failed, "requests", at_most(0)),
    )
    report.details[f"ratio {mechanism}"] = {
        "seeds": list(seeds),
        "seconds": seconds,
        "settled_s": settled,
        "runs": {policy: [asdict(run) | {"valid": run.valid} for run in found] for policy, found in runs.items()},
    }


def _mean(name: str, values: Sequence[float | None], unit: str) -> Figure:
    known = [float("nan") if value is None else value for value in values]
    return Figure(name, float(np.mean(known)), unit, note=_each(known))


def _each(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


# --------------------------------------------------------------------------------------------------------------- main


def main(
    as_json: JsonOption = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few repeats: does it work?")] = False,
    load: Annotated[float, typer.Option("--load", help="Part of the capacity, in the comparison.")] = 0.8,
    seconds: Annotated[float, typer.Option("--seconds", help="Measured time per run of the comparison.")] = 30.0,
    seeds: Annotated[str, typer.Option("--seeds", help="Comma-separated; each is one run of both policies.")] = "1,2,3",
    only: Annotated[list[Part] | None, typer.Option("--only", help="Parts to run; all by default.")] = None,
    mechanism: Annotated[list[Mechanism] | None, typer.Option("--mechanism", help="Of the comparison.")] = None,
) -> None:
    """Measure meshctl with Istio and print it."""
    allow_many_connections()
    quiet_logs()
    report, parts = Report("istio"), only or list(Part)
    found = (1,) if quick else seeds_of(seeds)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ended = runner.run(until_signal(_bench(report, parts, quick=quick)))
        for one in mechanism or list(Mechanism):
            if ended is None and Part.RATIO in parts:
                ended = runner.run(until_signal(bench_ratio(report, one, load, 5.0 if quick else seconds, found)))
    if ended is not None:
        raise typer.Exit(128 + ended)
    report.show(as_json=as_json)


PARTS: Mapping[Part, tuple[Callable[[Report, Cluster, Path, int], Awaitable[None]], int, int]] = {
    Part.APPLY: (bench_apply, APPLIES, 5),
    Part.CHANGES: (bench_changes, CHANGES, 10),
    Part.ROUTE: (bench_route, ROUTES, 2),
    Part.POD: (bench_pod, PODS, 2),
    Part.FAILOVER: (bench_failover, FAILOVERS, 1),
}
"""What runs in one cluster: how, how often, and how often with --quick."""


async def _bench(report: Report, parts: Sequence[Part], *, quick: bool) -> None:
    if not any(part in PARTS for part in parts):
        return
    with TemporaryDirectory(prefix="meshctl-bench-") as directory:
        progress("starting Kubernetes, Istio and its gateway")
        async with Cluster(Path(directory) / "cluster", istio=True) as cluster:
            await cluster.apply(STATS)
            for part in [part for part in PARTS if part in parts]:
                run, often, rarely = PARTS[part]
                progress(f"{part}")
                await run(report, cluster, Path(directory), rarely if quick else often)


if __name__ == "__main__":
    typer.run(main)
