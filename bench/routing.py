"""Where requests go, and what comes of it: Istio's default against meshctl.

    python bench/routing.py [--json] [--load 0.8] [--seconds 30] [--seeds 1,2,3] [--quick] [--peers] [--only real|...]

Three parts: `real` sends the reference load through real Envoys, with a real controller and its signals; `slow` makes
one V100 twice as slow under them; `tables` is the event simulation of every policy, 1 and 16 Envoys, several loads.
Only the GPUs are simulated in the first two. Ratios are of one run: both policies get the same requests at the same
times on the same machine, one after the other. A run whose generator was late (p99 above `LAG_LIMIT_MS`) measured the
machine, is repeated up to twice, and marked if it stays so.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvloop
from rich.table import Table

if not __package__:  # run as a file: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import tables
from bench.report import Figure, JsonOption, Report, at_least, progress
from meshctl.cli.output import console
from meshctl.controller.views import RouteView
from meshctl.errors import InputError, MeshctlError
from meshctl.openfiles import allow_many_connections
from meshctl.sim.children import until_signal
from meshctl.sim.envoy import Balancing
from meshctl.sim.faults import Faults
from meshctl.sim.load import calm_gc
from meshctl.sim.reference import capacity_rps
from meshctl.sim.versus import (
    LAG_LIMIT_MS,
    MESHCTL,
    REACTED,
    SETTLE_SEED,
    LocalStand,
    Measured,
    Stand,
    endpoint_of,
    part_of,
    ratio,
    stand,
)

SLOW_LOAD, SLOW_FACTOR = 0.75, 2.0
LOADS = (0.60, 0.75, 0.80, 0.85, 0.95)
GATEWAYS = (1, 16)
REACT_LIMIT_S = 60.0
_TRIES = 3
_POLL_S = 0.1


class Part(StrEnum):
    REAL = "real"
    SLOW = "slow"
    TABLES = "tables"


def main(
    as_json: JsonOption = False,
    load: Annotated[float, typer.Option("--load", help="Part of the capacity, in the real comparison.")] = 0.8,
    seconds: Annotated[float, typer.Option("--seconds", help="Measured time per real run.")] = 30.0,
    seeds: Annotated[str, typer.Option("--seeds", help="Comma-separated; each is one run of every policy.")] = "1,2,3",
    quick: Annotated[bool, typer.Option("--quick", help="One seed, 5 s per run, few tables: does it work?")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Also round robin and full scan through real Envoys.")] = False,
    only: Annotated[list[Part] | None, typer.Option("--only", help="Parts to run; all by default.")] = None,
) -> None:
    """Measure routing and print it."""
    found = (1,) if quick else seeds_of(seeds)
    seconds = 5.0 if quick else seconds
    report = Report("routing")
    parts = only or list(Part)
    if Part.REAL in parts or Part.SLOW in parts:
        allow_many_connections()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            ended = runner.run(until_signal(_real(report, parts, load, seconds, found, peers=peers)))
        if ended is not None:
            raise typer.Exit(128 + ended)
    if Part.TABLES in parts:
        _tables(report, found, quick=quick)
    if Part.TABLES in parts and not as_json:
        console().print(_grid([tables.Cell(**cell) for cell in report.details["tables"]]))
    report.show(as_json=as_json)


def seeds_of(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--seeds {text!r} is not a list of whole numbers, e.g. 1,2,3") from error


# ------------------------------------------------------------------------------------------------------- real Envoys


async def _real(
    report: Report, parts: Sequence[Part], load: float, seconds: float, seeds: Sequence[int], *, peers: bool
) -> None:
    if Part.REAL in parts:
        others = list(Balancing) if peers else [Balancing.ISTIO_DEFAULT]
        async with stand(load * capacity_rps(), peers=others, say=progress) as made:
            calm_gc()
            await made.run(_compare(report, made, [*map(str, others), MESHCTL], seconds, seeds, load))
    if Part.SLOW in parts:
        async with stand(SLOW_LOAD * capacity_rps(), peers=(), say=progress) as made:
            calm_gc()
            await made.run(_slow(report, made, seconds, seeds))
        _slow_simulated(report, seeds, seconds)


async def _compare(
    report: Report, made: LocalStand, policies: Sequence[str], seconds: float, seeds: Sequence[int], load: float
) -> None:
    runs: dict[str, list[Measured]] = {policy: [] for policy in policies}
    settled: list[float | None] = []
    for seed in seeds:
        for policy in policies:
            if policy == MESHCTL:
                settled.append(await made.settle(seed + SETTLE_SEED))
            progress(f"seed {seed}: {policy}, {seconds:g} s")
            runs[policy].append(await measure(made, policy, seed, seconds))
    view = await made.route()
    report.details["real"] = {
        "what": "real Envoys, controller and requests; simulated GPUs",
        "data_plane": made.data_plane,
        "load_rps": made.rate_rps,
        "seeds": list(seeds),
        "seconds": seconds,
        "settled_s": settled,
        "solved_for_rps": view.load_rps,
        "weights": _weights(view),
        "runs": {policy: [asdict(run) | {"valid": run.valid} for run in found] for policy, found in runs.items()},
    }
    _compared(report, runs, load, made.data_plane)


async def measure(made: Stand, policy: str, seed: int, seconds: float) -> Measured:
    """The run whose generator was least late, of up to `_TRIES`, stopping at the first valid one."""
    found: list[Measured] = []
    for _ in range(_TRIES):
        found.append(await made.measure(policy, seed, seconds))
        if found[-1].valid or policy not in (MESHCTL, Balancing.ISTIO_DEFAULT):
            break  # of an unstable peer nothing is expected: its queues fill the generator too
        progress(f"{policy}: the generator was {found[-1].send_lag_p99_ms} ms late (p99); limit {LAG_LIMIT_MS:g} ms")
        if policy == MESHCTL:
            await made.settle(seed + SETTLE_SEED)
    return min(found, key=_lag)


def _lag(run: Measured) -> float:
    return float("inf") if run.send_lag_p99_ms is None else run.send_lag_p99_ms


def _compared(report: Report, runs: dict[str, list[Measured]], load: float, data_plane: str) -> None:
    where = f"{load:.0%} load, {data_plane}, GPUs simulated"
    ours = runs[MESHCTL]
    ratios = [ratio(b.p99_ms, a.p99_ms) or 0.0 for b, a in zip(runs[str(Balancing.ISTIO_DEFAULT)], ours, strict=True)]
    each = ", ".join(f"{r:.1f}" for r in ratios)
    report.add(
        Figure("p99 of Istio's default / p99 of meshctl", float(np.mean(ratios)), "", at_least(5), f"{where}; {each}"),
        _mean("meshctl goodput", [_percent(run.goodput) for run in ours], "%", where, 99.5),
        _mean("meshctl worst class", [_worst(run) for run in ours], "%", where, 97),
    )
    for policy, found in runs.items():
        for name in ("p50_ms", "p99_ms", "p999_ms"):
            title = f"{policy} {name.removesuffix('_ms')}"
            report.add(_mean(title, [getattr(run, name) or np.nan for run in found], "ms", where))
        if policy != MESHCTL:
            report.add(_mean(f"{policy} goodput", [_percent(run.goodput) for run in found], "%", where))
            report.add(_mean(f"{policy} worst class", [_worst(run) for run in found], "%", where))
    lags = [_lag(run) for found in runs.values() for run in found]
    invalid = sum(not run.valid for found in runs.values() for run in found)
    report.add(Figure("generator's lag, p99 of the worst run", max(lags), "ms", None, f"{invalid} runs not valid"))


def _mean(name: str, values: Sequence[float], unit: str, note: str, goal: float | None = None) -> Figure:
    each = ", ".join(f"{value:.4g}" for value in values)
    return Figure(name, float(np.mean(values)), unit, None if goal is None else at_least(goal), f"{note}; {each}")


def _percent(goodput: float | None) -> float:
    return float("nan") if goodput is None else 100 * goodput


def _worst(run: Measured) -> float:
    return _percent(min(run.goodput_by_size.values(), default=None))


def _weights(view: RouteView) -> dict[str, Any]:
    """What is in force, with the GPU of each endpoint."""
    return {e.endpoint: {"gpu": e.gpu, **e.weights} for e in view.endpoints}


# ------------------------------------------------------------------------------------------------ one V100 half as fast


async def _slow(report: Report, made: LocalStand, seconds: float, seeds: Sequence[int]) -> None:
    server = made.servers("V100")[0]
    endpoint, slow, settling = endpoint_of(server), Faults(slow=SLOW_FACTOR), seeds[0] + SETTLE_SEED
    progress("one V100 twice as slow: weights held, as if no metric had arrived")
    await made.settle(settling)
    made.write_manifests(suspend=True)
    await _until(made, "the route is suspended", lambda view: view.suspended)
    held = _weights(await made.route())
    await made.set_faults(server, slow)
    stale = [await measure(made, MESHCTL, seed, seconds) for seed in seeds]
    await made.set_faults(server, Faults())
    made.write_manifests()
    await _until(made, "the route is not suspended", lambda view: not view.suspended)
    async with made.loaded(MESHCTL, settling):
        await made.settled()
        progress("one V100 twice as slow: the loop reacts")
        before = part_of(await made.route(), endpoint)
        await made.set_faults(server, slow)
        start_s = time.monotonic()
        await _until(made, "the slow server loses weight", lambda view: part_of(view, endpoint) < REACTED * before)
        reacted_s = time.monotonic() - start_s
        settled_s = await made.settled()
    known = [await measure(made, MESHCTL, seed, seconds) for seed in seeds]
    view = await made.route()
    report.details["slow"] = {
        "what": "real Envoy, controller and requests; simulated GPUs",
        "slow_server": endpoint,
        "weights_unnoticed": held,
        "unnoticed": [asdict(run) | {"valid": run.valid} for run in stale],
        "known": [asdict(run) | {"valid": run.valid} for run in known],
        "reacted_s": reacted_s,
        "settled_s": settled_s,
        "solved_for_rps": view.load_rps,
        "weights": _weights(view),
    }
    where = f"{SLOW_LOAD:.0%} load, {made.data_plane}, GPUs simulated"
    moved = f"its part of all weights {before:.1%} -> {part_of(view, endpoint):.1%}"
    report.add(
        _mean("one V100 x2 slow, unnoticed: goodput", [_percent(run.goodput) for run in stale], "%", where, 98),
        _mean("one V100 x2 slow, known: goodput", [_percent(run.goodput) for run in known], "%", where, 99.5),
        Figure("one V100 x2 slow: until the weights move", reacted_s, "s", None, moved),
    )


async def _until(made: LocalStand, what: str, holds: Any) -> None:
    """Ask the controller until it `holds`; MeshctlError after `REACT_LIMIT_S`."""
    try:
        async with asyncio.timeout(REACT_LIMIT_S):
            while not holds(await made.route()):  # noqa: ASYNC110 (another process: there is no event to wait for)
                await asyncio.sleep(_POLL_S)
    except TimeoutError as late:
        raise MeshctlError(f"not within {REACT_LIMIT_S:g} s: {what}") from late


def _slow_simulated(report: Report, seeds: Sequence[int], seconds: float) -> None:
    stale, known = tables.slow_server(SLOW_LOAD, SLOW_FACTOR, seeds, seconds)
    note = f"{SLOW_LOAD:.0%} load, event simulation, {len(seeds)} seeds"
    report.add(
        Figure("one V100 x2 slow, unnoticed: goodput", _percent(stale), "%", at_least(98), note),
        Figure("one V100 x2 slow, known: goodput", _percent(known), "%", at_least(99.5), note),
    )


# -------------------------------------------------------------------------------------------------- event simulation


def _tables(report: Report, seeds: Sequence[int], *, quick: bool) -> None:
    progress("event simulation of every policy")
    loads, seconds = ((0.75, 0.85), 30.0) if quick else (LOADS, 130.0)
    found = tables.cells(loads, GATEWAYS, seeds, seconds)
    report.details["tables"] = [asdict(cell) for cell in found]
    goals = {("Balanced", 16, 0.75): 99.0, ("Balanced", 16, 0.85): 97.0}
    for cell in found:
        key = (cell.policy, cell.gateways, cell.load_ratio)
        if key in goals:
            name = f"Balanced, {cell.gateways} Envoys, {cell.load_ratio:.0%} load: goodput"
            note = f"event simulation, {len(seeds)} seeds; worst class {cell.worst_class:.2%}"
            report.add(Figure(name, 100 * cell.goodput, "%", at_least(goals[key]), note))


def _grid(found: Sequence[tables.Cell]) -> Table:
    """A row per policy, a column per number of Envoys and load: goodput / worst class, %."""
    columns = list(dict.fromkeys((cell.gateways, cell.load_ratio) for cell in found))
    title = "event simulation: goodput / worst size class, %; 1 and 16 Envoys"
    table = Table("policy", *(f"{many} @ {load:.0%}" for many, load in columns), title=title, box=None)
    for policy in dict.fromkeys(cell.policy for cell in found):
        row = [f"{100 * cell.goodput:.1f}/{100 * cell.worst_class:.0f}" for cell in found if cell.policy == policy]
        table.add_row(policy, *row)
    return table


if __name__ == "__main__":
    typer.run(main)
