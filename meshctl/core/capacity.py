"""How fast an endpoint is: the profile of its GPU, corrected by what is observed and by what others do on it.

One number per endpoint, its slowdown s >= 0.2: a request of batch b takes ``s * profile(b)``. Two witnesses:
- the observed service time over the profile's at the observed mean batch (the mean hides the mix, which is exact for
  profiles linear in the batch, and off by the curvature otherwise);
- the foreign share f of the GPU, utilisation less our own busy share: others' work leaves 1 - f of it, which shows
  BEFORE our latency does.
Both see the same cause, so the worse one counts, not their product. The slowdown in use moves in steps of 5 % and only
when the evidence leaves it by more than 8 %, so that equal GPUs stay one class in the solver.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

from meshctl.core.estimate import Estimate, believed, follow
from meshctl.model import (
    Endpoint,
    EndpointSignals,
    Guard,
    Input,
    Reason,
    ReasonCode,
    ServiceProfile,
    Signal,
    SignalState,
)

_STEP = math.log(1.05)
_HOLD = math.log(1.08)
_NEAR_ONE = math.log(1.07)
"""A profile that is right within this is right: 1.0 exactly."""
_SLOWDOWN = (0.2, 50.0)
_FOREIGN_MAX = 0.95
_FOREIGN_NOTICED, _FOREIGN_FORGOTTEN = 0.1, 0.05
"""Apart, so that a share that wobbles about one of them does not move traffic to and fro."""
_OWN_NEW_WORK = 0.4
"""Within a moment of a move, a rise of the utilisation up to this is taken for our own new work; more is somebody's."""
_PRIOR = ServiceProfile(((1.0, 0.010), (2.0, 0.011)))
"""Where no GPU of the route has a profile: the order of magnitude of a small vision model. Observation corrects it."""


def service_s(profile: ServiceProfile, batch: float) -> float:
    """Seconds for one request of `batch` items: linear between the profile's points and beyond its last ones, never
    below a tenth of its first point (a steep line extrapolated to batch 1 may reach zero)."""
    points = profile.points
    if len(points) == 1:
        return points[0][1]
    i = min(max(bisect_right(points, (batch, math.inf)), 1), len(points) - 1)
    (b0, s0), (b1, s1) = points[i - 1], points[i]
    return max(s0 + (batch - b0) * (s1 - s0) / (b1 - b0), points[0][1] / 10)


def profile_for(endpoint: Endpoint, profiles: Mapping[str, ServiceProfile]) -> tuple[ServiceProfile, Reason]:
    """Its GPU's profile; without one, the slowest known at batch 8, so that an unknown GPU is not flooded."""
    known = profiles.get(endpoint.gpu)
    if known is not None:
        inputs = (Input("gpu", endpoint.gpu), Input("service time at batch 1", service_s(known, 1) * 1e3, "ms"))
        return known, Reason(ReasonCode.PROFILE, endpoint.id, f"profile of {endpoint.gpu}", inputs)
    slowest = max(sorted(profiles), key=lambda gpu: service_s(profiles[gpu], 8), default=None)
    taken = "a prior of 10 ms" if slowest is None else f"{slowest}'s, the slowest known"
    message = f"no ModelProfile for GPU {endpoint.gpu or '(unknown)'}: {taken}, corrected by what is observed"
    return _PRIOR if slowest is None else profiles[slowest], Reason(ReasonCode.NO_PROFILE, endpoint.id, message)


@dataclass(frozen=True, slots=True)
class Speed:
    """What is believed of one endpoint's speed. `slowdown` is the one in use."""

    slowdown: float = 1.0
    observed: Estimate | None = None
    foreign: Estimate | None = None


def update(
    before: Speed,
    profile: ServiceProfile,
    signals: EndpointSignals,
    guard: Guard,
    now_s: float,
    *,
    frozen: bool,
    moved: bool = False,
) -> Speed:
    """`before` after one look at `signals`. `frozen`: believe what was believed, without decay. `moved`: weights moved
    a moment ago, and utilisation shows our own new work before the busy share of a longer window does."""
    if frozen:
        return before
    observed = follow(before.observed, _ratio(profile, signals), guard.smoothing_s, _jump(before.observed))
    seen = _foreign(signals, guard)
    known = before.foreign.value if before.foreign is not None else 0.0
    ours = moved and (seen.value is None or seen.value < known + _OWN_NEW_WORK)
    foreign = before.foreign if ours else follow(before.foreign, seen, guard.smoothing_s, 0.15)
    window = guard.stale_after_s, guard.decay_s
    used = believed(observed, 1.0, now_s, *window)
    taken = min(believed(foreign, 0.0, now_s, *window), _FOREIGN_MAX)
    if taken > (_FOREIGN_NOTICED if before.slowdown <= 1 else _FOREIGN_FORGOTTEN):
        used = max(used, 1 / (1 - taken))
    return Speed(_in_use(before.slowdown, used), observed, foreign)


def _jump(observed: Estimate | None) -> float:
    return 0.25 * observed.value if observed is not None else math.inf


def _in_use(before: float, evidence: float) -> float:
    log = math.log(min(max(evidence, _SLOWDOWN[0]), _SLOWDOWN[1]))
    if abs(log) <= _NEAR_ONE and before == 1.0:
        return 1.0
    if abs(log - math.log(before)) <= _HOLD:
        return before
    return 1.0 if abs(log) <= _NEAR_ONE else math.exp(_STEP * round(log / _STEP))


def _ratio(profile: ServiceProfile, signals: EndpointSignals) -> Signal:
    """Observed over profiled service time."""
    seen, batch = signals.service_s, signals.batch
    if seen.value is None or seen.value <= 0:
        return Signal.ABSENT
    expected = service_s(profile, batch.value if batch.value is not None and batch.value > 0 else 1.0)
    return Signal(min(max(seen.value / expected, _SLOWDOWN[0]), _SLOWDOWN[1]), seen.at_s)


def _foreign(signals: EndpointSignals, guard: Guard) -> Signal:
    """Utilisation less our own busy share, less what their different windows make of our own bursts: the busy share
    b of a second has a standard deviation of about 0.35 sqrt(b (1 - b)) at these service times.

    Absent while our own share is not known as of about the same time: it must never be taken for that of others.
    """
    whole, own = signals.gpu_utilization_ratio, _own_busy(signals)
    if whole.value is None or whole.at_s is None or own.value is None or own.at_s is None:
        return Signal.ABSENT
    if whole.at_s - own.at_s > guard.stale_after_s:
        return Signal.ABSENT
    busy = min(max(own.value, 0.0), 1.0)
    return Signal(max(0.0, min(whole.value, 1.0) - busy - 0.35 * math.sqrt(busy * (1 - busy))), whole.at_s)


def _own_busy(signals: EndpointSignals) -> Signal:
    """Our own busy share; 0 where it is not measured but nothing ended and nothing waits."""
    completed = signals.completed_rps
    if signals.busy_ratio.value is not None or completed.value != 0 or completed.at_s is None:
        return signals.busy_ratio
    return Signal.ABSENT if signals.pending.value or signals.proxy_active.value else Signal(0.0, completed.at_s)


def explain(endpoint: Endpoint, speed: Speed, signals: EndpointSignals, guard: Guard, now_s: float) -> list[Reason]:
    """Why the slowdown is what it is."""
    reasons: list[Reason] = []
    used = Input("slowdown in use", speed.slowdown, "x")
    if speed.observed is not None:
        state = signals.service_s.state(now_s, guard.stale_after_s)
        inputs = (
            _input("service time", signals.service_s, "ms", 1e3, state),
            _input("mean batch", signals.batch, "items"),
            Input("observed over profile", speed.observed.value, "x", speed.observed.at_s),
            used,
        )
        message = f"service time {speed.observed.value:.2f} x the profile's"
        reasons.append(Reason(ReasonCode.OBSERVED_SERVICE_TIME, endpoint.id, message, inputs))
    if speed.foreign is not None and speed.foreign.value > _FOREIGN_NOTICED:
        inputs = (
            _input("GPU utilisation", signals.gpu_utilization_ratio, "ratio"),
            _input("own busy share", signals.busy_ratio, "ratio"),
            Input("foreign share", speed.foreign.value, "ratio", speed.foreign.at_s),
            used,
        )
        message = f"others use {speed.foreign.value:.0%} of the GPU"
        reasons.append(Reason(ReasonCode.FOREIGN_UTILIZATION, endpoint.id, message, inputs))
    return [*reasons, *_state_reasons(endpoint, speed, signals, guard, now_s)]


def _state_reasons(
    endpoint: Endpoint, speed: Speed, signals: EndpointSignals, guard: Guard, now_s: float
) -> list[Reason]:
    signal = signals.service_s
    inputs = (Input("service time", signal.value, "s", signal.at_s, signal.state(now_s, guard.stale_after_s)),)
    last = speed.observed.at_s if speed.observed is not None else None
    decayed = last is not None and now_s - last > guard.stale_after_s + guard.decay_s
    match signal.state(now_s, guard.stale_after_s):
        case SignalState.FRESH:
            return []
        case SignalState.STALE:
            message = f"its signals are older than {guard.stale_after_s:g} s: decaying to the profile"
            code = ReasonCode.SIGNAL_STALE
        case SignalState.ABSENT:
            code, message = ReasonCode.SIGNAL_ABSENT, "nothing is measured of it: the profile counts"
        case SignalState.NO_TRAFFIC:
            code, message = ReasonCode.NO_TRAFFIC, "no request ended in the window: the last estimate, decaying"
    reasons = [Reason(code, endpoint.id, message, inputs)]
    if decayed:
        message = f"not measured for {guard.stale_after_s + guard.decay_s:g} s: back to the profile"
        reasons.append(Reason(ReasonCode.DECAYED, endpoint.id, message, inputs))
    return reasons


def _input(name: str, signal: Signal, unit: str = "", scale: float = 1.0, state: SignalState | None = None) -> Input:
    return Input(name, None if signal.value is None else signal.value * scale, unit, signal.at_s, state)
