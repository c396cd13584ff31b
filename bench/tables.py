"""The policies' tables in the event simulation: what a real Envoy would need hours for.

Tables come from `decide` itself, headroom, integers and balancer included, so they are what Envoys would be given. The
first `WARMUP_S` of each run are left out: the fleet starts empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meshctl.core.capacity import service_s
from meshctl.core.decide import Memory, decide
from meshctl.model import (
    DesiredRoute,
    Endpoint,
    EndpointId,
    LbPolicy,
    LoadBalancer,
    Policy,
    RouteId,
    RouteSpec,
    ServiceProfile,
    Snapshot,
)
from meshctl.sim.events import JOIN_SHORTEST, Outcome, Run, Server, Slowdown, Table, simulate
from meshctl.sim.reference import MODEL, PERCENTILE, PROFILES, SERVERS_PER_GPU, SIZES, SLO_S, capacity_rps

WARMUP_S = 10.0
_SERVERS = len(PROFILES) * SERVERS_PER_GPU
_ONE_CLUSTER = ((1.0,) * _SERVERS,)
_LEAST = LbPolicy.LEAST_REQUEST

FIXED: Mapping[str, Table] = {
    "round robin": Table(_ONE_CLUSTER, LoadBalancer(LbPolicy.ROUND_ROBIN)),
    "Istio's default (least of 2)": Table(_ONE_CLUSTER, LoadBalancer(_LEAST)),
    "least request, full scan": Table(_ONE_CLUSTER, LoadBalancer(_LEAST, choice_count=_SERVERS)),
    "reference: shortest completion, one view": Table(JOIN_SHORTEST),
}
"""Policies that need no controller, by name; all endpoints in one cluster, but for the clairvoyant reference."""
SOLVED = (Policy.PROPORTIONAL, Policy.MEAN_OPTIMAL, Policy.EQUAL_UTILIZATION, Policy.BALANCED)
"""meshctl's, with a cluster per size class."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one load; means over the seeds, of runs of the event simulation."""

    policy: str
    gateways: int
    load_ratio: float
    goodput: float
    worst_class: float
    p99_ms: float


def cells(loads: Sequence[float], gateways: Sequence[int], seeds: Sequence[int], seconds: float) -> list[Cell]:
    """Every policy at every load and number of Envoys."""
    names = [*FIXED, *(policy.value for policy in SOLVED)]
    return [_cell(name, many, load, seeds, seconds) for name in names for many in gateways for load in loads]


def _cell(name: str, gateways: int, load: float, seeds: Sequence[int], seconds: float) -> Cell:
    rate = load * capacity_rps()
    found = FIXED.get(name) or solved(Policy(name), gateways, rate)
    runs = [simulated((found,), gateways, rate, seed, seconds).between(WARMUP_S) for seed in seeds]
    return Cell(
        name,
        gateways,
        load,
        float(np.mean([run.goodput(SLO_S) for run in runs])),
        float(np.mean([min(run.goodput_by_size(SLO_S)) for run in runs])),
        float(np.mean([run.quantile_s(0.99) for run in runs])) * 1e3,
    )


def slow_server(load: float, factor: float, seeds: Sequence[int], seconds: float) -> tuple[float, float]:
    """Goodput with the first V100 `factor` times as slow: with the table of before, and with one that knows."""
    rate = load * capacity_rps()
    slow = (Slowdown(0, factor, WARMUP_S),)
    stale, knowing = solved(Policy.BALANCED, 1, rate), solved(Policy.BALANCED, 1, rate, {0: factor})
    found = []
    for table in (stale, knowing):
        runs = [simulated((table,), 1, rate, seed, WARMUP_S + seconds, slow).between(WARMUP_S) for seed in seeds]
        found.append(float(np.mean([run.goodput(SLO_S) for run in runs])))
    return found[0], found[1]


def solved(policy: Policy, gateways: int, rate_rps: float, slower: Mapping[int, float] | None = None) -> Table:
    """What `decide` gives `gateways` Envoys for a declared load, where the servers `slower` take that much longer."""
    profiles = dict(PROFILES)
    for index, factor in (slower or {}).items():
        profile = PROFILES[_gpus()[index]]
        profiles[f"slow-{index}"] = ServiceProfile(tuple((batch, factor * s) for batch, s in profile.points))
    endpoints = tuple(
        Endpoint(_id(i), "", i, f"slow-{i}" if slower and i in slower else gpu, "") for i, gpu in enumerate(_gpus())
    )
    route = RouteId("bench/reference")
    spec = RouteSpec(
        route, ("*",), MODEL, SLO_S, PERCENTILE / 100, ("x-batch-size",), SIZES, policy, expected_load_rps=rate_rps
    )
    plan = decide(Snapshot({route: DesiredRoute(spec, endpoints, profiles)}, {}, gateways), Memory(), 0.0)[0]
    found = plan.routes[route]
    rows = tuple(tuple(float(found.weights[size.name][_id(i)]) for i in range(_SERVERS)) for size in SIZES)
    return Table(rows, found.load_balancer)


def simulated(
    tables: tuple[Table, ...],
    gateways: int,
    rate_rps: float,
    seed: int,
    seconds: float,
    slowdowns: tuple[Slowdown, ...] = (),
) -> Outcome:
    """The reference fleet under its mix."""
    servers = tuple(Server(tuple(service_s(PROFILES[gpu], size.batch) for size in SIZES)) for gpu in _gpus())
    shares = tuple(size.share for size in SIZES)
    return simulate(Run(servers, shares, rate_rps, seconds, tables, gateways, seed, slowdowns))


def _gpus() -> list[str]:
    """The GPU product of each server, in the order of their ids."""
    return [gpu for gpu in PROFILES for _ in range(SERVERS_PER_GPU)]


def _id(index: int) -> EndpointId:
    return EndpointId(f"server-{index:02}")
