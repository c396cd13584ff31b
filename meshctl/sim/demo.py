"""What the demo does: the same load through Istio's default and through meshctl, once with numbers, or as a show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from meshctl.sim.envoy import Balancing
from meshctl.sim.versus import LAG_LIMIT_MS, MESHCTL, Measured, Say, Signals, Stand, ratio

BEFORE, AFTER = str(Balancing.ISTIO_DEFAULT), MESHCTL
_SETTLE_SEED = 10_000
"""Added to the seed for the load that is not measured."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The outcome of `meshctl demo --once`."""

    before: Measured
    after: Measured
    data_plane: str
    signals: Signals
    seed: int
    load_rps: float
    settled_s: float | None
    """How long the loop took to settle from nothing; None: it still moved when the measurement began."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "policies": [asdict(self.before), asdict(self.after)],
            "p99_ratio": ratio(self.before.p99_ms, self.after.p99_ms),
            "data_plane": self.data_plane,
            "signals": self.signals.value,
            "seed": self.seed,
            "load_rps": round(self.load_rps, 1),
            "settled_s": self.settled_s,
            "valid": self.before.valid and self.after.valid,
        }


async def compare(stand: Stand, signals: Signals, seconds: float, seed: int, say: Say) -> Comparison:
    """Measure both, one after the other, each on a drained fleet."""
    say(f"{BEFORE}: {seconds:g} s at {stand.rate_rps:.0f} requests/s")
    before = await stand.measure(BEFORE, seed, seconds)
    say(f"{AFTER}: waiting until its weights stay")
    settled_s = await stand.settle(seed + _SETTLE_SEED)
    if settled_s is None:
        say("the weights still move: measuring all the same")
    say(f"{AFTER}: {seconds:g} s at {stand.rate_rps:.0f} requests/s")
    after = await stand.measure(AFTER, seed, seconds)
    for measured in (before, after):
        if not measured.valid:
            lag = measured.send_lag_p99_ms
            say(f"{measured.name}: the load generator was {lag} ms late (p99, limit {LAG_LIMIT_MS:g}): not valid")
    return Comparison(before, after, stand.data_plane, signals, seed, stand.rate_rps, settled_s)
