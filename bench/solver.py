"""How long a decision takes: the solver from cold and warm, and decide() for a thousand routes.

Wall time on a shared machine says little alone, so each figure carries the CPU time of the same calls, and the solver
has a peer: scipy's L-BFGS-B with finite differences on the same objective ("naive"). Writes are counted at a real
XdsServer. The memory of a thousand routes is that of a real `meshctl run` (bench/memory.py measures it).

``python bench/solver.py [--json] [--quick] [--routes N]``
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import typer

if not __package__:  # run as a file: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.memory import measure_memory
from bench.report import Figure, JsonOption, Report, at_most, progress, quantiles, quiet_logs
from meshctl.core import weights
from meshctl.core.capacity import service_s
from meshctl.core.decide import Memory, decide
from meshctl.core.queueing import Array
from meshctl.core.weights import _Objective  # what `balanced` minimises: the peer must minimise the same
from meshctl.model import (
    DEFAULT_CLASS,
    DesiredRoute,
    Endpoint,
    EndpointId,
    EndpointSignals,
    Plan,
    Policy,
    RouteId,
    RouteSignals,
    RouteSpec,
    Signal,
    Snapshot,
)
from meshctl.sim.reference import MODEL, PROFILES, SERVICE_S, SIZES, SLO_S
from xds.server import XdsServer

T = TypeVar("T")

COLD_MS, WARM_MS, DECIDE_MS = 50.0, 5.0, 50.0
LOADS, GATEWAYS, CONCURRENCY = (0.3, 0.6, 0.75, 0.85, 0.95), (1, 4, 16), (1, 2)
ROUTES = 1000
FLEET: Mapping[str, int] = {"V100": 3, "P100": 3, "T4": 2, "K40": 2}
"""Endpoints of one route of the thousand."""
ROUTE_LOAD = 0.7
"""Load of each, as a part of its capacity."""


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of each call."""

    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def of(self, function: Callable[[], T]) -> T:
        """What `function` returns, timed."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        result = function()
        self.cpu_ms.append(1e3 * (time.process_time() - cpu_s))
        self.wall_ms.append(1e3 * (time.perf_counter() - wall_s))
        return result

    def figures(self, name: str, target_ms: float | None, note: str = "") -> list[Figure]:
        """Median and 95th percentile, both against the target."""
        target = {} if target_ms is None else {q: at_most(target_ms) for q in (0.5, 0.95)}
        cpu = f"CPU median {np.median(self.cpu_ms):.3g} ms" + (f"; {note}" if note else "")
        return quantiles(name, self.wall_ms, "ms", target, cpu)


# --------------------------------------------------------------------------------------------------------- the solver


@dataclass(frozen=True, slots=True)
class Case:
    """One table to solve: the reference fleet (4 classes of 3 x 3 sizes) at a load."""

    load: float
    gateways: int
    concurrency: int
    shift: float = 0.0
    """By how much the demand differs: this much more of the large requests, less of the small."""

    def fleet(self) -> weights.Fleet:
        service = [[service_s(PROFILES[gpu], size.batch) for size in SIZES] for gpu in SERVICE_S]
        ones = np.ones(len(service))
        return weights.Fleet(np.array(service), 3 * ones, self.concurrency * ones)

    def demand(self) -> weights.Demand:
        mix = np.array([size.share for size in SIZES])
        mix = mix + self.shift * np.array([-0.05, 0.0, 0.05])
        rate_rps = self.load * self.fleet().capacity_rps(mix)
        return weights.Demand(rate_rps * mix, np.eye(len(mix)))

    def solve(self, warm: Array | None = None) -> weights.Table:
        return weights.solve(Policy.BALANCED, self.fleet(), self.demand(), SLO_S, self.gateways, warm)

    def naive(self, start: Array) -> Array:
        """The same objective by L-BFGS-B without its gradient, from the same start."""
        from scipy.optimize import minimize

        objective = self._objective(start)

        def value(logits: Array) -> float:
            return objective(logits)[0]

        found = minimize(value, _logits(start), method="L-BFGS-B", options={"maxiter": 120, "maxfun": 100_000})
        e = np.exp(found.x.reshape(start.shape) - found.x.reshape(start.shape).max(axis=1, keepdims=True))
        shares: Array = e / e.sum(axis=1, keepdims=True)
        return shares

    def value(self, shares: Array, at: Array) -> float:
        """The objective of `shares`, with the dispersion that `at` has; in units of a logarithm, less is better."""
        return self._objective(at)(_logits(shares))[0]

    def _objective(self, at: Array) -> _Objective:
        return _Objective(self.fleet(), self.demand(), SLO_S, self.gateways, at)


def _logits(shares: Array) -> Array:
    logits: Array = np.log(np.maximum(shares, 1e-4)).ravel()
    return logits


def bench_solver(report: Report, repeats: int, every: int = 1) -> None:
    """Cold and warm over all (or each `every`-th of all) loads, numbers of proxies and concurrencies; the naive peer
    on every case once."""
    cases = [Case(*values) for values in itertools.product(LOADS, GATEWAYS, CONCURRENCY)][::every]
    cases[0].solve()  # scipy's import, 0.3 s, once in a process
    cold, warm, naive, naive_warm = Times(), Times(), Times(), Times()
    behind: list[float] = []
    for case in cases:
        table = case.solve()
        moved = Case(case.load * 1.05, case.gateways, case.concurrency, 0.1)
        for _ in range(repeats):
            cold.of(case.solve)
            warm.of(lambda moved=moved, table=table: moved.solve(table.shares))  # type: ignore[misc]  # inferred
        start = weights.equal_mix(case.fleet(), case.demand())
        other = naive.of(lambda case=case, start=start: case.naive(start))  # type: ignore[misc]  # inferred
        naive_warm.of(lambda moved=moved, table=table: moved.naive(table.shares))  # type: ignore[misc]  # inferred
        behind.append(case.value(table.shares, table.shares) - case.value(other, table.shares))
    what = "4 GPU classes x 3 sizes; loads 0.3-0.95, 1-16 proxies, concurrency 1-2"
    report.add(
        *cold.figures("solve, cold", COLD_MS, what),
        *warm.figures("solve, warm", WARM_MS, "5 % more load, more large requests"),
        *naive.figures("naive, cold", None, "finite differences, one descent"),
        Figure("naive / ours, cold", _ratio(naive, cold), "x", note="CPU, medians"),
        Figure("naive / ours, warm", _ratio(naive_warm, warm), "x", note="CPU, medians"),
        *quantiles("objective, ours less naive's", behind, "", {}, "logarithm of the late share"),
    )


def _ratio(slow: Times, fast: Times) -> float:
    return float(np.median(slow.cpu_ms) / np.median(fast.cpu_ms))


# --------------------------------------------------------------------------------------------------- a thousand routes


def desired(number: int) -> DesiredRoute:
    """Route `number`, over ten endpoints of its own."""
    gpus = [gpu for gpu, count in FLEET.items() for _ in range(count)]
    address = f"10.{number // 250}.{number % 250}"
    endpoints = tuple(
        Endpoint(EndpointId(f"{address}.{i}:8000"), f"{address}.{i}", 8000, gpu, f"{address}.{i}:8002")
        for i, gpu in enumerate(gpus)
    )
    spec = RouteSpec(
        RouteId(f"bench/r{number:04}"), (f"r{number:04}.example",), MODEL, SLO_S, 0.99, ("x-batch-size",), SIZES
    )
    return DesiredRoute(spec, endpoints, PROFILES)


class Signals:
    """What is measured of a route that is served as expected; each number wobbles by `wobble`, seeded."""

    def __init__(self, seed: int = 1) -> None:
        self._random = np.random.default_rng(seed)
        mean_s = {gpu: sum(s.share * service_s(p, s.batch) for s in SIZES) for gpu, p in PROFILES.items()}
        self._mean_s = mean_s
        self._batch = sum(s.share * s.batch for s in SIZES)
        self._load_rps = ROUTE_LOAD * sum(n / mean_s[gpu] for gpu, n in FLEET.items())

    def at(self, routes: Mapping[RouteId, DesiredRoute], now_s: float, wobble: float) -> dict[RouteId, RouteSignals]:
        return {route_id: self._route(route, now_s, wobble) for route_id, route in routes.items()}

    def _route(self, route: DesiredRoute, now_s: float, wobble: float) -> RouteSignals:
        factors = iter(1 + wobble * self._random.standard_normal(100))
        arrivals = {s.name: Signal(s.share * self._load_rps * next(factors), now_s) for s in SIZES}
        arrivals[DEFAULT_CLASS] = Signal(0.0, now_s)
        return RouteSignals(arrivals, {e.id: self._endpoint(e.gpu, now_s, factors) for e in route.endpoints})

    def _endpoint(self, gpu: str, now_s: float, factors: Iterator[float]) -> EndpointSignals:
        mean_s = self._mean_s[gpu]
        rate_rps = ROUTE_LOAD / mean_s * next(factors)
        return EndpointSignals(
            gpu_utilization_ratio=Signal(ROUTE_LOAD * next(factors), now_s),
            busy_ratio=Signal(ROUTE_LOAD * next(factors), now_s),
            service_s=Signal(mean_s * next(factors), now_s),
            batch=Signal(self._batch, now_s),
            queue_s=Signal(0.01 * next(factors), now_s),
            pending=Signal(1.0, now_s),
            completed_rps=Signal(rate_rps, now_s),
            failed_rps=Signal(0.0, now_s),
            proxy_rps=Signal(rate_rps, now_s),
            proxy_failed_rps=Signal(0.0, now_s),
            proxy_active=Signal(2.0, now_s),
        )


class Ticks:
    """decide() and a real XdsServer, a tick a second of a clock that is moved by hand."""

    def __init__(self, server: XdsServer, routes: int) -> None:
        self._server = server
        self.routes = {route.spec.id: route for route in map(desired, range(routes))}
        self.signals: Mapping[RouteId, RouteSignals] = {}
        self.plan, self._memory, self.now_s = Plan({}), Memory(), 1000.0

    def tick(self, times: Times) -> int:
        """One decision on the signals as they are; the writes it caused."""
        snapshot = Snapshot(self.routes, self.signals)
        self.plan, self._memory = times.of(lambda: decide(snapshot, self._memory, self.now_s))
        self.now_s += 1.0
        return self._server.apply(self.plan)


async def bench_decide(report: Report, routes: int, ticks: int) -> None:
    """From cold until all are solved, then unchanged, then new samples that say the same, then ones that wobble."""
    server = await XdsServer.start()
    try:
        run, source = Ticks(server, routes), Signals()
        _cold(report, run, source)
        _unchanged(report, run, ticks)
        for name, wobble in (("same values again", 0.0), ("wobble of 1 %", 0.01)):
            _sampled(report, run, source, ticks, name, wobble)
    finally:
        await server.stop()


def _cold(report: Report, run: Ticks, source: Signals) -> None:
    run.signals = source.at(run.routes, run.now_s, 0.0)
    first, rest = Times(), Times()
    run.tick(first)
    name = f"decide, {len(run.routes)} new routes"
    calls = 1
    # The guard's steps follow the last solve: settled is when nothing moves for ten seconds.
    quiet = 0
    while quiet < 10 and calls < 300:
        run.signals = source.at(run.routes, run.now_s, 0.0)
        quiet = 0 if run.tick(rest) else quiet + 1
        calls += 1
    report.add(
        Figure(f"{name}, first call", first.wall_ms[0], "ms", note=f"CPU {first.cpu_ms[0]:.0f} ms"),
        *rest.figures(f"{name}, each call after it", None, "25 tables solved in each"),
        Figure(f"{name}, calls until nothing moves", calls - quiet, "calls", note="one a second"),
    )


def _unchanged(report: Report, run: Ticks, ticks: int) -> None:
    """The same signals: what a tick costs when nothing was measured since."""
    times = Times()
    run.now_s -= 1.0
    writes = 0
    for _ in range(ticks):
        run.now_s -= 0.9  # ten looks a second: within the second the signals are the same objects
        writes += run.tick(times)
    report.add(*times.figures(f"decide, {len(run.routes)} unchanged routes", DECIDE_MS))
    report.add(Figure("writes caused", writes, "resources", at_most(0), "counted at a real xDS server"))


def _sampled(report: Report, run: Ticks, source: Signals, ticks: int, name: str, wobble: float) -> None:
    """New samples of every signal each second. The first seconds settle the smoothed values."""
    times, settling, writes = Times(), Times(), 0
    for number in range(2 * ticks):
        run.signals = source.at(run.routes, run.now_s, wobble)
        count = run.tick(settling if number < ticks else times)
        writes += count if number >= ticks else 0
    report.add(*times.figures(f"decide, {len(run.routes)} routes, {name}", None, "every signal of every route is new"))
    report.add(Figure(f"writes caused, {name}", writes, "resources", at_most(0)))


# --------------------------------------------------------------------------------------------------------------- main


def main(
    as_json: JsonOption = False,
    routes: Annotated[int, typer.Option("--routes", help="How many routes decide() gets.")] = ROUTES,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer repeats, no memory.")] = False,
) -> None:
    """Time the solver and decide(), and weigh a controller of 1000 routes."""
    quiet_logs()
    report = Report("solver")
    progress("solver: 30 cases, cold, warm and naive")
    bench_solver(report, *((1, 10) if quick else (7, 1)))
    progress(f"decide(): {routes} routes of {sum(FLEET.values())} endpoints")
    asyncio.run(bench_decide(report, routes, 3 if quick else 10))
    if not quick:
        progress("memory: a controller, an Envoy, a thousand routes")
        with tempfile.TemporaryDirectory(prefix="meshctl-bench-") as directory:
            asyncio.run(measure_memory(report, Path(directory)))
    report.show(as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
