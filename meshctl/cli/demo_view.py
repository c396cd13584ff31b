"""The demo's live view: both policies' numbers, the weights in force with their reasons, and what happened.

Fits 80 columns and 24 lines; more lines show more events, more columns longer reasons. Colours only add: every number
stands there without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from meshctl.controller.views import EndpointView
from meshctl.sim.demo import AFTER, BEFORE, Scene, why
from meshctl.sim.reference import PROFILES, SLO_S
from meshctl.sim.versus import Measured

_FIXED_LINES = 20
"""All but the events."""
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_MS = 40.0
"""The lowest bar; each next one is half as much again."""
_COLOURS = {BEFORE: "red", AFTER: "green"}


@dataclass(frozen=True, slots=True)
class About:
    """What does not change while it shows."""

    load_ratio: float
    rate_rps: float
    data_plane: str
    signals: str
    admin: str
    """URL of the controller's admin API."""


class View:
    """Draws a Scene; rich asks for it at each refresh."""

    def __init__(self, about: About, console: Console) -> None:
        self.scene = Scene()
        self._about, self._console = about, console

    def __rich__(self) -> RenderableType:
        height, width = self._console.height, self._console.width
        parts = [*self._head(), numbers(self.scene), _curve(self.scene, width), self._fleet(width)]
        events = list(self.scene.events)[-max(1, height - _FIXED_LINES) :]
        parts += [Text(event, no_wrap=True, overflow="ellipsis") for event in events]
        parts.append(f"[dim]meshctl explain reference --admin {self._about.admin}   Ctrl-C ends[/]")
        return Group(*parts)

    def _head(self) -> list[RenderableType]:
        about, slo_ms = self._about, 1e3 * SLO_S
        fleet = f"{about.rate_rps:.0f} requests/s, {about.load_ratio:.0%} of what 12 GPUs can do; SLO {slo_ms:.0f} ms"
        scene = self.scene
        if not scene.policy:
            return [f"[bold]meshctl demo[/]  {fleet}", "starting"]
        state = f"[red]{scene.fault}[/]" if scene.fault else "all GPUs well"
        phase = f"[bold {_COLOURS[scene.policy]}]{scene.policy}[/]"
        time = "settling" if scene.settling else f"{scene.left_s:.0f} s"
        parts = f"{about.data_plane}, {about.signals}"
        return [
            f"[bold]meshctl demo[/]  {fleet}",
            Text.from_markup(
                f"round {scene.round}: {phase}, {state}, {time}  [dim]{parts}[/]",
                overflow="ellipsis",
            ),
        ]

    def _fleet(self, width: int) -> RenderableType:
        """The weights in force: a row per GPU product, and one for the server that is not as the others."""
        if self.scene.view is None:
            return ""
        sizes = [size.size for size in self.scene.view.sizes if size.min_batch is not None]
        table = Table("GPU", box=None, padding=(0, 1), width=width)
        for name in ("servers", *sizes, "busy"):
            table.add_column(name, justify="right")
        table.add_column("meshctl's weights: why", no_wrap=True, overflow="ellipsis", ratio=1)
        for label, members in self._groups(self.scene.view.endpoints):
            shares = [f"{sum(e.weights[size] for e in members) / 10:.1f} %" for size in sizes]
            busy = sum(e.utilization or 0.0 for e in members) / len(members)
            reason = why(self.scene.view, members[0].endpoint)
            table.add_row(label, str(len(members)), *shares, f"{busy:.0%}", escape(reason))
        return table

    def _groups(self, endpoints: Iterable[EndpointView]) -> list[tuple[str, list[EndpointView]]]:
        order = {gpu: place for place, gpu in enumerate(PROFILES)}
        groups: dict[tuple[int, str], list[EndpointView]] = {}
        for e in endpoints:
            sick = e.endpoint == self.scene.sick
            label = f"[red]{e.gpu} (sick)[/]" if sick else e.gpu
            groups.setdefault((order.get(e.gpu, 0), label), []).append(e)
        return [(label, groups[place, label]) for place, label in sorted(groups)]


def numbers(scene: Scene) -> Table:
    """p50, p99 and goodput of both, without and with a fault."""
    columns = [(policy, healthy) for healthy in (True, False) for policy in (BEFORE, AFTER)]
    table = Table(box=None, padding=(0, 1))
    table.add_column("")
    for policy, healthy in columns:
        now = "● " if scene.policy == policy and scene.healthy is healthy else ""
        state = "all well" if healthy else "one GPU sick"
        table.add_column(f"{now}{policy}\n[not bold dim]{state}[/]", justify="right", min_width=15)
    found = [scene.measured.get(column) for column in columns]
    table.add_row("p50", *(_ms(m.p50_ms if m else None) for m in found))
    table.add_row("p99", *(_ms(m.p99_ms if m else None) for m in found))
    table.add_row("[bold]in time[/]", *(_ratio(m.goodput if m else None) for m in found))
    for size in _sizes(found):
        table.add_row(f"  {size}", *(_ratio(m.goodput_by_size.get(size) if m else None) for m in found))
    return table


def _sizes(found: Sequence[Measured | None]) -> list[str]:
    return list(dict.fromkeys(size for m in found if m for size in m.goodput_by_size)) or ["small", "medium", "large"]


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"[{'green' if value <= 1e3 * SLO_S else 'red'}]{value:.0f} ms[/]"


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"[{'green' if value >= 0.99 else 'yellow' if value >= 0.95 else 'red'}]{value:.1%}[/]"


def _curve(scene: Scene, width: int) -> Text:
    """The p99 of the last minute, on a scale of powers of 1.5."""
    text = Text("p99 ", no_wrap=True)
    for policy, value in list(scene.recent_ms)[-(width - 6) :]:
        level = next((i for i in range(len(_BARS)) if value < _CURVE_MS * 1.5 ** (i + 1)), len(_BARS) - 1)
        text.append(_BARS[level], _COLOURS[policy])
    return text
