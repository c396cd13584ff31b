"""The policies: from capacities and demand to the share of each size class that each GPU class gets.

The default, `balanced`, maximises the worst size class's probability of an answer within the SLO. With A[j] the
attainment of size class j (`queueing`), f = 1 - A, q[j] its share of the requests and T the requests' mean time, it
minimises, over the rows of P (one simplex per size class, kept by softmax),

    log ||f + eps||_4  +  0.3 log(sum q f + eps)  +  0.3 log(sum q f' + 10 eps)  +  0.1 log T  +  overload penalty

The 4-norm is a soft maximum. In logarithms the terms trade relative gains: while some class misses the SLO the first
decides; once all are within eps = 0.001 it is flat, and the tail at 60 % of the SLO (f') and the mean time take over,
which is the second objective, lower latency. Rejected, each measured (docs/decisions/0001):
total goodput alone (starves the large batches), the tail with a fixed weight instead of its logarithm (does so too,
as soon as no table can serve all), the worst class alone (runs the slow GPUs at 97 %).

L-BFGS with the analytic gradient needs 50-100 evaluations of 0.15 ms. The dispersion of `queueing` depends on P, and
is frozen during a descent and renewed between descents. Deterministic; warm-started from the last table.

The closed forms are named policies and cross-checks: `proportional`, `mean_optimal`, `equal_utilization`.
It knows nothing of endpoints, signals, time, or of what is in force.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

import numpy as np

from meshctl.core.queueing import Array, Workload, dispersion, mean_wait_s
from meshctl.model import Policy

EPSILON = 1e-3
"""Late share below which a size class counts as served: differences below are noise against a percentile of 99."""
_NORM = 4
_SECOND, _MEAN = 0.3, 0.1
_TAIL = 0.6
"""The second objective's deadline, as a part of the SLO."""
_KNEE = 0.97
"""Utilisation from which the penalty grows: above, the fluid limit rules and attainments are extrapolated."""
_PENALTY = 200.0
_COLD, _WARM, _COARSE = (1e-3, 1e-4, 3e-5), (1e-4,), (1e-3,)
"""Tolerances of the descents: the first ones only find the table whose dispersion the next ones use. The coarse one
has to show that there is something worth moving for, no more."""
_GOOD, _MELT, _WORTH_MOVING = 0.998, 0.05, 0.1
"""The objective has many local minima, some 12 points of the worst class apart; where a table leaves that class below
_GOOD, another start is tried. From cold that is the middle between the equal mix and equal utilisation; from the last
table it is that with _MELT of the equal mix, since a share near 0 has no gradient under softmax (zeros stayed: over a
ramp from 30 to 90 % load the worst class ended 56 points below the cold start's). The last table stays unless another
is better by _WORTH_MOVING in the objective, a tenth of the late requests: equally good ones can differ much."""
_FASTER = 0.01
"""What is worth moving for where the last table serves all well: a tenth of the mean time."""
_SMALL = 5e-3
"""Shares below this are dropped: they cost an endpoint a schedule slot and move no measurable traffic. Unless they are
more than a tenth of the class's part of the capacity: a few slow ones among a thousand endpoints have no more."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """GPU classes i serving request kinds k. Arrays: `service_s` (I, K), `count` (I,) endpoints, `servers` (I,)
    requests at once per endpoint."""

    service_s: Array
    count: Array
    servers: Array

    def __post_init__(self) -> None:
        if not (np.isfinite(self.service_s).all() and (self.service_s > 0).all()):
            raise ValueError("service times must be finite and positive")
        if not ((self.count > 0).all() and (self.servers >= 1).all()):
            raise ValueError("every class needs an endpoint and room for a request")

    def mean_service_s(self, kinds: Array) -> Array:
        """(I,) mean service time for the mix `kinds` (K,), which sums to 1."""
        mean: Array = self.service_s @ kinds
        return mean

    def capacity_rps(self, kinds: Array) -> float:
        """Requests per second of the whole fleet when each class gets the same mix."""
        return float((self.count * self.servers / self.mean_service_s(kinds)).sum())


@dataclass(frozen=True, slots=True)
class Demand:
    """Size classes j: `rates` (J,) requests per second, and `kinds` (J, K), the mix of request kinds in each: the
    identity for a class that stands for one batch, the declared mix for the default class."""

    rates: Array
    kinds: Array

    @property
    def mix(self) -> Array:
        """(K,) share of each kind in all requests; sums to 1."""
        total = self.rates.sum()
        mix: Array = (self.rates / total if total > 0 else np.full(len(self.rates), 1 / len(self.rates))) @ self.kinds
        return mix


@dataclass(frozen=True, slots=True)
class Table:
    """`shares` (J, I): the part of size class j that GPU class i gets, rows sum to 1; `attainment` (J,) and
    `utilization` (I,) as expected; `evaluations` of the objective it took (0 for closed forms)."""

    shares: Array
    attainment: Array
    utilization: Array
    evaluations: int = 0


def solve(
    policy: Policy,
    fleet: Fleet,
    demand: Demand,
    slo_s: float,
    gateways: int = 1,
    warm: Array | None = None,
    *,
    changed: bool = False,
) -> Table:
    """The table of `policy`. `warm` (J, I) is the last one; `changed`: it was solved for another fleet.

    Raises ValueError when the shapes disagree or the SLO is not positive.
    """
    if demand.kinds.shape != (len(demand.rates), fleet.service_s.shape[1]) or slo_s <= 0:
        raise ValueError(f"{demand.kinds.shape=} must be (size classes, kinds) of {fleet.service_s.shape=}; {slo_s=}")
    match policy:
        case Policy.BALANCED:
            return balanced(fleet, demand, slo_s, gateways, warm, changed=changed)
        case Policy.EQUAL_UTILIZATION:
            shares = equal_utilization(fleet, demand)
        case Policy.PROPORTIONAL:
            shares = _same_for_all(fleet.count * fleet.servers / fleet.mean_service_s(demand.mix), demand)
        case Policy.MEAN_OPTIMAL:
            shares = mean_optimal(fleet, demand)
        case Policy.LEAST_REQUEST | Policy.ROUND_ROBIN:
            shares = _same_for_all(fleet.count, demand)
    return evaluate(fleet, demand, slo_s, gateways, shares)


def evaluate(fleet: Fleet, demand: Demand, slo_s: float, gateways: int, shares: Array, evaluations: int = 0) -> Table:
    """What to expect of `shares` (J, I)."""
    objective = _Objective(fleet, demand, slo_s, gateways, shares)
    attainment = np.clip(objective.attainments(shares)[0], 0, 1)
    used = fleet.service_s / fleet.servers[:, None]
    return Table(shares, attainment, (objective.rates(shares) * used).sum(axis=1), evaluations)


def _same_for_all(strength: Array, demand: Demand) -> Array:
    row = strength / strength.sum()
    return np.tile(row, (len(demand.rates), 1))


def balanced(
    fleet: Fleet, demand: Demand, slo_s: float, gateways: int, warm: Array | None = None, *, changed: bool = False
) -> Table:
    """The attainment-balanced table; see the module's docstring. A size class without traffic gets the mean of the
    others, weighted by their rates, as its own shares would be arbitrary."""
    busy = demand.rates > 0
    if not busy.any():
        return evaluate(fleet, demand, slo_s, gateways, equal_mix(fleet, demand))
    if not busy.all():
        part = Demand(demand.rates[busy], demand.kinds[busy])
        some = None if warm is None else np.compress(busy, warm, axis=0)
        table = balanced(fleet, part, slo_s, gateways, some, changed=changed)
        shares = np.tile(part.rates / part.rates.sum() @ table.shares, (len(busy), 1))
        shares[busy] = table.shares
        return evaluate(fleet, demand, slo_s, gateways, shares, table.evaluations)
    search = _Search(fleet, demand, slo_s, gateways)
    best = search.cold() if warm is None else search.warm(warm, changed=changed)
    return evaluate(fleet, demand, slo_s, gateways, best, search.evaluations)


def equal_mix(fleet: Fleet, demand: Demand) -> Array:
    """(J, I) the same row for all sizes, proportional to throughput: equal utilisation, stable whenever the load is
    below capacity, so a safe place to start from."""
    return _same_for_all(fleet.count * fleet.servers / fleet.mean_service_s(demand.mix), demand)


def load_solver() -> None:
    """Import what costs 50 MB and 0.3 s, which otherwise the first table that needs it does."""
    import_module("scipy.optimize")


def equal_utilization(fleet: Fleet, demand: Demand) -> Array:
    """(J, I) the table with the smallest highest utilisation: sizes go where they cost least, all GPUs equally busy.

    A linear program: minimise u subject to sum_j rate[j] P[j,i] E[S[i,j]] <= count[i] servers[i] u, rows sum to 1.
    """
    from scipy.optimize import linprog  # see `load_solver`

    sizes, classes = len(demand.rates), len(fleet.count)
    rates = np.maximum(demand.rates, 1e-6 * max(1.0, demand.rates.sum()))
    cost = rates[:, None] * (demand.kinds @ fleet.service_s.T)
    work = np.zeros((classes, sizes * classes + 1))
    for i in range(classes):
        work[i, i : sizes * classes : classes] = cost[:, i]
    work[:, -1] = -(fleet.count * fleet.servers)
    rows = np.hstack([np.kron(np.eye(sizes), np.ones(classes)), np.zeros((sizes, 1))])
    objective = np.append(np.zeros(sizes * classes), 1.0)
    result = linprog(objective, A_ub=work, b_ub=np.zeros(classes), A_eq=rows, b_eq=np.ones(sizes))
    if not result.success or result.x is None:
        raise ArithmeticError(f"the equal-utilisation program has no solution: {result.message}")
    shares = np.maximum(result.x[:-1].reshape(sizes, classes), 0)
    table: Array = shares / shares.sum(axis=1, keepdims=True)
    return table


def mean_optimal(fleet: Fleet, demand: Demand) -> Array:
    """(J, I) the same row for all sizes, which minimises the mean time in the system of independent M/M/1 queues:
    ``l = mu - sqrt(mu) (sum mu - load) / sum sqrt(mu)``, negatives dropped one by one, slowest first."""
    mu = fleet.servers / fleet.mean_service_s(demand.mix)
    load = float(demand.rates.sum())
    if load >= float((mu * fleet.count).sum()):
        return equal_mix(fleet, demand)
    rates = np.zeros_like(mu)
    order = np.argsort(-mu, kind="stable")
    for used in range(len(mu), 0, -1):
        keep = order[:used]
        slack = ((mu * fleet.count)[keep].sum() - load) / (np.sqrt(mu) * fleet.count)[keep].sum()
        rates[:] = 0
        rates[keep] = mu[keep] - np.sqrt(mu[keep]) * slack
        if (rates[keep] > 0).all():
            break
    rates = np.maximum(rates, 0)
    if rates.sum() <= 0:
        rates[order[0]] = 1.0
    return _same_for_all(rates * fleet.count, demand)


class _Objective:
    """The function that `balanced` minimises, for one dispersion."""

    def __init__(self, fleet: Fleet, demand: Demand, slo_s: float, gateways: int, shares: Array) -> None:
        self._fleet, self._demand = fleet, demand
        self._kind_rates = demand.rates[:, None] * demand.kinds  # (J, K)
        self._portion = demand.rates / max(demand.rates.sum(), 1e-12)
        self._used = fleet.service_s / fleet.servers[:, None]
        total = np.maximum(self._kind_rates.sum(axis=0), 1e-12)
        part = self.rates(shares) / total
        self._v = dispersion(part, self.rates(shares), fleet.service_s, fleet.servers, slo_s, gateways)
        self._workload = Workload(fleet.service_s, fleet.servers, slo_s, self._v)
        self._deadlines = self._workload.deadline(slo_s), self._workload.deadline(_TAIL * slo_s)
        self._floor_s = float((fleet.service_s.min(axis=0) * demand.mix).sum())

    def rates(self, shares: Array) -> Array:
        """(I, K) arrivals per second at one endpoint of each class."""
        rates: Array = shares.T @ self._kind_rates / self._fleet.count[:, None]
        return rates

    def attainments(self, shares: Array) -> tuple[Array, Array]:
        """(J,) within the SLO, and within its tail."""
        (f, _), (tail, _) = self._workload.attainment(self.rates(shares), self._deadlines)
        return self._attainment(shares, f), self._attainment(shares, tail)

    def _attainment(self, shares: Array, f: Array) -> Array:
        a: Array = (shares * (self._demand.kinds @ f.T)).sum(axis=1)
        return a

    def _slope(self, shares: Array, f: Array, df: Array, by_attainment: Array) -> Array:
        """Gradient (J, I) in the shares, given the objective's `by_attainment` (J,)."""
        direct = by_attainment[:, None] * (self._demand.kinds @ f.T)
        weight = (by_attainment[:, None] * shares).T @ self._demand.kinds
        by_rate = (weight[:, None, :] @ df)[:, 0] / self._fleet.count[:, None]
        slope: Array = direct + self._kind_rates @ by_rate.T
        return slope

    def __call__(self, logits: Array) -> tuple[float, Array]:
        """Value and gradient (J*I,) at the softmax of `logits` (J*I,)."""
        return self._value_and_slope(_softmax(logits.reshape(len(self._portion), -1)))

    def at(self, shares: Array) -> float:
        """Value at a table."""
        return self._value_and_slope(shares)[0]

    def _value_and_slope(self, shares: Array) -> tuple[float, Array]:
        rates = self.rates(shares)
        (f, df), (tail, dtail) = self._workload.attainment(rates, self._deadlines)
        late = np.maximum(1 - self._attainment(shares, f), 0) + EPSILON
        norm = (late**_NORM).sum()
        total = float(self._portion @ late)
        late_tail = float(self._portion @ np.maximum(1 - self._attainment(shares, tail), 0)) + 10 * EPSILON
        value = np.log(norm) / _NORM + _SECOND * (np.log(total) + np.log(late_tail))
        slope = self._slope(shares, f, df, -(late ** (_NORM - 1)) / norm - _SECOND * self._portion / total)
        slope += self._slope(shares, tail, dtail, -_SECOND * self._portion / late_tail)
        more, more_slope = self._time_and_overload(shares, rates)
        slope += more_slope
        centred = shares * (slope - (slope * shares).sum(axis=1, keepdims=True))
        return float(value + more), centred.ravel()

    def _time_and_overload(self, shares: Array, rates: Array) -> tuple[float, Array]:
        """The mean time in units of the shortest possible, and the penalty for utilisations above the knee. The
        wait's gradient leaves out the change of the c-server factor: this is a tie-break, not the goal."""
        rho = (rates * self._used).sum(axis=1)
        wait = mean_wait_s(rates, self._fleet.service_s, self._fleet.servers, self._v)
        sojourn = self._demand.kinds @ self._fleet.service_s.T + wait  # (J, I)
        mean = float(self._portion @ (shares * sojourn).sum(axis=1))
        idle = 1 - np.minimum(rho, _KNEE)
        at_endpoint = self._portion @ shares  # (I,) part of all requests
        by_rate = (at_endpoint / self._fleet.count)[:, None] * (
            self._v * self._used**2 / (2 * idle[:, None]) + wait[:, None] * self._used / idle[:, None]
        )
        by_rate *= (rho < _KNEE)[:, None]
        mean_slope = self._portion[:, None] * sojourn + self._kind_rates @ by_rate.T
        over = np.maximum(rho - _KNEE, 0)
        value = _MEAN * np.log(mean / self._floor_s) + _PENALTY * float((over**2).sum())
        push = (2 * _PENALTY * over / self._fleet.count)[:, None] * self._used
        return value, _MEAN * mean_slope / mean + self._kind_rates @ push.T

    def minimise(self, shares: Array, tolerance: float) -> tuple[Array, int]:
        """The table that L-BFGS reaches from `shares`, and the evaluations it took. It stops when a step gains less
        than `tolerance`, in units of the logarithm: 1e-4 is a hundredth of a per cent of the late requests."""
        from scipy.optimize import minimize  # see `load_solver`

        logits = np.log(np.maximum(shares, 1e-4))
        result = minimize(
            self, logits.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 120, "ftol": tolerance}
        )
        return _softmax(result.x.reshape(shares.shape)), int(result.nfev)


@dataclass(frozen=True, slots=True)
class _Found:
    """A table on the way: the objective's value, the worst size class's attainment, and the shares."""

    value: float
    worst: float
    shares: Array


class _Search:
    """Where `balanced` starts its descents, and which of their ends it takes; see `_GOOD`."""

    def __init__(self, fleet: Fleet, demand: Demand, slo_s: float, gateways: int) -> None:
        self._problem = fleet, demand, slo_s, gateways
        self._mix = equal_mix(fleet, demand)
        self.evaluations = 0

    def cold(self) -> Array:
        return self._cold().shares

    def warm(self, last: Array, *, changed: bool) -> Array:
        """`last`, or a table that is better by what is worth moving for. That is searched for coarsely first."""
        stay = self._found(last)
        best = self._descend(last, _COARSE)
        if changed:
            best = min(best, self._cold(), key=_value)
        if best.worst < _GOOD:
            best = min(best, self._descend((1 - _MELT) * last + _MELT * self._mix, _COARSE), key=_value)
        if best.value > stay.value - (_FASTER if stay.worst >= _GOOD else _WORTH_MOVING):
            return last
        return self._descend(best.shares, _WARM).shares

    def _cold(self) -> _Found:
        best = self._descend(self._mix, _COLD)
        if best.worst < _GOOD:
            fleet, demand, _, _ = self._problem
            best = min(best, self._descend((self._mix + equal_utilization(fleet, demand)) / 2, _COLD), key=_value)
        return best

    def _found(self, shares: Array) -> _Found:
        objective = _Objective(*self._problem, shares)
        return _Found(objective.at(shares), float(objective.attainments(shares)[0].min()), shares)

    def _descend(self, shares: Array, tolerances: tuple[float, ...]) -> _Found:
        for tolerance in tolerances:
            before = shares
            shares, used = _Objective(*self._problem, shares).minimise(shares, tolerance)
            self.evaluations += used
            if np.abs(shares - before).max() < _SMALL:
                break
        shares = np.where(shares < np.minimum(_SMALL, 0.1 * self._mix), 0, shares)
        return self._found(shares / shares.sum(axis=1, keepdims=True))


def _value(found: _Found) -> float:
    return found.value


def _softmax(logits: Array) -> Array:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Array = e / e.sum(axis=1, keepdims=True)
    return shares
