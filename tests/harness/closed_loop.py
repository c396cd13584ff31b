"""The decision and the event simulation in one loop: what the servers did is measured, decided on, and put in force.

The simulation is deterministic, so that a run with one more table repeats the run before it up to that table. So the
whole time is simulated once per change of weights, and the measurements of each second are read off the last run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meshctl.model import DEFAULT_CLASS, EndpointSignals, RouteSignals, Signal
from meshctl.sim import reference
from meshctl.sim.events import Outcome, Run, Server, Slowdown, Table, simulate
from tests.harness.core import CAPACITY_RPS, Rounds, Weights, route, weights_of

WINDOW_S = 5.0
"""Of rates; the adapters' default."""
UTILIZATION_WINDOW_S = 1.0
"""DCGM's and Triton's utilisation is of about a second."""
NEVER = Slowdown(0, 1.0, 1e9)


def servers() -> tuple[Server, ...]:
    """The reference fleet, in the order of `tests.harness.core.endpoint`."""
    times = [tuple(base + item * c.batch for c in reference.SIZES) for base, item in reference.SERVICE_S.values()]
    return tuple(Server(t) for t in times for _ in range(reference.SERVERS_PER_GPU))


def table(weights: Weights, since_s: float) -> Table:
    rows = tuple(tuple(float(w) for w in weights[c.name].values()) for c in reference.SIZES)
    return Table(rows, since_s=since_s)


@dataclass
class ClosedLoop:
    """`rounds` decides each second from `warm_up_s` on; the load is a share of the fleet's capacity."""

    load_ratio: float
    seconds: int
    slowdown: Slowdown = NEVER
    gateways: int = 1
    seed: int = 1
    react: bool = True
    rounds: Rounds = field(default_factory=lambda: Rounds(route()))

    def run(self) -> Outcome:
        load = self.load_ratio * CAPACITY_RPS
        self.rounds.gateways = self.gateways
        spec = dataclasses.replace(self.rounds.route.spec, expected_load_rps=load)
        self.rounds.route = dataclasses.replace(self.rounds.route, spec=spec)
        first = self.rounds.decide(RouteSignals(), after_s=0.0)
        tables = [table(weights_of(first), 0.0)]
        run = Run(
            servers(),
            tuple(c.share for c in reference.SIZES),
            load,
            float(self.seconds),
            tuple(tables),
            self.gateways,
            self.seed,
            (self.slowdown,),
        )
        seen = _Seen(run, simulate(run))
        for second in range(1, self.seconds):
            moves = self.rounds.moves
            plan = self.rounds.decide(seen.signals(self.rounds, float(second)))
            if self.react and self.rounds.moves > moves:
                tables.append(table(weights_of(plan), float(second)))
                run = dataclasses.replace(run, tables=tuple(tables))
                seen = _Seen(run, simulate(run))
        return seen.outcome


class _Seen:
    """What metrics would show of one simulated run."""

    def __init__(self, run: Run, outcome: Outcome) -> None:
        self.outcome = outcome
        times = np.array([s.service_s for s in run.servers])
        self.service_s: NDArray[np.float64] = times[outcome.server, outcome.size]
        for slow in run.slowdowns:
            hit = (outcome.server == slow.server) & (outcome.arrival_s >= slow.since_s)
            self.service_s[hit] *= slow.factor
        self.end_s = outcome.arrival_s + outcome.latency_s
        self.batch = np.array([c.batch for c in reference.SIZES])[outcome.size]

    def signals(self, rounds: Rounds, now_s: float) -> RouteSignals:
        sizes = self.outcome.size[(self.outcome.arrival_s > now_s - WINDOW_S) & (self.outcome.arrival_s <= now_s)]
        window_s = min(WINDOW_S, now_s)
        arrivals = {c.name: Signal(float((sizes == j).sum()) / window_s, now_s) for j, c in enumerate(reference.SIZES)}
        endpoints = {e.id: self._endpoint(i, now_s, window_s) for i, e in enumerate(rounds.route.endpoints)}
        return RouteSignals({**arrivals, DEFAULT_CLASS: Signal(0.0, now_s)}, endpoints)

    def _endpoint(self, index: int, now_s: float, window_s: float) -> EndpointSignals:
        here = self.outcome.server == index
        arrived, end, service = self.outcome.arrival_s[here], self.end_s[here], self.service_s[here]
        done = (end > now_s - window_s) & (end <= now_s)
        recent = np.minimum(end, now_s) - np.maximum(end - service, now_s - UTILIZATION_WINDOW_S)
        zero, pending = Signal(0.0, now_s), Signal(float(((arrived <= now_s) & (end > now_s)).sum()), now_s)
        rate = Signal(float(done.sum()) / window_s, now_s)
        none = Signal.no_traffic(now_s)
        return EndpointSignals(
            gpu_utilization_ratio=Signal(min(1.0, float(np.maximum(recent, 0).sum()) / UTILIZATION_WINDOW_S), now_s),
            busy_ratio=Signal(min(1.0, float(service[done].sum()) / window_s), now_s),
            service_s=Signal(float(service[done].mean()), now_s) if done.any() else none,
            batch=Signal(float(self.batch[here][done].mean()), now_s) if done.any() else none,
            queue_s=Signal(float((end - arrived - service)[done].mean()), now_s) if done.any() else none,
            pending=pending,
            completed_rps=rate,
            failed_rps=zero,
            proxy_rps=rate,
            proxy_failed_rps=zero,
            proxy_active=pending,
        )
