"""What is believed of one route at one instant: its endpoints' speeds and health, its arrivals, who may get traffic.

A route whose signals are ALL lost is frozen: what was believed stays, nothing decays (the observer is blind, not the
GPUs gone). One endpoint's loss is its own: held, then decayed to its profile. When no endpoint is ready, or all fail,
all are used: a slow answer beats a refused one. It knows nothing of tables and weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from meshctl.core import capacity, demand, health
from meshctl.core.capacity import Speed
from meshctl.core.health import Health, State
from meshctl.core.memory import RouteMemory
from meshctl.model import (
    DesiredRoute,
    Endpoint,
    EndpointId,
    EndpointSignals,
    Input,
    Reason,
    ReasonCode,
    RouteSignals,
    ServiceProfile,
    SignalState,
)

RECHECK_S = 1.0
"""How soon to look again while something is under way (a shift, a rest, a decay)."""
PROBATION = 0.1
"""Part of its fair share that an endpoint on probation gets."""
_NOTHING = EndpointSignals()


@dataclass(frozen=True, slots=True)
class Look:
    """What is believed of a route at one instant."""

    route: DesiredRoute
    profiles: Mapping[EndpointId, ServiceProfile]
    speeds: Mapping[EndpointId, Speed]
    health: Mapping[EndpointId, Health]
    arrivals: demand.Arrivals
    usable: tuple[Endpoint, ...]
    """Endpoints that may get traffic, by id."""
    frozen: bool
    reasons: tuple[Reason, ...]


def _times(signals: RouteSignals, route: DesiredRoute) -> list[float]:
    """When the signals that freshness is judged by were measured."""
    of = [signals.endpoints.get(e.id, _NOTHING) for e in route.endpoints]
    judged = [s for x in of for s in (x.completed_rps, x.service_s, x.gpu_utilization_ratio, x.proxy_rps)]
    return [s.at_s for s in (*signals.arrivals_rps.values(), *judged) if s.at_s is not None]


def anything_fresh(signals: RouteSignals, route: DesiredRoute, now_s: float) -> bool:
    stale = route.spec.guard.stale_after_s
    return any(now_s - at <= stale for at in _times(signals, route))


def due_s(look: Look, signals: RouteSignals, now_s: float) -> float:
    """When the first signal turns stale; nothing changes by itself before. A frozen route waits for signals."""
    if look.frozen:
        return math.inf
    stale = look.route.spec.guard.stale_after_s
    turns = [at + stale for at in _times(signals, look.route)]
    later = [t for t in turns if t >= now_s]
    if len(later) == len(turns):
        return min(later, default=math.inf) + 1e-6
    return now_s + RECHECK_S


def look_at(route: DesiredRoute, signals: RouteSignals, before: RouteMemory, now_s: float) -> Look:
    spec = route.spec
    frozen = before.observed and not anything_fresh(signals, route, now_s)
    held = frozen or (spec.suspend and bool(before.current))  # suspended: nobody is drained, nobody comes back
    profiles, speeds, states = {}, {}, {}
    reasons: list[Reason] = []
    old_profiles = _profiles(before.route, route)
    moved = now_s - before.stepped_s < spec.guard.smoothing_s
    for e in route.endpoints:
        of = signals.endpoints.get(e.id, _NOTHING)
        profiles[e.id], reason = capacity.profile_for(e, route.profiles)
        known = before.speeds.get(e.id, _SPEED)
        if old_profiles.get(e.id, profiles[e.id]) != profiles[e.id]:
            known = _SPEED  # what was observed was measured against another profile
        speed = capacity.update(known, profiles[e.id], of, spec.guard, now_s, frozen=frozen, moved=moved)
        longest = speed.slowdown * capacity.service_s(profiles[e.id], max(c.batch for c in spec.sizes))
        ill = before.health.get(e.id, _HEALTH)
        if frozen and ill.stuck_since_s is not None:
            ill = replace(ill, stuck_since_s=None)  # a hang must be seen throughout
        states[e.id] = ill if held else health.update(ill, e, of, spec.guard, longest, now_s)
        if states[e.id].state is State.PROBATION and ill.state is State.DRAINED:
            speed = _SPEED  # what was seen of it was the fault: the time that requests hung is no service time
        speeds[e.id] = speed
        reasons += [reason, *capacity.explain(e, speed, of, spec.guard, now_s), *_health_reasons(e, states[e.id])]
    arrivals = before.arrivals if frozen else demand.update(before.arrivals, signals, spec)
    if frozen:
        reasons.insert(0, _frozen(route, signals))
    usable, why = _usable(route, states)
    return Look(route, profiles, speeds, states, arrivals, usable, frozen, (*why, *reasons))


_SPEED, _HEALTH = Speed(), Health()


def _profiles(before: DesiredRoute | None, route: DesiredRoute) -> dict[EndpointId, ServiceProfile]:
    """By endpoint, as of the last look; empty when that was at the same route, or at none."""
    if before is None or before is route:
        return {}
    return {e.id: capacity.profile_for(e, before.profiles)[0] for e in before.endpoints}


def _frozen(route: DesiredRoute, signals: RouteSignals) -> Reason:
    times = _times(signals, route)
    state = SignalState.STALE if times else SignalState.ABSENT
    inputs = (Input("newest signal", None, "", max(times, default=None), state),)
    return Reason(ReasonCode.FROZEN, str(route.spec.id), "every signal of the route is lost: all stays", inputs)


def _health_reasons(endpoint: Endpoint, state: Health) -> list[Reason]:
    if not endpoint.ready:
        return [Reason(ReasonCode.NOT_READY, endpoint.id, "not ready, or terminating: no new requests")]
    if state.state is State.DRAINED and state.reason is not None:
        return [state.reason]
    if state.state is State.PROBATION:
        inputs = (Input("part of its fair share", PROBATION, "ratio"), Input("since", None, "", state.since_s))
        return [Reason(ReasonCode.PROBATION, endpoint.id, "was drained, is tried again", inputs)]
    return []


def _usable(route: DesiredRoute, states: Mapping[EndpointId, Health]) -> tuple[tuple[Endpoint, ...], list[Reason]]:
    """Ready and not drained; when that is nobody, everybody who is ready (a slow answer beats a refused one); when
    nobody is, all of them: weights must sum, and are then there for the first that comes back."""
    ready = tuple(e for e in route.endpoints if e.ready)
    usable = tuple(e for e in ready if states[e.id].state is not State.DRAINED)
    subject = str(route.spec.id)
    if not ready:
        message = "no endpoint is ready: none is left out" if route.endpoints else "none: add some to spec.backend"
        return route.endpoints, [Reason(ReasonCode.NO_ENDPOINTS, subject, message)]
    if not usable:
        return ready, [Reason(ReasonCode.ALL_DRAINED, subject, "every endpoint fails: all are used rather than none")]
    return usable, []
