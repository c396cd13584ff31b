"""How much of a cluster's GPUs each placement policy can use, on the openb traces, and how long a decision takes.

    python -m bench.placement [--json] [--quick] [--all] [--seeds N] [--only fill|churn|latency]

`fill`: the experiment of "Beware of Fragmentation" (USENIX ATC '23), see meshctl/sim/placement.py: four traces, means
over the seeds, every policy on the same draws. `churn`: pods depart, load 95 %. `latency`: one policy at a time; wall
time, and the CPU time of all decisions together (a decision's own is not to be had: asking for it takes longer). The
traces are not part of the project: it says where they come from when they are not found in $OPENB_DIR.

Beside the figures stand, as notes, what the paper's authors measured and what no policy could pass: the LP bound, which
places fractions of pods.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

if not __package__:  # run as a file: the project's root is not on the path then
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.report import Figure, JsonOption, Report, at_least, at_most, quantiles
from meshctl.core.packing.vocabulary import Policy
from meshctl.sim import openb
from meshctl.sim.placement import churn, fill

SEEDS, QUICK_SEEDS = 10, 2
ARRIVALS, CHURN_LOAD = 1.3, 0.95
FULL = 100
P50_MS, P99_MS = 0.15, 0.5
DEFAULT = "default"
TARGETS: Mapping[str, float] = {DEFAULT: 95.86, "gpushare40": 94.4, "gpushare100": 87.0, "multigpu20": 96.4}
"""Per cent allocated by the default policy when as much was asked for as there is."""
BOUNDS: Mapping[str, float] = {DEFAULT: 96.90, "gpushare40": 95.67, "gpushare100": 89.14, "multigpu20": 97.32}
"""LP relaxation, computed once outside this bench."""
PAPER: Mapping[Policy, float] = {
    Policy.FGD: 95.23,
    Policy.BESTFIT: 92.86,
    Policy.PACKING: 91.78,
    Policy.DOTPROD: 90.62,
    Policy.RANDOM: 86.30,
}
"""Published, trace `default`, 100 % arrived."""
COMPARED = (Policy.STRANDING, Policy.FGD)


class Part(StrEnum):
    FILL = "fill"
    CHURN = "churn"
    LATENCY = "latency"


# --------------------------------------------------------------------------------------- what runs in other processes


def filled(directory: Path, trace: str, policy: Policy, seed: int) -> Mapping[int, float]:
    """Arrived per cent -> allocated share."""
    return fill(openb.published(trace, directory), policy, seed, ARRIVALS, time.perf_counter).allocated


def churned(directory: Path, policy: Policy, seed: int) -> float:
    """Allocated share while pods come and go."""
    (share,) = churn(
        openb.published(DEFAULT, directory), policy, seed, CHURN_LOAD, time.perf_counter
    ).allocated.values()
    return share


# ------------------------------------------------------------------------------------------------------------ the parts


def bench_fill(
    report: Report, pool: ProcessPoolExecutor, directory: Path, policies: Iterable[Policy], seeds: int
) -> None:
    for trace in openb.TRACES:
        for policy in policies:
            runs = list(pool.map(partial(filled, directory, trace, policy), range(seeds)))
            found = {percent: 100 * float(np.mean([run[percent] for run in runs])) for percent in runs[0]}
            more = ", ".join(f"{share:.2f} at {percent} %" for percent, share in found.items() if percent > FULL)
            spread = 100 * float(np.std([run[FULL] for run in runs]))
            notes = [f"{seeds} seeds, standard deviation {spread:.2f}; {more}", *_beside(trace, policy)]
            target = at_least(TARGETS[trace]) if policy is Policy.STRANDING else None
            report.add(Figure(f"{trace}, {policy}: allocated", found[FULL], "%", target, "; ".join(notes)))


def _beside(trace: str, policy: Policy) -> list[str]:
    """Numbers of others."""
    bound = [f"LP bound {BOUNDS[trace]:.2f}"] if policy is Policy.STRANDING else []
    return bound + ([f"the paper: {PAPER[policy]:.2f}"] if trace == DEFAULT and policy in PAPER else [])


def bench_churn(report: Report, pool: ProcessPoolExecutor, directory: Path, seeds: int) -> None:
    """The same pods with the same lifetimes for both, so the difference is the policies'."""
    runs = {policy: list(pool.map(partial(churned, directory, policy), range(seeds))) for policy in COMPARED}
    for policy, shares in runs.items():
        note = f"{seeds} seeds, standard deviation {100 * float(np.std(shares)):.2f}; offered {CHURN_LOAD:.0%}"
        report.add(Figure(f"departures, {policy}: allocated", 100 * float(np.mean(shares)), "%", note=note))
    ahead = 100 * (np.array(runs[Policy.STRANDING]) - np.array(runs[Policy.FGD]))
    error = float(np.std(ahead)) / max(seeds - 1, 1) ** 0.5
    note = f"same draws; standard error {error:.2f}"
    report.add(Figure("departures: stranding less fgd", float(np.mean(ahead)), "points", at_least(0), note))


def bench_latency(report: Report, directory: Path) -> None:
    """Choosing and charging, on 1213 nodes."""
    trace = openb.published(DEFAULT, directory)
    for policy in COMPARED:
        began_s = time.process_time()
        wall_ms = list(1e3 * fill(trace, policy, 0, ARRIVALS, time.perf_counter).decision_s)
        mean_ms = 1e3 * (time.process_time() - began_s) / len(wall_ms)
        targets = (
            {0.5: at_most(P50_MS), 0.99: at_most(P99_MS)} if policy is Policy.STRANDING else {0.5: None, 0.99: None}
        )
        note = f"CPU {mean_ms:.3f} ms on the mean, with the experiment's own and the reasons of lost pods"
        report.add(*quantiles(f"decision, {policy}", wall_ms, "ms", targets, note))


def main(
    as_json: JsonOption = False,
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_SEEDS} seeds.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every policy, not only those with a target.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", min=1)] = SEEDS,
    only: Annotated[list[Part] | None, typer.Option("--only", help="A part; may be given again.")] = None,
) -> None:
    directory = openb.find(Path(__file__).parents[1])
    if directory is None:
        sys.exit(f"the openb traces are neither in ${openb.ENVIRONMENT} nor in {openb.DEFAULT_DIR}: {openb.ORIGIN}")
    report = Report("placement")
    count = QUICK_SEEDS if quick else seeds
    parts = only or list(Part)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, count)) as pool:
        if Part.FILL in parts:
            bench_fill(report, pool, directory, tuple(Policy) if every else COMPARED, count)
        if Part.CHURN in parts:
            bench_churn(report, pool, directory, count)
    if Part.LATENCY in parts:
        bench_latency(report, directory)
    report.show(as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
