"""`meshctl explain ROUTE`: each weight, and why it is what it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from meshctl.cli.client import DEFAULT_ADMIN, AdminOption, fetch, unknown
from meshctl.cli.output import Output, OutputOption, emit
from meshctl.errors import InputError

if TYPE_CHECKING:
    from rich.tree import Tree

    from meshctl.controller.views import EndpointView, InputView, ReasonView, RouteView

RouteArgument = Annotated[str, typer.Argument(metavar="ROUTE", help="NAME, or NAMESPACE/NAME.")]


def explain(route: RouteArgument, admin: AdminOption = DEFAULT_ADMIN, output: OutputOption = Output.TABLE) -> None:
    """Explain each weight of a route: what was decided, from which numbers, how old they are."""
    from pydantic import TypeAdapter

    from meshctl.controller.views import RouteView

    path = route if route.count("/") == 1 else _full_name(route, admin)
    view = fetch(admin, f"explain/{path}", RouteView)
    emit(TypeAdapter(RouteView).dump_python(view, mode="json"), output, lambda: _tree(view))


def _full_name(name: str, admin: str) -> str:
    """``namespace/name`` of the only route named `name`."""
    from meshctl.controller.views import RouteSummary

    known = [summary.route for summary in fetch(admin, "routes", tuple[RouteSummary, ...])]
    matching = [route for route in known if route.partition("/")[2] == name]
    match matching:
        case [only]:
            return only
        case []:
            raise unknown(f"no route {name}", "routes", known)
        case _:
            raise InputError(f"{name} is ambiguous; write one of: {', '.join(matching)}")


def _tree(view: RouteView) -> Tree:
    from rich.tree import Tree

    goal = f"{view.percentile:.2%} within {view.slo_s * 1000:g} ms"
    root = Tree(f"[bold]{view.route}[/]  {view.model}, {view.policy}, goal {goal}, solved for {view.load_rps:.1f}/s")
    _conditions(root, view)
    for problem in view.problems:
        root.add(f"[red]{escape(problem.where)}[/]: {escape(problem.message)}")
    _reasons(root, view.reasons)
    sizes = root.add("[bold]sizes[/]")
    for size in view.sizes:
        bounds = "no or unusable size" if size.min_batch is None else f"batch {size.min_batch}..{size.max_batch}"
        expected = "" if size.attainment is None else f", {size.attainment:.2%} expected within the SLO"
        arrivals = "" if size.arrivals is None else f", {_input(size.arrivals)}"
        _reasons(sizes.add(f"[bold]{size.size}[/] ({bounds}){expected}{arrivals}"), size.reasons)
    if view.gpus:
        gpus = root.add("[bold]GPU products[/]")
        for gpu in view.gpus:
            _reasons(gpus.add(f"[bold]{gpu.gpu or 'unknown'}[/]"), gpu.reasons)
    endpoints = root.add("[bold]endpoints[/] (weights of 1000)")
    for endpoint in view.endpoints:
        _endpoint(endpoints, endpoint)
    return root


def _conditions(root: Tree, view: RouteView) -> None:
    for condition in view.conditions:
        good, bad = ("False", "True") if condition.type == "Conflict" else ("True", "False")
        colour = {good: "green", bad: "red"}.get(condition.status, "yellow")
        root.add(f"[{colour}]{condition.type}={condition.status}[/] {condition.reason}: {escape(condition.message)}")


def _endpoint(parent: Tree, endpoint: EndpointView) -> None:
    weights = "  ".join(f"{size} [bold]{weight}[/]" for size, weight in endpoint.weights.items())
    load = "" if endpoint.utilization is None else f"  utilisation {endpoint.utilization:.0%}"
    state = "  [red]drained[/]" if endpoint.drained else "" if endpoint.ready else "  [yellow]not ready[/]"
    node = parent.add(f"[bold]{endpoint.endpoint}[/] {endpoint.gpu or 'unknown GPU'}:  {weights}{load}{state}")
    _reasons(node, endpoint.reasons)
    for line in _measured(endpoint.signals):
        node.add(f"[dim]{line}[/]")


def _measured(signals: Iterable[InputView]) -> list[str]:
    """A line for each age and state: ``0.3 s old, fresh: pending 2 requests; ...``; what is absent is left out."""
    lines: dict[str, list[str]] = {}
    for signal in signals:
        if signal.age_s is not None:
            lines.setdefault(f"{signal.age_s:.1f} s old, {signal.state}", []).append(_value(signal))
    return [escape(f"{age}: {'; '.join(values)}") for age, values in lines.items()]


def _reasons(parent: Tree, reasons: Iterable[ReasonView]) -> None:
    for reason in reasons:
        inputs = "; ".join(_input(item) for item in reason.inputs)
        parent.add(f"[cyan]{reason.code}[/] {escape(reason.message)}" + (f"  [dim]({inputs})[/]" if inputs else ""))


def _input(item: InputView) -> str:
    """``service_s 0.0058 s, 1.2 s old, fresh``."""
    age = "" if item.age_s is None else f", {item.age_s:.1f} s old"
    state = "" if item.state is None else f", {item.state}"
    return escape(f"{_value(item)}{age}{state}")


def _value(item: InputView) -> str:
    if item.value is None:
        return item.name if item.state == "no-traffic" else f"{item.name} unknown"
    value = f"{item.value:.4g}" if isinstance(item.value, float) else item.value
    return f"{item.name} {value} {item.unit}".rstrip()
