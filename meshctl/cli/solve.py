"""`meshctl solve`: the table for a fleet and a load given in a file. Pure: nothing is asked, nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table as RichTable

from meshctl.api.solve import SolveInput, load_solve_file
from meshctl.cli.output import Output, OutputOption, emit
from meshctl.core import capacity, weights

FileOption = Annotated[Path, typer.Option("-f", "--file", help="Fleet, sizes, load and SLO, as YAML or JSON.")]


def solve(file: FileOption, output: OutputOption = Output.TABLE) -> None:
    """Print the share of each size class that each GPU class should get, and what to expect of it."""
    asked = load_solve_file(file)
    answer = answer_to(asked)
    emit(answer, output, lambda: _table(answer))


def answer_to(asked: SolveInput) -> dict[str, Any]:
    """The answer as plain data; see `meshctl solve --help` and docs/reference/solve.md for its fields."""
    used = [c for c in asked.classes if c.endpoints > 0]
    profiles = [c.service.profile() for c in used]
    service = [
        [capacity.service_s(p, s.batch) / c.available for s in asked.sizes] for c, p in zip(used, profiles, strict=True)
    ]
    fleet = weights.Fleet(
        np.array(service), np.array([float(c.endpoints) for c in used]), np.array([float(c.concurrency) for c in used])
    )
    demand = weights.Demand(asked.load_rps * np.array(asked.shares()), np.eye(len(asked.sizes)))
    table = weights.solve(asked.policy, fleet, demand, asked.slo_s)
    attained = {s.name: float(a) for s, a in zip(asked.sizes, table.attainment, strict=True)}
    busy = {c.name: float(u) for c, u in zip(used, table.utilization, strict=True)}
    feasible = min(attained.values()) >= asked.percentile / 100
    zeros = {c.name: 0.0 for c in asked.classes}
    return {
        "weights": {
            s.name: zeros | {c.name: float(w) for c, w in zip(used, row, strict=True)}
            for s, row in zip(asked.sizes, table.shares, strict=True)
        },
        "attainment": attained,
        "utilization": {c.name: busy.get(c.name, 0.0) for c in asked.classes},
        "feasible": feasible,
        "policy": asked.policy.value,
        "reasons": _reasons(asked, fleet, demand, attained, busy, feasible=feasible),
    }


def _reasons(
    asked: SolveInput,
    fleet: weights.Fleet,
    demand: weights.Demand,
    attained: dict[str, float],
    busy: dict[str, float],
    *,
    feasible: bool,
) -> list[dict[str, Any]]:
    worst = min(attained, key=lambda n: (attained[n], n))
    room = fleet.capacity_rps(demand.mix)
    target = f"{asked.percentile:g} % within {asked.slo_s * 1e3:g} ms"
    verdict = f"{attained[worst]:.2%} of {worst}, the worst size class, in time; asked: {target}"
    reasons: list[dict[str, Any]] = [
        {
            "code": "Solved" if feasible else "Infeasible",
            "subject": worst,
            "message": verdict if feasible else f"no table meets the SLO; at best {verdict}",
            "inputs": {"load_rps": asked.load_rps, "capacity_rps": room, "load_ratio": asked.load_rps / room},
        }
    ]
    slowest = {c.name: c.available for c in asked.classes if c.available < 1}
    reasons += [
        {
            "code": "ForeignUtilization",
            "subject": name,
            "message": f"{available:.0%} of each GPU is available: {1 / available:.2f} x the profile's service times",
            "inputs": {"available_ratio": available},
        }
        for name, available in slowest.items()
    ]
    reasons += [
        {
            "code": "Profile",
            "subject": c.name,
            "message": f"{c.endpoints} endpoints, utilisation {busy.get(c.name, 0.0):.0%}",
            "inputs": {"endpoints": c.endpoints, "concurrency": c.concurrency},
        }
        for c in asked.classes
    ]
    return reasons


def _table(answer: dict[str, Any]) -> RichTable:
    classes = list(answer["utilization"])
    verdict = "feasible" if answer["feasible"] else "INFEASIBLE: the best table"
    table = RichTable("size", *classes, "in time", title=f"{answer['policy']}: {verdict}", title_justify="left")
    for size, row in answer["weights"].items():
        table.add_row(size, *(f"{row[c]:.1%}" for c in classes), f"{answer['attainment'][size]:.2%}")
    table.add_section()
    table.add_row("utilisation", *(f"{answer['utilization'][c]:.0%}" for c in classes), "")
    return table
