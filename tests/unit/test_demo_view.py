"""The demo's live view: all of it on the screens that people have."""

from __future__ import annotations

import pytest
from rich.console import Console

from meshctl.cli.demo_view import About, View
from meshctl.controller.views import EndpointView, ReasonView, RouteView, SizeView
from meshctl.sim.demo import AFTER, BEFORE, FAULTS, Scene
from meshctl.sim.reference import PROFILES, SERVERS_PER_GPU
from meshctl.sim.versus import Measured

ABOUT = About(0.8, 595.6, "envoy 1.40.0", "prometheus", "http://127.0.0.1:41234")
SICK = "127.0.0.1:40000"


def route() -> RouteView:
    gpus = [gpu for gpu in PROFILES for _ in range(SERVERS_PER_GPU)]
    endpoints = tuple(endpoint(f"127.0.0.1:{40000 + i}", gpu) for i, gpu in enumerate(gpus))
    sizes = tuple(SizeView(name, 1, 4, 0.99, None, ()) for name in ("small", "medium", "large"))
    return RouteView(
        *("default/reference", 1, ("*",), "resnet50", "Balanced", False, 0.15, 0.99, 600.0, True, (), (), ()),
        sizes,
        (),
        endpoints,
    )


def endpoint(name: str, gpu: str) -> EndpointView:
    slow = ReasonView("ObservedServiceTime", name, "service time 2.00 x the profile's", ())
    weights = {"small": 83, "medium": 1000, "large": 0, "default": 83}
    return EndpointView(name, gpu, True, False, weights, 0.95, (), (slow,) if name == SICK else ())


def measured(policy: str, p99_ms: float) -> Measured:
    by_size = {"small": 0.9999, "medium": 1.0, "large": 0.61}
    return Measured(policy, 24.1, p99_ms, 2 * p99_ms, 0.98, by_size, 5000, 0, 2.0)


def scene(policy: str, words: str) -> Scene:
    shown = Scene(12, policy, words, 19.5, view=route(), sick=SICK)
    shown.measured = {(p, h): measured(p, 123456.7) for p in (BEFORE, AFTER) for h in (True, False)}
    shown.recent_ms.extend((policy, 20.0 * i) for i in range(200))
    shown.events.extend(f"12:00:{i:02} {words} (127.0.0.1:40000, 14.6% of all weights)" for i in range(40))
    return shown


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (100, 30), (200, 60)])
@pytest.mark.parametrize("words", [words for words, _ in FAULTS])
def test_everything_fits_the_screen_and_needs_no_colour(columns: int, lines: int, words: str) -> None:
    """No line too many or too long, whatever the numbers; the last one tells how to end it."""
    console = Console(width=columns, height=lines, no_color=True)
    view = View(ABOUT, console)
    view.scene = scene(AFTER, words)
    with console.capture() as capture:
        console.print(view)
    shown = capture.get().splitlines()
    assert len(shown) < lines
    assert max(map(len, shown)) <= columns
    assert "\x1b" not in capture.get()
    text = "\n".join(shown)
    for needed in (BEFORE, AFTER, words, "V100 (sick)", "123457 ms", "61.0%", "service time 2", "Ctrl-C"):
        assert needed in text


def test_before_anything_was_measured_it_says_that_it_starts() -> None:
    """The first screen has no numbers, and no error."""
    console = Console(width=80, height=24, no_color=True)
    with console.capture() as capture:
        console.print(View(ABOUT, console))
    assert "starting" in capture.get()
