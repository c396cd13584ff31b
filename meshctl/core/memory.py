"""What one decision leaves to the next, and how it survives a restart.

What is saved is what cannot be seen again: the shares in force, the table they move to and what it was solved for,
the estimates, the health of each endpoint. Times are saved as ages, since a monotonic clock starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from meshctl.core.capacity import Speed
from meshctl.core.demand import Arrivals
from meshctl.core.estimate import Estimate
from meshctl.core.guard import Table
from meshctl.core.health import Health, State
from meshctl.model import DesiredRoute, EndpointId, Reason, ReasonCode, RouteId, RoutePlan, RouteSignals

K = TypeVar("K")
FORMAT = 1


def _empty() -> Mapping[Any, Any]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Solved:
    """A table, what it was solved for, and what to expect of it."""

    key: str
    """Fleet, policy, SLO and proxies it was solved for, as text."""
    rates: Mapping[str, float]
    target: Table
    attainment: Mapping[str, float]
    utilization: Mapping[EndpointId, float]


@dataclass(frozen=True, slots=True)
class RouteMemory:
    """Of one route. The last seven fields are not saved: they let an unchanged route be recognised at once."""

    current: Table = field(default_factory=_empty)
    """Shares in force."""
    solved: Solved | None = None
    stepped_s: float = -1e9
    """When weights last moved."""
    shifting: bool = False
    """The last move was cut short by the step limit: the next one goes on, whatever the dwell says."""
    speeds: Mapping[EndpointId, Speed] = field(default_factory=_empty)
    health: Mapping[EndpointId, Health] = field(default_factory=_empty)
    arrivals: Arrivals = field(default_factory=Arrivals)
    observed: bool = False
    """Something fresh was measured of this route, once."""
    route: DesiredRoute | None = None
    signals: RouteSignals | None = None
    gateways: int = 0
    follows: bool = False
    due_s: float = 0.0
    """With the same inputs nothing changes before this time ..."""
    waits: bool = False
    """... unless this is its turn at the solver, which is all that it waits for."""
    plan: RoutePlan | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Of all routes. `to_json` and `from_json` let a restart go on where the last run stopped."""

    routes: Mapping[RouteId, RouteMemory] = field(default_factory=_empty)

    def to_json(self, now_s: float) -> dict[str, object]:
        """Plain data, times as ages before `now_s`."""
        return {"format": FORMAT, "routes": {name: _dump(m, now_s) for name, m in sorted(self.routes.items())}}

    @staticmethod
    def from_json(data: Mapping[str, Any], now_s: float) -> Memory:
        """Raises ValueError, naming the field, when `data` was not written by `to_json` of this format."""
        if data.get("format") != FORMAT:
            raise ValueError(f"format: {data.get('format')!r}, this version reads {FORMAT}")
        routes = {}
        for name, saved in _mapping(data.get("routes"), "routes").items():
            try:
                routes[RouteId(name)] = _load(saved, now_s)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"routes.{name}: {type(error).__name__}: {error}") from error
        return Memory(routes)


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: a mapping is needed, not {type(value).__name__}")  # noqa: TRY004 one error type
    return value


def _dump(m: RouteMemory, now_s: float) -> dict[str, object]:
    def estimate(e: Estimate | None) -> list[float] | None:
        return None if e is None else [e.value, now_s - e.at_s]

    return {
        "current": {name: dict(shares) for name, shares in m.current.items()},
        "solved": None
        if m.solved is None
        else {
            "key": m.solved.key,
            "rates": dict(m.solved.rates),
            "target": {name: dict(shares) for name, shares in m.solved.target.items()},
            "attainment": dict(m.solved.attainment),
            "utilization": {str(e): u for e, u in m.solved.utilization.items()},
        },
        "stepped": now_s - m.stepped_s,
        "shifting": m.shifting,
        "speeds": {e: [s.slowdown, estimate(s.observed), estimate(s.foreign)] for e, s in m.speeds.items()},
        "health": {e: _dump_health(h, now_s) for e, h in m.health.items() if h != Health()},
        "arrivals": {name: estimate(e) for name, e in m.arrivals.rates.items()},
        "slow": estimate(m.arrivals.slow),
        "steady": estimate(m.arrivals.steady),
        "observed": m.observed,
    }


def _dump_health(h: Health, now_s: float) -> dict[str, object]:
    reason = None if h.reason is None else [h.reason.code.value, h.reason.subject, h.reason.message]
    stuck = None if h.stuck_since_s is None else now_s - h.stuck_since_s
    return {"state": h.state.value, "since": now_s - h.since_s, "stuck": stuck, "rests": h.rests, "reason": reason}


def _load(saved: Mapping[str, Any], now_s: float) -> RouteMemory:
    def estimate(pair: list[float] | None) -> Estimate | None:
        return None if pair is None else Estimate(float(pair[0]), now_s - float(pair[1]))

    solved = saved["solved"]
    rates = {name: e for name, pair in saved["arrivals"].items() if (e := estimate(pair)) is not None}
    return RouteMemory(
        current=_table(saved["current"]),
        solved=None
        if solved is None
        else Solved(
            str(solved["key"]),
            _floats(solved["rates"], str),
            _table(solved["target"]),
            _floats(solved["attainment"], str),
            _floats(solved["utilization"], EndpointId),
        ),
        stepped_s=now_s - float(saved["stepped"]),
        shifting=bool(saved["shifting"]),
        speeds={EndpointId(e): Speed(float(s[0]), estimate(s[1]), estimate(s[2])) for e, s in saved["speeds"].items()},
        health={EndpointId(e): _load_health(h, now_s) for e, h in saved["health"].items()},
        arrivals=Arrivals(rates, estimate(saved["slow"]), estimate(saved.get("steady"))),
        observed=bool(saved["observed"]),
    )


def _floats(data: Mapping[str, Any], key: Callable[[str], K]) -> dict[K, float]:
    return {key(name): float(value) for name, value in data.items()}


def _table(data: Mapping[str, Any]) -> Table:
    return {name: _floats(shares, EndpointId) for name, shares in data.items()}


def _load_health(h: Mapping[str, Any], now_s: float) -> Health:
    stuck = None if h["stuck"] is None else now_s - float(h["stuck"])
    reason = None if h["reason"] is None else Reason(ReasonCode(h["reason"][0]), h["reason"][1], h["reason"][2])
    return Health(State(h["state"]), now_s - float(h["since"]), stuck, int(h["rests"]), reason)
