"""`meshctl routes`: one line per route."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from meshctl.cli.client import DEFAULT_ADMIN, AdminOption, fetch
from meshctl.cli.output import Output, OutputOption, emit

if TYPE_CHECKING:
    from rich.table import Table

    from meshctl.controller.views import RouteSummary


def routes(admin: AdminOption = DEFAULT_ADMIN, output: OutputOption = Output.TABLE) -> None:
    """List the routes: policy, load, SLO and whether it is met."""
    from pydantic import TypeAdapter

    from meshctl.controller.views import RouteSummary

    found = fetch(admin, "routes", tuple[RouteSummary, ...])
    emit(TypeAdapter(tuple[RouteSummary, ...]).dump_python(found, mode="json"), output, lambda: routes_table(found))


def routes_table(found: Iterable[RouteSummary]) -> Table:
    from rich.table import Column, Table

    whole = Column("Route", no_wrap=True)  # other commands take it as an argument
    ready = Column("Ready", no_wrap=True)  # the reason, which docs/reference/status.md explains
    table = Table(whole, "Policy", "SLO", "Load", "Worst size", "Endpoints", ready)
    for route in found:
        expected = "-" if route.attainment is None else f"{route.attainment:.2%}"
        drained = f", [red]{route.drained} drained[/]" if route.drained else ""
        colour = {"True": "green", "False": "red"}.get(route.ready, "yellow")
        table.add_row(
            route.route,
            route.policy,
            f"{route.slo_s * 1000:g} ms",
            f"{route.load_rps:.1f}/s",
            expected if route.feasible else f"[red]{expected}[/]",
            f"{route.endpoints}{drained}",
            f"[{colour}]{route.reason}[/]",
        )
    return table
