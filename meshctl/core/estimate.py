"""Smoothed measurements: what a wobbling signal is believed to be, and for how long.

An Estimate follows its signal by an exponentially weighted mean in the signal's own time (irregular samples, repeats
ignored), except for bad news: a sample worse than the estimate by more than `jump` replaces it at once, since the
cost of reacting late to a slow GPU is far above that of reacting to noise. Without new samples an Estimate is held,
then decays linearly to its prior.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshctl.model import Signal


@dataclass(frozen=True, slots=True)
class Estimate:
    """`value`, as last corrected by a measurement made at `at_s`."""

    value: float
    at_s: float


def follow(before: Estimate | None, signal: Signal, smoothing_s: float, jump: float = math.inf) -> Estimate | None:
    """The estimate after `signal`; `jump` is the rise, absolute, that is believed at once. Unchanged (the same
    object) when the signal has no value or is not newer: a source's clock that steps back teaches nothing."""
    if signal.value is None or signal.at_s is None:
        return before
    if before is None:
        return Estimate(signal.value, signal.at_s)
    if signal.at_s <= before.at_s:
        return before
    if signal.value - before.value > jump:
        return Estimate(signal.value, signal.at_s)
    gain = -math.expm1(-(signal.at_s - before.at_s) / max(smoothing_s, 1e-9))
    return Estimate(before.value + gain * (signal.value - before.value), signal.at_s)


def believed(estimate: Estimate | None, prior: float, now_s: float, stale_after_s: float, decay_s: float) -> float:
    """The estimate while fresh, then its linear decay to `prior`, which is reached after `decay_s` more seconds."""
    if estimate is None:
        return prior
    overdue = now_s - estimate.at_s - stale_after_s
    if overdue <= 0:
        return estimate.value
    return prior + (estimate.value - prior) * max(0.0, 1 - overdue / max(decay_s, 1e-9))
