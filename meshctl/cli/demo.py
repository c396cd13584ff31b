"""`meshctl demo`: the before and after on this machine: a simulated fleet, real Envoys, a real controller."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from meshctl.errors import InputError, MeshctlError

if TYPE_CHECKING:
    from rich.console import Group

    from meshctl.sim.demo import Comparison
    from meshctl.sim.versus import Say, Stand


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
    from meshctl.sim.versus import stand

    asked = Asked(once=once, as_json=as_json, load=load, seconds=seconds, seed=seed, signals=signals)
    show(asked, lambda rate_rps, say: stand(rate_rps, with_prometheus=signals is Signals.PROMETHEUS, say=say))


@dataclass(frozen=True, slots=True)
class Asked:
    """The options of a demo. Raises InputError when they make no sense."""

    once: bool
    as_json: bool
    load: float
    seconds: float | None
    seed: int
    signals: Signals

    def __post_init__(self) -> None:
        if self.as_json and not self.once:
            raise InputError("--json prints one measurement: use it with --once")
        if not 0 < self.load < 2:
            raise InputError(f"--load must be above 0 and below 2 (1 is all that the fleet can do), not {self.load:g}")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise InputError(f"--seconds must be more than 0, not {self.seconds:g}")


Builder = Callable[[float, "Say"], AbstractAsyncContextManager["Stand"]]
"""(requests per second, where to say what is being done) -> a stand."""


def show(asked: Asked, build: Builder) -> None:
    """The demo on the stand that `build` makes; ends what it started."""
    import uvloop

    from meshctl.sim.children import until_signal

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ended = runner.run(until_signal(_once(asked, build) if asked.once else _live(asked, build)))
        if asked.once and ended is not None:
            raise MeshctlError(f"interrupted by {ended.name}: nothing was measured")


def _say(text: str) -> None:
    sys.stderr.write(f"demo: {text}\n")
    sys.stderr.flush()


async def _once(asked: Asked, build: Builder) -> None:
    from meshctl.cli.output import Output, emit
    from meshctl.openfiles import allow_many_connections
    from meshctl.sim.demo import compare
    from meshctl.sim.load import calm_gc
    from meshctl.sim.reference import capacity_rps

    allow_many_connections()
    async with build(asked.load * capacity_rps(), _say) as made:
        calm_gc()

        async def work() -> None:
            found = await compare(made, asked.signals.value, asked.seconds or 30.0, asked.seed, _say)
            emit(found.as_dict(), Output.JSON if asked.as_json else Output.TABLE, lambda: _table(found))

        await made.run(work())


async def _live(asked: Asked, build: Builder) -> None:
    from rich.live import Live

    from meshctl.cli.demo_view import About, View, numbers
    from meshctl.cli.output import console
    from meshctl.openfiles import allow_many_connections
    from meshctl.sim.demo import Show
    from meshctl.sim.load import calm_gc
    from meshctl.sim.reference import capacity_rps

    allow_many_connections()
    screen, seconds = console(), asked.seconds or 20.0
    async with build(asked.load * capacity_rps(), _say) as made:
        calm_gc()
        if not screen.is_terminal:
            await made.run(Show(made, seconds, asked.seed, lambda _: None, screen.print).run())
            return
        about = About(asked.load, made.rate_rps, made.data_plane, asked.signals.value, made.controller.admin)
        view = View(about, screen)
        try:
            with Live(view, console=screen, screen=True, auto_refresh=False) as live:
                show = Show(made, seconds, asked.seed, lambda _: live.refresh(), lambda _: None)
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
