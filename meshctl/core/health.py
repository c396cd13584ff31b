"""Which endpoints must not get requests: those that fail them, and those that take them and never answer.

A state machine per endpoint:

    Healthy --(fails, or hangs)--> Drained --(after a rest, doubled each time up to 8 x)--> Probation
    Probation --(answers for `recover_after_s`)--> Healthy;  Probation --(fails, or hangs)--> Drained

On probation an endpoint gets a small weight, enough to be judged by. Triton credits durations on completion only, so a
hung GPU looks idle: pending requests with no completion are the evidence, measured over at least `hang_after_s` and
three times the longest service time that is expected of it: one look that grows old is no evidence of a hang. Fast
500s look like an idle, quick server: the failed share of what ended, at the server or at the proxies, is the evidence.
Missing evidence changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshctl.model import Endpoint, EndpointSignals, Guard, Input, Reason, ReasonCode, Signal, SignalState

_LEAST_FAILED_RPS = 0.2
"""Below one failure in five seconds a share says nothing."""
_MOST_RESTS = 8
_SILENT_S = 3.0
"""By how much the proxies' word must be newer than the server's to be taken instead of it."""


class State(StrEnum):
    HEALTHY = "Healthy"
    DRAINED = "Drained"
    PROBATION = "Probation"


@dataclass(frozen=True, slots=True)
class Health:
    """State of one endpoint since `since_s`; `rests` is the next rest in units of `recover_after_s`."""

    state: State = State.HEALTHY
    since_s: float = 0.0
    stuck_since_s: float | None = None
    """When requests were first measured to be pending while none completes."""
    rests: int = 1
    reason: Reason | None = None


def update(
    before: Health, endpoint: Endpoint, signals: EndpointSignals, guard: Guard, longest_s: float, now_s: float
) -> Health:
    """`before` after one look; `longest_s` is the longest service time expected of the endpoint."""
    stuck_since = _stuck_since(before, signals, guard, now_s)
    ill = _fails(endpoint, signals, guard, now_s) or _hangs(endpoint, signals, guard, stuck_since, longest_s)
    elapsed = now_s - before.since_s
    match before.state:
        case State.HEALTHY if ill is not None:
            return Health(State.DRAINED, now_s, stuck_since, before.rests, ill)
        case State.DRAINED if elapsed >= guard.recover_after_s * before.rests:
            return Health(State.PROBATION, now_s, None, before.rests, before.reason)
        # old failures stay in the window for a while: probation is judged by what comes after half of it
        case State.PROBATION if ill is not None and elapsed >= guard.recover_after_s / 2:
            return Health(State.DRAINED, now_s, stuck_since, min(2 * before.rests, _MOST_RESTS), ill)
        case State.PROBATION if elapsed >= guard.recover_after_s and _answers(signals, guard, now_s):
            return Health(State.HEALTHY, now_s, stuck_since, before.rests)
        case State.HEALTHY if before.rests > 1 and elapsed >= _MOST_RESTS * guard.recover_after_s:
            return Health(State.HEALTHY, now_s, stuck_since)
    if stuck_since == before.stuck_since_s:
        return before
    return Health(before.state, before.since_s, stuck_since, before.rests, before.reason)


def _fresh(signal: Signal, guard: Guard, now_s: float) -> float | None:
    return signal.value if signal.state(now_s, guard.stale_after_s) is SignalState.FRESH else None


def _fails(endpoint: Endpoint, signals: EndpointSignals, guard: Guard, now_s: float) -> Reason | None:
    completed, failed = (_fresh(s, guard, now_s) for s in (signals.completed_rps, signals.failed_rps))
    seen, refused = (_fresh(s, guard, now_s) for s in (signals.proxy_rps, signals.proxy_failed_rps))
    witnesses = (
        ("server", failed, None if failed is None else failed + (completed or 0.0), signals.failed_rps),
        ("proxies", refused, seen, signals.proxy_failed_rps),
    )
    for who, bad, ended, signal in witnesses:
        if bad is None or not ended or bad < _LEAST_FAILED_RPS or bad / ended <= guard.error_ratio:
            continue
        inputs = (
            Input(f"failed at the {who}", bad, "requests/s", signal.at_s, SignalState.FRESH),
            Input("ended", ended, "requests/s", signal.at_s),
            Input("drained above", guard.error_ratio, "ratio"),
        )
        return Reason(ReasonCode.DRAINED_ERRORS, endpoint.id, f"{bad / ended:.0%} of its requests fail", inputs)
    return None


def _stuck_since(before: Health, signals: EndpointSignals, guard: Guard, now_s: float) -> float | None:
    ended = _ended(signals)
    waiting = [_fresh(s, guard, now_s) for s in (signals.pending, signals.proxy_active)]
    if _fresh(ended, guard, now_s) is None or all(w is None for w in waiting):
        # not seen: neither proof nor refutation. A hang that was under way goes on.
        return before.stuck_since_s
    if ended.value or not any(waiting):
        return None
    return before.stuck_since_s if before.stuck_since_s is not None else ended.at_s


def _ended(signals: EndpointSignals) -> Signal:
    """Requests that end: the server's word, or the proxies' where the server has none or has fallen silent."""
    server, proxies = signals.completed_rps, signals.proxy_rps
    if server.value is None or (proxies.value is not None and (proxies.at_s or 0.0) - (server.at_s or 0.0) > _SILENT_S):
        return proxies
    return server


def _hangs(
    endpoint: Endpoint, signals: EndpointSignals, guard: Guard, since_s: float | None, longest_s: float
) -> Reason | None:
    ended = _ended(signals)
    if since_s is None or ended.at_s is None or ended.at_s - since_s < max(guard.hang_after_s, 3 * longest_s):
        return None
    inputs = (
        Input("pending", signals.pending.value, "requests", signals.pending.at_s),
        Input("in flight at the proxies", signals.proxy_active.value, "requests", signals.proxy_active.at_s),
        Input("completed", ended.value, "requests/s", ended.at_s),
        Input("for", ended.at_s - since_s, "s"),
    )
    message = f"requests pending and none completed for {ended.at_s - since_s:.0f} s"
    return Reason(ReasonCode.DRAINED_HANG, endpoint.id, message, inputs)


def _answers(signals: EndpointSignals, guard: Guard, now_s: float) -> bool:
    """It completed something, or nothing was asked of it that it could have failed."""
    completed = _fresh(signals.completed_rps, guard, now_s)
    if completed is None:  # nothing is measured at the server: the proxies' word
        completed = _fresh(signals.proxy_rps, guard, now_s)
        completed = None if completed is None else completed - (_fresh(signals.proxy_failed_rps, guard, now_s) or 0.0)
    waiting = _fresh(signals.pending, guard, now_s) or _fresh(signals.proxy_active, guard, now_s)
    return completed is not None and (completed > 0 or not waiting)
