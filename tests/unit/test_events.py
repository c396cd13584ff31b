"""The event simulation against the measurements that it stands in for (12 servers, 744.5 requests/s, SLO 150 ms)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from meshctl.core import weights
from meshctl.model import LbPolicy, LoadBalancer, Policy
from meshctl.sim import reference
from meshctl.sim.events import JOIN_SHORTEST, Outcome, Run, Server, Slowdown, Table, simulate
from tests.harness.closed_loop import servers
from tests.harness.core import CAPACITY_RPS, demand, fleet

SHARES = tuple(c.share for c in reference.SIZES)
EVEN = ((1.0,) * 12,)
DEFAULT = Table(EVEN)
"""Istio's: one cluster, equal weights, LEAST_REQUEST with two choices."""
FULL_SCAN = Table(EVEN, LoadBalancer(choice_count=12))
GLOBAL = Table(JOIN_SHORTEST)
SLO_S = reference.SLO_S


def solved(policy: Policy, load_ratio: float, gateways: int = 1) -> Table:
    found = weights.solve(policy, fleet(), demand(load_ratio), SLO_S, gateways)
    return Table(tuple(tuple(np.repeat(row / 3, 3).tolist()) for row in found.shares))


def run(load_ratio: float, table: Table, gateways: int = 1, seconds: float = 60.0, seed: int = 1) -> Outcome:
    return simulate(Run(servers(), SHARES, load_ratio * CAPACITY_RPS, seconds, (table,), gateways, seed))


def test_istios_default_misses_the_slo_as_a_real_envoy_does() -> None:
    """80 % load: measured p99 626 to 725 ms, goodput 86.0 to 86.8 %."""
    outcome = run(0.8, DEFAULT, seconds=120)
    assert outcome.quantile_s(0.99) == pytest.approx(0.66, abs=0.12)
    assert outcome.goodput(SLO_S) == pytest.approx(0.865, abs=0.025)


@pytest.mark.parametrize(
    ("load_ratio", "gateways", "goodput"), [(0.75, 1, 0.907), (0.75, 16, 0.756), (0.85, 16, 0.614)]
)
def test_istios_default_gets_worse_with_proxies(load_ratio: float, gateways: int, goodput: float) -> None:
    """Counters of one's own requests only: the published table, to 4 points."""
    assert run(load_ratio, DEFAULT, gateways).goodput(SLO_S) == pytest.approx(goodput, abs=0.04)


def test_a_full_scan_is_better_than_two_choices() -> None:
    """Published: 98.9 % at 75 % with one proxy, 82.0 % with 16."""
    assert run(0.75, FULL_SCAN).goodput(SLO_S) == pytest.approx(0.989, abs=0.01)
    assert run(0.75, FULL_SCAN, 16).goodput(SLO_S) == pytest.approx(0.82, abs=0.04)


@pytest.mark.parametrize(("load_ratio", "at_least"), [(0.75, 0.999), (0.85, 0.999), (0.95, 0.98)])
def test_the_shortest_completion_is_the_clairvoyant_reference(load_ratio: float, at_least: float) -> None:
    """Published: 100/100/99.4 %."""
    assert run(load_ratio, GLOBAL).goodput(SLO_S) >= at_least


@pytest.mark.parametrize(("load_ratio", "gateways", "at_least"), [(0.75, 1, 0.999), (0.75, 16, 0.99), (0.85, 16, 0.97)])
def test_our_table_holds_the_slo_for_any_number_of_proxies(load_ratio: float, gateways: int, at_least: float) -> None:
    """The project's numbers: 99 % at 75 % and 97 % at 85 % with 16 proxies, and more than equal utilisation gets."""
    goodput = run(load_ratio, solved(Policy.BALANCED, load_ratio, gateways), gateways).goodput(SLO_S)
    assert goodput >= at_least
    assert goodput >= run(load_ratio, solved(Policy.EQUAL_UTILIZATION, load_ratio), gateways).goodput(SLO_S) - 0.001


def test_before_anything_is_measured_a_gpu_at_half_speed_costs_little() -> None:
    """75 % load, one V100 twice as slow: at least 98 % through LEAST_REQUEST alone, less by the table alone."""
    table = solved(Policy.BALANCED, 0.75)
    slow = (Slowdown(0, 2.0, 0.0),)
    options = Run(servers(), SHARES, 0.75 * CAPACITY_RPS, 60.0, (table,), slowdowns=slow)
    least = simulate(options).goodput(SLO_S)
    robin = dataclasses.replace(table, balancer=LoadBalancer(LbPolicy.ROUND_ROBIN))
    assert least >= 0.98
    assert simulate(dataclasses.replace(options, tables=(robin,))).goodput(SLO_S) < least


@pytest.mark.parametrize("table", [DEFAULT, FULL_SCAN, GLOBAL, solved(Policy.BALANCED, 0.7)], ids=str)
def test_nothing_is_lost_or_served_faster_than_it_can_be(table: Table) -> None:
    """Every request ends once, on a server that exists, not before its service time; no server works more than all the
    time, and none serves two at once."""
    outcome = run(0.7, table, gateways=3, seconds=10)
    times = np.array([s.service_s for s in servers()])[outcome.server, outcome.size]
    assert len(outcome.arrival_s) == pytest.approx(7 * CAPACITY_RPS, rel=0.05)
    assert (np.diff(outcome.arrival_s) >= 0).all()
    assert (outcome.latency_s >= times - 1e-12).all()
    ends = outcome.arrival_s + outcome.latency_s
    for i in range(12):
        here = outcome.server == i
        order = np.argsort(ends[here])
        starts = (ends - times)[here][order]
        assert (starts[1:] >= ends[here][order][:-1] - 1e-9).all()


def test_requests_follow_the_weights_and_zeros_get_none() -> None:
    """ROUND_ROBIN walks the table: shares to a tenth of a per cent with one proxy."""
    row = (5.0, 3.0, 2.0, *(0.0,) * 9)
    robin = LoadBalancer(LbPolicy.ROUND_ROBIN)
    outcome = run(0.1, Table((row, row, row), robin), seconds=100)
    counts = np.bincount(outcome.server, minlength=12)
    assert counts[3:].sum() == 0
    assert counts[:3] / counts.sum() == pytest.approx([0.5, 0.3, 0.2], abs=0.001)


def test_the_seed_decides_everything() -> None:
    """The same run twice is the same to the bit, another seed is another."""
    first, again, other = (run(0.8, DEFAULT, 4, 5.0, seed) for seed in (7, 7, 8))
    assert first.latency_s.tobytes() == again.latency_s.tobytes()
    assert first.latency_s.tobytes() != other.latency_s.tobytes()


def test_a_change_of_tables_leaves_what_came_before() -> None:
    """Requests before the change are those of a run without it; after it the new weights hold."""
    only = [tuple(float(i == k) for i in range(12)) for k in (0, 5)]
    first, second = (Table((row,) * 3) for row in only)
    base = Run(servers(), SHARES, 100.0, 20.0, (first,))
    changed = simulate(dataclasses.replace(base, tables=(first, dataclasses.replace(second, since_s=10.0))))
    before, after = changed.between(0, 10), changed.between(10)
    assert before.latency_s.tolist() == simulate(base).between(0, 10).latency_s.tolist()
    assert set(before.server) == {0}
    assert set(after.server) == {5}


def test_several_requests_at_once_and_a_slowdown() -> None:
    """Four places serve four at a time; from its time on a slowdown takes its factor."""
    server = Server((0.1,), concurrency=4)
    options = Run((server,), (1.0,), 20.0, 30.0, (Table(((1.0,),)),), slowdowns=(Slowdown(0, 3.0, 15.0),))
    outcome = simulate(options)
    assert outcome.between(0, 15).latency_s.min() == pytest.approx(0.1)
    assert outcome.between(0, 15).goodput(0.1 + 1e-9) > 0.8
    assert outcome.between(15).latency_s.min() == pytest.approx(0.3)
    alone = dataclasses.replace(options, servers=(Server((0.1,)),), slowdowns=())
    assert simulate(alone).quantile_s(0.9) > 1.0


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ((), "from 0 s on"),
        ((Table(EVEN, since_s=1.0),), "from 0 s on"),
        ((Table("nearest"),), "unknown picker 'nearest'"),
        ((Table(EVEN), Table(EVEN * 3, since_s=1.0)), "rows"),
        ((Table(EVEN * 2),), "rows"),
        ((Table(((1.0,),)),), "12 servers"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tables: tuple[Table, ...], said: str) -> None:
    """Before anything is simulated."""
    with pytest.raises(ValueError, match=said):
        simulate(Run(servers(), SHARES, 100.0, 1.0, tables))
