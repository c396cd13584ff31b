"""What holds of every table, for fleets and loads nobody thought of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshctl.core import weights
from meshctl.core.weights import Demand, Fleet, Table
from meshctl.model import Policy

SLO_S = 0.150


ANY_LOAD = st.floats(0.01, 3.0)


@st.composite
def problems(draw: st.DrawFn, loads: Any = ANY_LOAD) -> tuple[Fleet, Demand]:
    """1 to 4 GPU classes, 1 to 3 sizes, loads from nothing to three times the capacity."""
    classes, sizes = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    base = [draw(st.floats(0.001, 0.05)) for _ in range(classes)]
    item = [draw(st.floats(0.0001, 0.005)) for _ in range(classes)]
    service = np.array([[b + i * 8**j for j in range(sizes)] for b, i in zip(base, item, strict=True)])
    count = np.array([float(draw(st.integers(1, 50))) for _ in range(classes)])
    servers = np.array([float(draw(st.integers(1, 4))) for _ in range(classes)])
    mix = np.array([draw(st.floats(0.0, 1.0)) for _ in range(sizes)]) + 1e-9
    fleet = Fleet(service, count, servers)
    mix /= mix.sum()
    return fleet, Demand(draw(loads) * fleet.capacity_rps(mix) * mix, np.eye(sizes))


def check(table: Table, fleet: Fleet, demand: Demand) -> None:
    assert table.shares.shape == (len(demand.rates), len(fleet.count))
    assert table.shares.sum(axis=1) == pytest.approx(1)
    assert (table.shares >= 0).all()
    assert ((table.attainment >= 0) & (table.attainment <= 1)).all()
    assert np.isfinite(table.utilization).all()
    work = (demand.rates[:, None] * table.shares * fleet.service_s.T).sum(axis=0)
    assert table.utilization == pytest.approx(work / (fleet.count * fleet.servers), rel=1e-6, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(problems(), st.sampled_from([1, 4, 64]))
def test_every_policy_gives_a_table(problem: tuple[Fleet, Demand], gateways: int) -> None:
    """Rows sum to 1, nothing is negative or not finite, utilisations are the work sent; overload included."""
    for policy in Policy:
        check(weights.solve(policy, *problem, SLO_S, gateways), *problem)


@settings(max_examples=15, deadline=None)
@given(problems(st.floats(0.1, 0.9)))
def test_balanced_is_no_worse_in_its_worst_class_than_equal_utilization(problem: tuple[Fleet, Demand]) -> None:
    """Within half a per cent of the requests: below that it trades for latency."""
    balanced = weights.solve(Policy.BALANCED, *problem, SLO_S).attainment
    others = [Policy.EQUAL_UTILIZATION, Policy.PROPORTIONAL]
    assert balanced.min() >= max(weights.solve(p, *problem, SLO_S).attainment.min() for p in others) - 0.005


@settings(max_examples=10, deadline=None)
@given(problems(st.floats(0.3, 0.9)), st.randoms(use_true_random=False))
def test_the_order_of_gpu_classes_does_not_matter(problem: tuple[Fleet, Demand], random: Any) -> None:
    """Other orders attain the same."""
    fleet, demand = problem
    order = list(range(len(fleet.count)))
    random.shuffle(order)
    other = Fleet(fleet.service_s[order], fleet.count[order], fleet.servers[order])
    for policy in (Policy.BALANCED, Policy.MEAN_OPTIMAL):
        here, there = weights.solve(policy, fleet, demand, SLO_S), weights.solve(policy, other, demand, SLO_S)
        assert there.attainment == pytest.approx(here.attainment, abs=0.01)


@settings(max_examples=10, deadline=None)
@given(problems(st.floats(0.3, 1.2)), st.sampled_from([1e-3, 60.0]))
def test_the_unit_of_time_does_not_matter(problem: tuple[Fleet, Demand], scale: float) -> None:
    """Times and SLO in other units, rates in their inverse: the same table."""
    fleet, demand = problem
    slower = Fleet(scale * fleet.service_s, fleet.count, fleet.servers)
    rarer = Demand(demand.rates / scale, demand.kinds)
    for policy in Policy:
        here = weights.solve(policy, fleet, demand, SLO_S)
        there = weights.solve(policy, slower, rarer, scale * SLO_S)
        assert there.attainment == pytest.approx(here.attainment, abs=0.01)
        assert there.utilization.max() == pytest.approx(here.utilization.max(), abs=0.02)
