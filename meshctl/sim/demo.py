"""What the demo does: the same load through Istio's default and through meshctl, once with numbers, or as a show.

A round of the show: the one, then the other; under the other a GPU goes wrong, so that the loop's reaction is seen;
then the same fault under the one. Then it heals, and the next round brings the next fault.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from meshctl.controller.views import RouteView
from meshctl.model import ReasonCode
from meshctl.sim.envoy import Balancing
from meshctl.sim.faults import Faults
from meshctl.sim.load import Load
from meshctl.sim.versus import (
    LAG_LIMIT_MS,
    MESHCTL,
    REACTED,
    SETTLE_SEED,
    Measured,
    Say,
    Stand,
    endpoint_of,
    part_of,
    ratio,
)

BEFORE, AFTER = str(Balancing.ISTIO_DEFAULT), MESHCTL
_REFRESH_S = 0.5
_WINDOW_S = 10.0
"""What the show's numbers are over, at most."""
_RECENT_S = 2.0
"""What a point of its curve is over."""
_POINTS = 120


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of `meshctl demo --once`."""

    before: Measured
    after: Measured
    data_plane: str
    signals: str
    """scrape or prometheus."""
    seed: int
    load_rps: float
    settled_s: float | None
    """How long the loop took to settle from nothing; None: it still moved when the measurement began."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "policies": [asdict(self.before), asdict(self.after)],
            "p99_ratio": ratio(self.before.p99_ms, self.after.p99_ms),
            "data_plane": self.data_plane,
            "signals": self.signals,
            "seed": self.seed,
            "load_rps": round(self.load_rps, 1),
            "settled_s": self.settled_s,
            "valid": self.before.valid and self.after.valid,
        }


async def compare(stand: Stand, signals: str, seconds: float, seed: int, say: Say) -> Comparison:
    """Measure both, one after the other, each on a drained fleet."""
    say(f"{BEFORE}: {seconds:g} s at {stand.rate_rps:.0f} requests/s")
    before = await stand.measure(BEFORE, seed, seconds)
    say(f"{AFTER}: waiting until its weights stay")
    settled_s = await stand.settle(seed + SETTLE_SEED)
    if settled_s is None:
        say("the weights still move: measuring all the same")
    say(f"{AFTER}: {seconds:g} s at {stand.rate_rps:.0f} requests/s")
    after = await stand.measure(AFTER, seed, seconds)
    for measured in (before, after):
        if not measured.valid:
            lag = measured.send_lag_p99_ms
            say(f"{measured.name}: the load generator was {lag} ms late (p99, limit {LAG_LIMIT_MS:g}): not valid")
    return Comparison(before, after, stand.data_plane, signals, seed, stand.rate_rps, settled_s)


FAULTS = (
    ("a V100 takes twice as long", Faults(slow=2.0)),
    ("another tenant takes half a V100", Faults(foreign_ratio=0.5)),
)
"""What goes wrong, one per round, and in which words."""


@dataclass
class Scene:
    """What the show shows now; the show changes it, the view reads it."""

    round: int = 0
    policy: str = ""
    fault: str = ""
    """What is wrong with the fleet, "" when nothing is."""
    left_s: float = 0.0
    """Of this phase."""
    settling: bool = False
    """The load has just set in, and the weights follow; the phase begins when they have."""
    measured: dict[tuple[str, bool], Measured] = field(default_factory=dict)
    """(policy, whether with a fault) -> the newest numbers."""
    view: RouteView | None = None
    sick: str = ""
    """The endpoint with the fault."""
    recent_ms: deque[tuple[str, float]] = field(default_factory=lambda: deque(maxlen=_POINTS))
    """(policy, p99 of the last `_RECENT_S`), oldest first."""
    events: deque[str] = field(default_factory=lambda: deque(maxlen=50))

    @property
    def healthy(self) -> bool:
        return not self.fault

    @property
    def newest(self) -> Measured:
        """Of the policy that is on."""
        return self.measured[self.policy, self.healthy]


class Show:
    """Endless rounds; `draw` is called twice a second, `say` for each event and at each phase's end."""

    def __init__(self, stand: Stand, phase_s: float, seed: int, draw: Callable[[Scene], None], say: Say) -> None:
        self.scene = Scene()
        self._stand, self._phase_s, self._seed = stand, phase_s, seed
        self._draw, self._say = draw, say
        self._reaction: tuple[float, float] | None = None

    async def run(self) -> None:
        for number in itertools.count():
            self.scene.round = number + 1
            await self._round(self._seed + number, *FAULTS[number % len(FAULTS)])

    async def _round(self, seed: int, words: str, faults: Faults) -> None:
        server, scene = self._stand.servers("V100")[0], self.scene
        async with self._stand.loaded(BEFORE, seed) as load:
            await self._phase(BEFORE, load)
        async with self._stand.loaded(AFTER, seed) as load:
            await self._phase(AFTER, load, settle=True)
            before = part_of(await self._stand.route(), endpoint_of(server))
            await self._stand.set_faults(server, faults)
            scene.fault, scene.sick = words, endpoint_of(server)
            self._event(f"{words} ({scene.sick}, {before:.1%} of all weights)")
            self._reaction = time.monotonic(), before
            await self._phase(AFTER, load)
            self._reaction = None
        async with self._stand.loaded(BEFORE, seed) as load:
            await self._phase(BEFORE, load)
        await self._stand.set_faults(server, Faults())
        scene.fault = scene.sick = ""
        self._event("the V100 is well again")

    async def _phase(self, policy: str, load: Load, *, settle: bool = False) -> None:
        """One policy for `phase_s`; with `settle` counted from when its weights have followed the load."""
        scene, start_s = self.scene, time.monotonic()
        scene.policy = policy
        settling = asyncio.create_task(self._stand.settled()) if settle else None
        try:
            while (passed_s := time.monotonic() - start_s) < self._phase_s:
                await asyncio.sleep(_REFRESH_S)  # the view's clock
                scene.settling = settling is not None and not settling.done()
                if scene.settling:
                    start_s = time.monotonic()
                scene.left_s = max(0.0, self._phase_s - passed_s)
                await self._look(policy, load, passed_s)
        finally:
            if settling is not None:
                settling.cancel()
                await asyncio.gather(settling, return_exceptions=True)  # what it raised is raised below, or by the look
        if settling is not None:
            settling.result()
        self._say(f"round {scene.round}, {scene.fault or 'all GPUs well'}: {in_words(scene.newest)}")

    async def _look(self, policy: str, load: Load, passed_s: float) -> None:
        """Bring the scene up to date, and draw it."""
        scene = self.scene
        scene.view = await self._stand.route()
        scene.measured[policy, scene.healthy] = Measured.of(policy, load.window(min(_WINDOW_S, passed_s + _REFRESH_S)))
        recent = load.window(_RECENT_S).p99_ms
        if recent is not None:
            scene.recent_ms.append((policy, recent))
        self._notice(scene.view)
        self._draw(scene)

    def _notice(self, view: RouteView) -> None:
        """Tell of the loop's reaction, once."""
        if self._reaction is None:
            return
        since_s, before = self._reaction
        part = part_of(view, self.scene.sick)
        if part < REACTED * before:
            self._reaction = None
            self._event(
                f"{time.monotonic() - since_s:.1f} s later meshctl gives it {part:.1%}: {why(view, self.scene.sick)}"
            )

    def _event(self, text: str) -> None:
        self.scene.events.append(f"{time.strftime('%H:%M:%S')} {text}")
        self._say(text)


def in_words(measured: Measured) -> str:
    """One line."""
    if measured.goodput is None:
        return f"{measured.name}: no answers"
    return (
        f"{measured.name}: p50 {measured.p50_ms:.0f} ms, p99 {measured.p99_ms:.0f} ms, {measured.goodput:.1%} in time"
    )


def why(view: RouteView, endpoint: str) -> str:
    """The newest reason for an endpoint's weights that its profile does not give, in a few words."""
    found = [reason for e in view.endpoints if e.endpoint == endpoint for reason in e.reasons]
    told = [reason.message for reason in found if reason.code != ReasonCode.PROFILE]
    return told[0] if told else "as its profile says"
