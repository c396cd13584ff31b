"""`meshctl place`: what a placement policy would make of a cluster, on a trace of nodes and pods given as files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Group, RenderableType
from rich.table import Column, Table

from meshctl.cli.output import Output, OutputOption, emit
from meshctl.cli.policy import PolicyOption
from meshctl.core.packing.vocabulary import Policy
from meshctl.sim.openb import SLOTS, load
from meshctl.sim.placement import Outcome, fill

MAX_ARRIVALS = 10.0
"""Times the cluster's GPUs: beyond, nothing is placed any more."""


def place(
    nodes: Annotated[
        Path,
        typer.Option("--nodes", metavar="FILE", help="CSV with columns sn, cpu_milli, memory_mib, gpu (GPUs), model."),
    ],
    pods: Annotated[
        Path,
        typer.Option(
            "--pods",
            metavar="FILE",
            help="CSV with columns name, cpu_milli, memory_mib, num_gpu, gpu_milli (of each), and gpu_spec if wanted.",
        ),
    ],
    policy: PolicyOption = Policy.STRANDING,
    arrivals: Annotated[
        float,
        typer.Option(
            "--arrivals", min=0.01, max=MAX_ARRIVALS, metavar="RATIO", help="Until so much is asked for: 1 is all GPUs."
        ),
    ] = 1.3,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the order in which pods arrive.")] = 1,
    slots: Annotated[int, typer.Option("--slots", min=1, max=1000, metavar="N", help="Virtual GPUs per GPU.")] = SLOTS,
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a trace's pods arrive at an empty cluster, and say how much of its GPUs is allocated.

    The files are in the format of the openb traces (alibaba/clusterdata, cluster-trace-gpu-v2023). The pods come in a
    random order, then drawn anew; each is placed at once or lost; none departs. Nothing is asked, nothing is changed.
    """
    outcome = fill(load(nodes, pods, slots), policy, seed, arrivals, time.perf_counter)
    emit(as_dict(outcome), output, lambda: _drawn(policy, outcome))


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """The answer as plain data."""
    p50, p99 = 1e3 * np.quantile(outcome.decision_s, [0.5, 0.99])
    return {
        "allocated": {str(percent): round(share, 6) for percent, share in outcome.allocated.items()},
        "rejected": dict(outcome.rejected),
        "decisions": len(outcome.decision_s),
        "decision_ms": {"p50": round(float(p50), 4), "p99": round(float(p99), 4)},
    }


def _drawn(policy: Policy, outcome: Outcome) -> RenderableType:
    answer = as_dict(outcome)
    table = Table("ARRIVED", Column("ALLOCATED", justify="right"), box=None, pad_edge=False, header_style="")
    for percent, share in answer["allocated"].items():
        table.add_row(f"{percent} %", f"{share:.2%}")
    lost = ", ".join(f"{count} {reason}" for reason, count in answer["rejected"].items()) or "none"
    times = answer["decision_ms"]
    spent = f"{answer['decisions']} decisions, p50 {times['p50']:.3g} ms, p99 {times['p99']:.3g} ms"
    return Group(f"{policy}: share of the cluster's GPUs", table, spent, f"lost: {lost}")
