"""`meshctl demo`: the before and after on this machine: a simulated fleet, real Envoys, a real controller."""

from __future__ import annotations

import asyncio
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from meshctl.errors import InputError, MeshctlError

if TYPE_CHECKING:
    from rich.console import Group

    from meshctl.sim.demo import Comparison


class Signals(StrEnum):
    """Where the controller takes its signals from."""

    SCRAPE = "scrape"
    PROMETHEUS = "prometheus"


def demo(
    once: Annotated[bool, typer.Option("--once", help="Measure both policies once, print, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: print JSON.")] = False,
    load: Annotated[float, typer.Option("--load", help="Part of the fleet's capacity that is asked for.")] = 0.8,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Measured time per policy (default 30, or 20 in the live view).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same seed sends the same requests at the same times.")] = 1,
    signals: Annotated[
        Signals, typer.Option("--signals", help="Scrape the servers, or ask a Prometheus that is started for it.")
    ] = Signals.SCRAPE,
) -> None:
    """Show the same load through Istio's default and through meshctl, live until Ctrl-C."""
    if as_json and not once:
        raise InputError("--json prints one measurement: use it with --once")
    if not 0 < load < 2:
        raise InputError(f"--load must be above 0 and below 2 (1 is all that the fleet can do), not {load:g}")
    if seconds is not None and not 0 < seconds < float("inf"):
        raise InputError(f"--seconds must be more than 0, not {seconds:g}")
    import uvloop

    from meshctl.sim.children import until_signal

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if once:
            ended = runner.run(until_signal(_once(as_json, load, seconds or 30.0, seed, signals)))
            if ended is not None:
                raise MeshctlError(f"interrupted by {ended.name}: nothing was measured")
        else:
            runner.run(until_signal(_live(load, seconds or 20.0, seed, signals)))


def _say(text: str) -> None:
    sys.stderr.write(f"demo: {text}\n")
    sys.stderr.flush()


async def _once(as_json: bool, load: float, seconds: float, seed: int, signals: Signals) -> None:
    from meshctl.cli.output import Output, emit
    from meshctl.sim.demo import compare
    from meshctl.sim.load import allow_many_connections, calm_gc
    from meshctl.sim.reference import capacity_rps
    from meshctl.sim.versus import stand

    allow_many_connections()
    async with stand(load * capacity_rps(), with_prometheus=signals is Signals.PROMETHEUS, say=_say) as made:
        calm_gc()

        async def work() -> None:
            found = await compare(made, signals.value, seconds, seed, _say)
            emit(found.as_dict(), Output.JSON if as_json else Output.TABLE, lambda: _table(found))

        await made.run(work())


async def _live(load: float, seconds: float, seed: int, signals: Signals) -> None:
    from rich.live import Live

    from meshctl.cli.demo_view import About, View, numbers
    from meshctl.cli.output import console
    from meshctl.sim.demo import Show
    from meshctl.sim.load import allow_many_connections, calm_gc
    from meshctl.sim.reference import capacity_rps
    from meshctl.sim.versus import stand

    allow_many_connections()
    screen = console()
    async with stand(load * capacity_rps(), with_prometheus=signals is Signals.PROMETHEUS, say=_say) as made:
        calm_gc()
        if not screen.is_terminal:
            await made.run(Show(made, seconds, seed, lambda _: None, screen.print).run())
            return
        about = About(load, made.rate_rps, made.data_plane, signals.value, made.controller.admin)
        view = View(about, screen)
        try:
            with Live(view, console=screen, screen=True, auto_refresh=False) as live:
                show = Show(made, seconds, seed, lambda _: live.refresh(), lambda _: None)
                view.scene = show.scene
                await made.run(show.run())
        finally:
            screen.print(numbers(view.scene))  # the live screen goes with its end


def _table(found: Comparison) -> Group:
    from rich.console import Group
    from rich.table import Table

    from meshctl.sim.versus import ratio

    policies = (found.before, found.after)
    table = Table("", *(policy.name for policy in policies), box=None)
    for name in ("p50_ms", "p99_ms", "p999_ms"):
        table.add_row(name.removesuffix("_ms"), *(f"{getattr(policy, name)} ms" for policy in policies))
    table.add_row("goodput", *(f"{policy.goodput or 0:.2%}" for policy in policies))
    for size in found.before.goodput_by_size:
        table.add_row(f"  {size}", *(f"{policy.goodput_by_size.get(size, 0):.2%}" for policy in policies))
    table.add_row("requests", *(f"{policy.requests}, {policy.failed} failed" for policy in policies))
    shorter = ratio(found.before.p99_ms, found.after.p99_ms)
    what = f"p99 {shorter} times shorter; {found.load_rps:.0f} requests/s; {found.data_plane}; signals: {found.signals}"
    return Group(table, what)
