"""Which table a route should aim at: solved anew when what the last one was solved for no longer holds.

Endpoints that cannot be told apart are one class of the solver. A table is kept while the fleet is the same and demand
is within `_WORK_BAND` of what it was solved for, so that noise moves nothing. One call solves a bounded number of
tables: a thousand routes that change at once must not hold up everybody's tick. Until its turn a route keeps the table
it has, or, when it is new, starts from equal utilisation, which is stable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from meshctl.core import capacity, demand, guard, weights
from meshctl.core.health import State
from meshctl.core.inforce import IN_FORCE
from meshctl.core.look import PROBATION, Look
from meshctl.core.memory import RouteMemory, Solved
from meshctl.core.queueing import Array
from meshctl.model import DEFAULT_CLASS, EndpointId, Input, Policy, Reason, ReasonCode, RouteSpec, SizeClass

_WORK_BAND = 0.06
"""The table is solved anew when demand moved by more than this part of the work. Poisson's noise alone, smoothed,
reaches 4 %, with which the closed loop at 75 and 80 % load moved weights 5 to 11 times in 300 s; with 6 % it does so 0
to 3 times, and goodput is the same."""
SOLVES = 25
"""Tables solved in one call, about 20 ms each from cold: a thousand new routes must not hold up everybody's tick. The
others start from equal utilisation, which is stable, and get their table in the next calls."""


@dataclass(slots=True)
class Budget:
    """Solves left in this call."""

    left: int

    def spend(self) -> bool:
        self.left -= 1
        return self.left >= 0


INTERIM = "interim"
"""Key of a table that was not solved for lack of time; no fleet's key equals it."""


def solve(
    look: Look, gateways: int, before: RouteMemory, budget: Budget, now_s: float, *, suspended: bool
) -> tuple[Solved, tuple[Reason, ...]]:
    """The table to aim at, and why: the last one while what it was solved for holds."""
    spec, last = look.route.spec, before.solved
    names = (*(c.name for c in spec.sizes), DEFAULT_CLASS)
    if not look.usable:
        return Solved("", {}, {n: {e.id: 0.0 for e in look.route.endpoints} for n in names}, {}, {}), ()
    groups = _groups(look)
    fleet, kinds = _fleet(look, groups), _kinds(spec.sizes)
    # a frozen route's clock stands still: nothing decays while nothing is seen
    as_of_s = -math.inf if look.frozen else now_s
    asked = demand.forecast(spec, look.arrivals, fleet.capacity_rps(kinds[-1]), as_of_s)
    proxies = 1 << (gateways - 1).bit_length()  # the next power of two: a proxy more or less is no reason to move
    key = _key(look, groups, fleet, proxies)
    if last is not None and not _names_fit(last, names, look):
        last = None
    wanted = weights.Demand(np.array([asked.rates[n] for n in names]), kinds)
    if last is not None and last.key == IN_FORCE:
        table = _expected(spec, fleet, wanted, proxies, _warm(last, names, groups))
        last = replace(last, attainment=_attained(names, table), utilization=_used(groups, table))
    holds = last is not None and last.key == key and _work_moved(last, asked.rates, fleet, kinds) < _WORK_BAND
    if last is None or not (holds or suspended or look.frozen):
        if budget.spend():
            warm = None if last is None else _warm(last, names, groups)
            changed = last is not None and last.key != key
            table = weights.solve(spec.policy, fleet, wanted, spec.slo_s, proxies, warm, changed=changed)
            table = _expected(spec, fleet, wanted, proxies, table.shares)
            last = _spread(look, names, groups, table, key, asked.rates)
        elif last is None:
            table = weights.evaluate(fleet, wanted, spec.slo_s, proxies, weights.equal_mix(fleet, wanted))
            last = _spread(look, names, groups, table, INTERIM, asked.rates)
        else:
            last = _waiting(last, look)
    return last, (*asked.reasons, _verdict(spec.policy, spec.percentile, last, proxies, known=asked.known))


def _expected(
    spec: RouteSpec, fleet: weights.Fleet, wanted: weights.Demand, proxies: int, shares: Array
) -> weights.Table:
    """`shares` are solved for the forecast with headroom; what to expect, and so whether it is feasible, is without."""
    spare = weights.Demand(wanted.rates / (1 + spec.guard.headroom_ratio), wanted.kinds)
    return weights.evaluate(fleet, spare, spec.slo_s, proxies, shares)


def _waiting(last: Solved, look: Look) -> Solved:
    """The table in use until there is time for a new one, less who must not get traffic any more. The same object
    when nothing is to change: a shift that is under way goes on."""
    allowed = frozenset(e.id for e in look.usable)
    barred = any(share > 0 and e not in allowed for row in last.target.values() for e, share in row.items())
    if last.key == INTERIM and not barred:
        return last
    target = guard.restrict(last.target, allowed, tuple(e.id for e in look.route.endpoints)) if barred else last.target
    return replace(last, key=INTERIM, target=target)


def _key(
    look: Look,
    groups: Mapping[tuple[str, int, float], tuple[EndpointId, ...]],
    fleet: weights.Fleet,
    proxies: int,
) -> str:
    """What a table was solved for, other than the demand."""
    spec = look.route.spec
    trial = sorted(e.id for e in look.usable if look.health[e.id].state is State.PROBATION)
    sizes = [(c.name, c.batch, c.share) for c in spec.sizes]
    times = fleet.service_s.tolist()
    return repr((spec.policy.value, spec.slo_s, proxies, sizes, sorted(groups.items()), times, trial))


def _groups(look: Look) -> dict[tuple[str, int, float], tuple[EndpointId, ...]]:
    """Usable endpoints that the solver cannot tell apart: product, concurrency, slowdown."""
    groups: dict[tuple[str, int, float], list[EndpointId]] = {}
    for e in look.usable:
        groups.setdefault((e.gpu, e.concurrency, round(look.speeds[e.id].slowdown, 4)), []).append(e.id)
    return {key: tuple(groups[key]) for key in sorted(groups)}


def _fleet(look: Look, groups: Mapping[tuple[str, int, float], tuple[EndpointId, ...]]) -> weights.Fleet:
    batches = [c.batch for c in look.route.spec.sizes]
    service = [
        [key[2] * capacity.service_s(look.profiles[members[0]], b) for b in batches] for key, members in groups.items()
    ]
    counts = [float(len(m)) for m in groups.values()]
    return weights.Fleet(np.array(service), np.array(counts), np.array([float(key[1]) for key in groups]))


def _kinds(sizes: tuple[SizeClass, ...]) -> Array:
    """(J, K): each size class is one kind, the default class the declared mix."""
    shares = np.array([c.share for c in sizes])
    return np.vstack([np.eye(len(sizes)), shares / shares.sum()])


def _names_fit(solved: Solved, names: tuple[str, ...], look: Look) -> bool:
    everyone = {e.id for e in look.route.endpoints}
    return set(solved.target) == set(names) and all(set(row) == everyone for row in solved.target.values())


def _work_moved(last: Solved, rates: Mapping[str, float], fleet: weights.Fleet, kinds: Array) -> float:
    """How much of the work (requests times their mean service time) is other than what was solved for, 0..1."""
    per_class = kinds @ fleet.service_s.mean(axis=0)
    work = [(last.rates.get(n, 0.0) * s, rates[n] * s) for n, s in zip(rates, per_class, strict=True)]
    total = max(sum(old for old, _ in work), 1e-12)
    return float(sum(abs(new - old) for old, new in work) / total)


def _warm(
    last: Solved, names: tuple[str, ...], groups: Mapping[tuple[str, int, float], tuple[EndpointId, ...]]
) -> Array:
    rows = [[sum(last.target[n].get(e, 0.0) for e in members) for members in groups.values()] for n in names]
    table = np.maximum(np.array(rows), 1e-9)
    warm: Array = table / table.sum(axis=1, keepdims=True)
    return warm


def _spread(
    look: Look,
    names: tuple[str, ...],
    groups: Mapping[tuple[str, int, float], tuple[EndpointId, ...]],
    table: weights.Table,
    key: str,
    rates: Mapping[str, float],
) -> Solved:
    """From classes to endpoints: evenly inside a class, less for those on probation."""
    part = {e.id: PROBATION if look.health[e.id].state is State.PROBATION else 1.0 for e in look.usable}
    target = {}
    for j, name in enumerate(names):
        row = {e.id: 0.0 for e in look.route.endpoints}
        for i, members in enumerate(groups.values()):
            row.update({e: float(table.shares[j, i]) / len(members) * part[e] for e in members})
        target[name] = guard.normalised(row)
    return Solved(key, dict(rates), target, _attained(names, table), _used(groups, table))


def _attained(names: tuple[str, ...], table: weights.Table) -> dict[str, float]:
    return {n: float(a) for n, a in zip(names, table.attainment, strict=True)}


def _used(
    groups: Mapping[tuple[str, int, float], tuple[EndpointId, ...]], table: weights.Table
) -> dict[EndpointId, float]:
    return {e: float(table.utilization[i]) for i, members in enumerate(groups.values()) for e in members}


def _verdict(policy: Policy, percentile: float, solved: Solved, gateways: int, *, known: bool) -> Reason:
    worst = min((n for n in solved.attainment if n != DEFAULT_CLASS), key=lambda n: (solved.attainment[n], n))
    busiest = max(solved.utilization.values(), default=0.0)
    inputs = (
        Input("worst size class", worst),
        Input("its attainment", solved.attainment[worst], "ratio"),
        Input("percentile", percentile, "ratio"),
        Input("solved for", sum(solved.rates.values()), "requests/s"),
        Input("highest utilisation", busiest, "ratio"),
        Input("proxies", float(gateways)),
    )
    if known and solved.attainment[worst] < percentile:
        message = f"no table meets the SLO: at best {solved.attainment[worst]:.1%} of {worst} in time"
        return Reason(ReasonCode.INFEASIBLE, worst, message, inputs)
    code = ReasonCode.SOLVED if policy is Policy.BALANCED else ReasonCode.CLOSED_FORM
    return Reason(code, policy.value, f"{solved.attainment[worst]:.2%} of {worst}, the worst class, in time", inputs)
