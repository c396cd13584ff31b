"""`meshctl status [-w]`: the controller, its proxies, its problems and its routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from meshctl.cli.client import DEFAULT_ADMIN, AdminOption, fetch
from meshctl.cli.output import Output, OutputOption, emit, live
from meshctl.cli.routes import routes_table

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from meshctl.controller.views import ProxyView, StatusView

REFRESH_S = 1.0
"""The controller's tick: nothing changes faster but by hand."""

PROBLEMS_SHOWN = 10
"""Of each source: a fleet that is down must not scroll everything else away."""
PROXIES_SHOWN = 20
"""Where there are hundreds, those in sync are of no interest."""

WatchOption = Annotated[bool, typer.Option("-w", "--watch", help="Keep showing it, until Ctrl-C.")]


def status(admin: AdminOption = DEFAULT_ADMIN, output: OutputOption = Output.TABLE, watch: WatchOption = False) -> None:
    """Show the controller: proxies, problems, signals and routes."""
    from pydantic import TypeAdapter

    from meshctl.controller.views import StatusView

    if watch:
        live(lambda: _render(fetch(admin, "status", StatusView)), REFRESH_S)
        return
    view = fetch(admin, "status", StatusView)
    emit(TypeAdapter(StatusView).dump_python(view, mode="json"), output, lambda: _render(view))


def _render(view: StatusView) -> Group:
    from rich.console import Group
    from rich.markup import escape

    parts: list[RenderableType] = [_headline(view), proxies_table(view.proxies), routes_table(view.routes)]
    for source, problems in view.problems.items():
        shown = problems[:PROBLEMS_SHOWN]
        parts += [f"[red]{source}[/] " + escape(f"{problem.where}: {problem.message}") for problem in shown]
        if len(problems) > len(shown):
            parts.append(f"[red]{source}[/] and {len(problems) - len(shown)} more; -o json shows all")
    return Group(*parts)


def _headline(view: StatusView) -> str:
    state = "[red]not ready[/]" if not view.ready else "[yellow]degraded[/]" if view.degraded else "[green]ready[/]"
    signals = ", ".join(f"{count} {name}" for name, count in view.signals.items() if count) or "none"
    return (
        f"meshctl {view.version} {state}, up {view.uptime_s:.0f} s, {len(view.routes)} routes, "
        f"endpoints' signals: {signals}"
    )


def proxies_table(proxies: Sequence[ProxyView]) -> RenderableType:
    """A line per proxy, those first that are not in sync; of many the rest is counted."""
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    if not proxies:
        return "[yellow]no proxy is connected[/]; `meshctl envoy bootstrap` prints what one needs"
    table = Table("Proxy", "Admin", "State")
    late_first = sorted(proxies, key=lambda proxy: proxy.synced)
    for proxy in late_first[:PROXIES_SHOWN]:
        state = f"[red]refused:[/] {escape(proxy.error)}" if proxy.error else "synced" if proxy.synced else "pending"
        table.add_row(escape(proxy.node), escape(proxy.admin) or "-", state)
    rest = late_first[PROXIES_SHOWN:]
    if not rest:
        return table
    late = sum(not proxy.synced for proxy in rest)
    return Group(table, f"and {len(rest)} more, {late} of them not in sync; `meshctl proxy-status` shows all")
