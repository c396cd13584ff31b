"""`meshctl place`: what a placement policy would make of a cluster, on a trace of nodes and pods given as files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from meshctl.cli.output import Output, OutputOption, emit
from meshctl.core.packing.vocabulary import Policy
from meshctl.sim.openb import SLOTS, load
from meshctl.sim.placement import Outcome, fill

MAX_ARRIVALS = 10.0
"""Times the cluster's GPUs: beyond, nothing is placed any more."""


def place(
    nodes: Annotated[Path, typer.Option("--nodes", help="CSV: sn,cpu_milli,memory_mib,gpu,model.")],
    pods: Annotated[Path, typer.Option("--pods", help="CSV: name,cpu_milli,memory_mib,num_gpu,gpu_milli[,gpu_spec].")],
    policy: Annotated[Policy, typer.Option("--policy", help="How one of the places that fit is chosen.")] = (
        Policy.STRANDING
    ),
    arrivals: Annotated[
        float,
        typer.Option("--arrivals", min=0.01, max=MAX_ARRIVALS, help="Until so much is asked for: 1 is all GPUs."),
    ] = 1.3,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the order in which pods arrive.")] = 1,
    slots: Annotated[int, typer.Option("--slots", min=1, max=1000, help="Virtual GPUs per GPU.")] = SLOTS,
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a trace's pods arrive at an empty cluster, and say how much of its GPUs is allocated.

    The files are in the format of the openb traces (alibaba/clusterdata, cluster-trace-gpu-v2023). The pods come in a
    random order, then drawn anew; each is placed at once or lost; none departs. Nothing is asked, nothing is changed.
    """
    outcome = fill(load(nodes, pods, slots), policy, seed, arrivals, time.perf_counter)
    emit(as_dict(outcome), output, lambda: _table(policy, outcome))


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """The answer as plain data."""
    p50, p99 = 1e3 * np.quantile(outcome.decision_s, [0.5, 0.99])
    return {
        "allocated": {str(percent): round(share, 6) for percent, share in outcome.allocated.items()},
        "rejected": dict(outcome.rejected),
        "decisions": len(outcome.decision_s),
        "decision_ms": {"p50": round(float(p50), 4), "p99": round(float(p99), 4)},
    }


def _table(policy: Policy, outcome: Outcome) -> Table:
    answer = as_dict(outcome)
    table = Table(
        "ARRIVED", "ALLOCATED", title=f"{policy}: share of the cluster's GPUs", title_justify="left", box=None
    )
    for percent, share in answer["allocated"].items():
        table.add_row(f"{percent} %", f"{share:.2%}")
    lost = ", ".join(f"{count} {reason}" for reason, count in answer["rejected"].items()) or "none"
    times = answer["decision_ms"]
    table.caption = (
        f"{answer['decisions']} decisions, p50 {times['p50']:.3g} ms, p99 {times['p99']:.3g} ms; lost: {lost}"
    )
    return table
