"""How every bench prints: figures with their targets, and what they were measured on.

A figure alone means nothing on another machine, so a report carries the machine (cores, model, load average), and a
bench measures what it compares with in the same run. With --json one document; without, a table. Targets are data:
whether one is met is computed here and nowhere else.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
import structlog
import typer
from rich.table import Table

from meshctl.cli.output import Output, console, emit

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


class Bound(StrEnum):
    AT_MOST = "at most"
    AT_LEAST = "at least"


@dataclass(frozen=True, slots=True)
class Target:
    bound: Bound
    value: float

    def met(self, value: float) -> bool:
        """NaN (nothing was measured) meets nothing."""
        return value <= self.value if self.bound is Bound.AT_MOST else value >= self.value


def at_most(value: float) -> Target:
    return Target(Bound.AT_MOST, value)


def at_least(value: float) -> Target:
    return Target(Bound.AT_LEAST, value)


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number."""

    name: str
    value: float
    unit: str = ""
    target: Target | None = None
    note: str = ""
    """Of what: conditions, counts, the number compared with."""

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.met(self.value)

    def as_dict(self) -> dict[str, Any]:
        target = None if self.target is None else {"bound": self.target.bound.value, "value": self.target.value}
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "target": target,
            "met": self.met,
            "note": self.note,
        }


def quantiles(
    name: str, values: Sequence[float], unit: str, targets: Mapping[float, Target | None], note: str = ""
) -> list[Figure]:
    """A figure per quantile (0..1) in `targets`, and the median, of `values` in `unit`; the count goes to the note."""
    counted = f"{len(values)} times" + (f"; {note}" if note else "")
    named = {0.5: "median", 1.0: "worst"}
    return [
        Figure(
            f"{name}, {named.get(q, f'p{100 * q:g}')}",
            float(np.quantile(values, q)) if len(values) else float("nan"),
            unit,
            targets.get(q),
            counted,
        )
        for q in sorted({0.5, *targets})
    ]


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cores": os.cpu_count(),
        "processor": _proc("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _proc(path: str, key: str) -> str:
    """The value of the first ``key : value`` line of a file of /proc; "" where there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


@dataclass(frozen=True, slots=True)
class Report:
    """What a bench found; build it before the first measurement, so that the load average is that of before."""

    bench: str
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """Anything else worth keeping; only in the JSON."""
    machine: dict[str, Any] = field(default_factory=machine)

    def add(self, *figures: Figure) -> None:
        """Add `figures`, and say on stderr what they are: a bench takes minutes."""
        self.figures.extend(figures)
        for figure in figures:
            sys.stderr.write(f"{figure.name}: {_number(figure.value)} {figure.unit}\n")

    def as_dict(self) -> dict[str, Any]:
        figures = [figure.as_dict() for figure in self.figures]
        return {"bench": self.bench, "machine": self.machine, "figures": figures, **self.details}

    def show(self, *, as_json: bool) -> None:
        """Print on standard output."""
        if as_json:
            sys.stdout.write(orjson.dumps(self.as_dict(), option=orjson.OPT_INDENT_2).decode() + "\n")
        else:
            emit(self.as_dict(), Output.TABLE, self._table)

    def _table(self) -> Table:
        facts = self.machine
        load = "/".join(str(x) for x in facts["load_average"])
        caption = f"{facts['cores']} cores, {facts['processor']}, load average before {load}"
        table = Table("WHAT", "MEASURED", "TARGET", "", "NOTE", title=self.bench, caption=caption, box=None)
        for figure in self.figures:
            target = "" if figure.target is None else f"{figure.target.bound} {figure.target.value:g}"
            verdict = {None: "", True: "[green]met[/]", False: "[red]MISSED[/]"}[figure.met]
            table.add_row(figure.name, f"{_number(figure.value)} {figure.unit}", target, verdict, figure.note)
        return table


def _number(value: float) -> str:
    """Four significant digits, and all before the point: 99.96 % is not 100 %."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def progress(text: str) -> None:
    """What a bench is doing now, on stderr."""
    console(stderr=True).print(text)


def quiet_logs() -> None:
    """Warnings only, on stderr: standard output is the report's."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
