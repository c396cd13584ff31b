"""How much is asked, and of what size: the forecast the weights are solved for.

Observed arrivals per size class are smoothed; a rise of more than half is believed at once. The total is extrapolated
when it grows (fast less slow mean, which is the growth of one time constant), raised by the headroom, and kept above
30 % of the capacity, so that a burst onto an idle fleet does not meet weights that serve from one GPU alone. A fall is
believed late: a table for more than is asked serves it as well, but one for a lull of seconds, which leaves the slow
GPUs out, is overloaded when the load comes back, and its queues outlast it (seen at 80 % load: 5 s for a minute). The
mix blends the declared shares in as 20 requests' worth of prior. Nothing known at all: 70 % of the capacity, a load at
which the table matters and is stable. Arrivals that are not measured any more are held, then decay to that prior.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from meshctl.core.estimate import Estimate, believed, follow
from meshctl.model import DEFAULT_CLASS, Input, Reason, ReasonCode, RouteSignals, RouteSpec, Signal, SignalState

_PRIOR_REQUESTS = 20.0
_FLOOR, _UNKNOWN = 0.3, 0.7
_MOST_GROWTH = 0.1
"""Growth is extrapolated by no more than this: the next decision is a second away, and a table for 20 % more than is
asked sends large batches to GPUs that need not take them."""
_LULL, _LULL_S = 0.05, 20.0
"""A total that falls by more than this part from one look to the next is a lull for so long, then it is the load."""
_MOST_RPS = 1e9
_DEFAULT_NOTICED = 0.005
"""Requests without a usable size count as a class of their own from this share on."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Smoothed arrivals, by size class, and the slow mean of their total."""

    rates: Mapping[str, Estimate] = field(default_factory=lambda: MappingProxyType({}))
    slow: Estimate | None = None
    steady: Estimate | None = None
    """The total, without lulls: what it was when it was last believed."""

    @property
    def total(self) -> Estimate | None:
        if not self.rates:
            return None
        return Estimate(sum(e.value for e in self.rates.values()), max(e.at_s for e in self.rates.values()))


def update(before: Arrivals, signals: RouteSignals, spec: RouteSpec) -> Arrivals:
    """`before` after one look at the counters. The same object when they say nothing new.

    Only the route's own size classes count: one that was renamed would stay in the total for ever.
    """
    guard, rates = spec.guard, {}
    for name in sorted({*(c.name for c in spec.sizes), DEFAULT_CLASS}):
        old, signal = before.rates.get(name), _possible(signals.arrivals_rps.get(name, Signal.ABSENT))
        new = follow(old, signal, guard.smoothing_s, max(10.0, 0.5 * old.value) if old is not None else 0.0)
        if new is not None:
            rates[name] = new
    if rates == before.rates:
        return before
    if not rates:
        return Arrivals()
    total = sum(e.value for e in rates.values())
    at_s = max(e.at_s for e in rates.values())
    jump = 0.5 * before.slow.value if before.slow is not None else 0.0  # traffic that sets in is no trend
    slow = follow(before.slow, Signal(total, at_s), 2 * guard.smoothing_s, jump)
    return Arrivals(rates, slow, _without_lulls(before.steady, Estimate(total, at_s)))


def _without_lulls(before: Estimate | None, now: Estimate) -> Estimate:
    lull = before is not None and now.value < (1 - _LULL) * before.value and now.at_s - before.at_s < _LULL_S
    return before if before is not None and lull else now


def _possible(signal: Signal) -> Signal:
    """In range: a sum of believable rates must not overflow."""
    if signal.value is None or 0 <= signal.value <= _MOST_RPS:
        return signal
    return Signal(min(max(signal.value, 0.0), _MOST_RPS), signal.at_s)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Requests per second to solve for, by size class, `DEFAULT_CLASS` included; with the reasons."""

    rates: Mapping[str, float]
    reasons: tuple[Reason, ...]
    known: bool
    """False: neither observed nor declared, so it says nothing about whether the SLO can be met."""


def forecast(spec: RouteSpec, arrivals: Arrivals, capacity_rps: float, now_s: float) -> Forecast:
    """The demand to solve for; `capacity_rps` is the fleet's, for the declared mix."""
    total = arrivals.total
    floor = _FLOOR * capacity_rps
    subject = str(spec.id)
    declared, headroom = spec.expected_load_rps, 1 + spec.guard.headroom_ratio
    prior = declared * headroom if declared else _UNKNOWN * capacity_rps
    stale: tuple[Reason, ...] = ()
    if total is not None:
        growth = max(0.0, total.value - (arrivals.slow.value if arrivals.slow else total.value))
        growth = min(growth, _MOST_GROWTH * total.value)
        steady = arrivals.steady.value if arrivals.steady else 0.0
        asked = Estimate(max(max(total.value + growth, steady) * headroom, floor), total.at_s)
        load = believed(asked, prior, now_s, spec.guard.stale_after_s, spec.guard.decay_s)
        seen: tuple[Input, ...] = (
            Input("observed", total.value, "requests/s", total.at_s),
            Input("growth", growth, "requests/s"),
            Input("without lulls", steady, "requests/s"),
            Input("headroom", spec.guard.headroom_ratio, "ratio"),
            Input("least", floor, "requests/s"),
        )
        reason = Reason(ReasonCode.LOAD_OBSERVED, subject, f"solved for {load:.1f} requests/s", seen)
        if now_s - total.at_s > spec.guard.stale_after_s:
            old = (Input("observed", total.value, "requests/s", total.at_s, SignalState.STALE),)
            message = f"arrivals are not measured any more: decaying to the prior, {prior:.1f} requests/s"
            stale = (Reason(ReasonCode.SIGNAL_STALE, subject, message, old),)
    else:
        load = prior
        inputs = (Input("declared", declared, "requests/s"), Input("capacity", capacity_rps, "requests/s"))
        what = "the declared load" if declared else f"no load known: {_UNKNOWN:.0%} of the capacity"
        reason = Reason(ReasonCode.LOAD_DECLARED, subject, f"{what}, {load:.1f} requests/s", inputs)
    shares, mix = _mix(spec, arrivals)
    return Forecast(
        {name: load * share for name, share in shares.items()},
        (reason, *stale, mix),
        total is not None or spec.expected_load_rps is not None,
    )


def _mix(spec: RouteSpec, arrivals: Arrivals) -> tuple[dict[str, float], Reason]:
    seen = {name: e.value * spec.guard.smoothing_s for name, e in arrivals.rates.items()}
    counts = {c.name: seen.get(c.name, 0.0) + _PRIOR_REQUESTS * c.share for c in spec.sizes}
    unsized = seen.get(DEFAULT_CLASS, 0.0)
    total = sum(counts.values()) + unsized
    counts[DEFAULT_CLASS] = unsized if unsized > _DEFAULT_NOTICED * total else 0.0
    total = sum(counts.values())
    shares = {name: count / total for name, count in counts.items()}
    inputs = tuple(Input(name, share, "ratio", _at(arrivals, name)) for name, share in shares.items())
    if seen:
        return shares, Reason(ReasonCode.MIX_OBSERVED, str(spec.id), "the sizes that arrive", inputs)
    return shares, Reason(ReasonCode.MIX_DECLARED, str(spec.id), "the declared mix: no arrivals observed", inputs)


def _at(arrivals: Arrivals, name: str) -> float | None:
    return arrivals.rates[name].at_s if name in arrivals.rates else None
