"""The policies against published numbers and closed forms."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.optimize import brentq

from meshctl.core import weights
from meshctl.core.queueing import Array
from meshctl.core.weights import Demand, Fleet, Table
from meshctl.model import Policy
from meshctl.sim.reference import SLO_S
from tests.harness.core import demand, fleet

MU = np.array([1233.0, 713.0, 430.0, 172.0])
"""Images/s of V100, P100, T4 and K80 with MXNet's ResNet-50 at batch 128 (32 for the P100)."""
FOUR = Fleet(1 / MU[:, None], np.ones(4), np.ones(4))
ONE = np.eye(1)


def mixture_p99_ms(rates: Array) -> float:
    """p99 of the time in a system of independent M/M/1 queues, over all requests."""
    part = rates / rates.sum()
    p99_s: float = brentq(lambda t: float(part @ np.exp(-(MU - rates) * t)) - 0.01, 1e-6, 10)
    return p99_s * 1e3


@pytest.mark.parametrize(("rho", "proportional", "sqrt"), [(0.5, 23.6, 12.1), (0.7, 39.3, 22.7), (0.9, 117.9, 72.3)])
def test_closed_forms_have_the_published_tails(rho: float, proportional: float, sqrt: float) -> None:
    """p99 in ms of the proportional and the mean-optimal split of four unlike GPUs."""
    load = Demand(np.array([rho * MU.sum()]), ONE)
    for policy, p99_ms in ((Policy.PROPORTIONAL, proportional), (Policy.MEAN_OPTIMAL, sqrt)):
        shares = weights.solve(policy, FOUR, load, SLO_S).shares[0]
        assert mixture_p99_ms(shares * load.rates[0]) == pytest.approx(p99_ms, abs=0.1)


def mg1_mean_rates(k: float, load: float) -> Array:
    """The closed form for M/G/1: mu - l = sqrt(k mu / (theta - (1 - k) / mu)), theta bisected to the load."""

    def rates(theta: float) -> Array:
        found: Array = np.maximum(MU - np.sqrt(k * MU / (theta - (1 - k) / MU)), 0)
        return found

    theta = brentq(lambda x: float(rates(x).sum() - load), (1 - k) / MU.min() + 1e-9, 1e3)
    return rates(theta)


def test_the_mean_optimal_split_is_the_closed_form_with_one() -> None:
    """M/M/1 is M/G/1 with k = (1 + C^2) / 2 = 1."""
    load = 0.6 * MU.sum()
    shares = weights.solve(Policy.MEAN_OPTIMAL, FOUR, Demand(np.array([load]), ONE), SLO_S).shares[0]
    assert shares * load == pytest.approx(mg1_mean_rates(1.0, load), rel=1e-6, abs=1e-3)


def test_the_mean_optimal_split_leaves_slow_servers_idle_at_low_load() -> None:
    """A negative rate is dropped, and the others share what is left; the fastest takes the last."""
    for load in (1e-9, 1.0, 200.0):
        shares = weights.solve(Policy.MEAN_OPTIMAL, FOUR, Demand(np.array([load]), ONE), SLO_S).shares[0]
        assert shares == pytest.approx([1, 0, 0, 0])


@pytest.mark.parametrize("load_ratio", [0.3, 0.8, 1.2])
def test_equal_utilization_keeps_all_equally_busy_and_less_than_any_equal_mix(load_ratio: float) -> None:
    """Every class has the same utilisation, at most that of the same mix everywhere."""
    wanted = demand(load_ratio)
    table = weights.solve(Policy.EQUAL_UTILIZATION, fleet(), wanted, SLO_S)
    assert table.utilization == pytest.approx(table.utilization[0])
    assert table.utilization[0] <= load_ratio + 1e-9
    assert weights.solve(Policy.PROPORTIONAL, fleet(), wanted, SLO_S).utilization == pytest.approx(load_ratio)


def test_round_robin_and_least_request_count_endpoints_only() -> None:
    """Two policies that know no hardware."""
    uneven = dataclasses.replace(fleet(), count=np.array([1.0, 2.0, 3.0, 4.0]))
    for policy in (Policy.ROUND_ROBIN, Policy.LEAST_REQUEST):
        assert weights.solve(policy, uneven, demand(0.5), SLO_S).shares == pytest.approx(
            np.tile([0.1, 0.2, 0.3, 0.4], (3, 1))
        )


@pytest.fixture(scope="module")
def solved() -> Table:
    return weights.solve(Policy.BALANCED, fleet(), demand(0.8), SLO_S)


def test_the_balanced_table_serves_the_reference_fleet(solved: Table) -> None:
    """At 80 % load all sizes attain 99 %; no large request goes where it cannot be answered in time (K40: 345 ms)."""
    assert solved.attainment.min() > 0.99
    assert solved.shares[2, 3] == 0
    assert (solved.utilization < 1).all()


def test_a_warm_start_from_the_answer_stays_there(solved: Table) -> None:
    """The same question again moves no share by more than a hundredth, and costs less than from cold."""
    again = weights.solve(Policy.BALANCED, fleet(), demand(0.8), SLO_S, warm=solved.shares)
    assert again.shares == pytest.approx(solved.shares, abs=0.01)
    assert again.evaluations < solved.evaluations


def test_warm_starts_along_a_rising_load_end_where_a_cold_start_does() -> None:
    """What was idle at 30 % load is used at 90 %: zeros of an earlier table do not stay for ever."""
    warm = None
    for load in np.linspace(0.3, 0.9, 13):
        table = weights.solve(Policy.BALANCED, fleet(), demand(load), SLO_S, warm=warm)
        warm = table.shares
        cold = weights.solve(Policy.BALANCED, fleet(), demand(load), SLO_S)
        assert table.attainment.min() > cold.attainment.min() - 0.02
    overload = weights.solve(Policy.BALANCED, fleet(), demand(1e6), SLO_S).shares
    table = weights.solve(Policy.BALANCED, fleet(), demand(0.8), SLO_S, warm=overload)
    assert table.utilization.max() < 1


def test_the_same_question_has_the_same_answer_to_the_bit(solved: Table) -> None:
    """Deterministic."""
    again = weights.solve(Policy.BALANCED, fleet(), demand(0.8), SLO_S)
    assert again.shares.tobytes() == solved.shares.tobytes()


def test_a_size_without_traffic_changes_nothing_for_the_others() -> None:
    """Its own row is the mean of theirs; without any traffic the table is the equal mix."""
    three, two = demand(0.8), weights.Demand(demand(0.8).rates * np.array([1, 1, 0]), np.eye(3))
    part = Fleet(fleet().service_s[:, :2], fleet().count, fleet().servers)
    alone = weights.solve(Policy.BALANCED, part, Demand(three.rates[:2], np.eye(2)), SLO_S)
    table = weights.solve(Policy.BALANCED, fleet(), two, SLO_S)
    assert table.shares[:2] == pytest.approx(alone.shares, abs=1e-9)
    assert table.shares[2] == pytest.approx(two.rates[:2] / two.rates.sum() @ alone.shares)
    silent = weights.solve(Policy.BALANCED, fleet(), Demand(np.zeros(3), np.eye(3)), SLO_S)
    assert silent.shares == pytest.approx(weights.equal_mix(fleet(), demand(0.8)), abs=0.2)
    assert np.isfinite(silent.attainment).all()


def test_a_few_slow_endpoints_among_a_thousand_keep_their_part() -> None:
    """Their share is small because they are few, not because it does not matter."""
    service = np.vstack([fleet().service_s[0], 1.5 * fleet().service_s[0]])
    table = weights.solve(
        Policy.BALANCED, Fleet(service, np.array([996.0, 4.0]), np.ones(2)), demand(0.7, servers_per_gpu=990), SLO_S
    )
    assert table.shares[:, 1].max() > 5e-4
    assert table.utilization[1] > 0.1


def test_hundreds_of_classes_have_a_table() -> None:
    """No share is dropped for being one of many."""
    slow = np.linspace(1, 2, 250)[:, None]
    many = Fleet(slow * fleet().service_s[0], np.ones(250), np.ones(250))
    table = weights.solve(Policy.BALANCED, many, Demand(np.array([8000.0, 1500.0, 500.0]), np.eye(3)), SLO_S)
    assert table.shares.sum(axis=1) == pytest.approx(1)
    assert np.median(table.utilization) > 0.1


@pytest.mark.parametrize(
    ("service", "count", "servers", "said"),
    [
        (0.0, 1.0, 1.0, "service times"),
        (np.nan, 1.0, 1.0, "service times"),
        (np.inf, 1.0, 1.0, "service times"),
        (0.1, 0.0, 1.0, "endpoint"),
        (0.1, 1.0, 0.0, "room"),
    ],
)
def test_a_fleet_that_can_not_be_is_refused(service: float, count: float, servers: float, said: str) -> None:
    """Before any arithmetic."""
    with pytest.raises(ValueError, match=said):
        Fleet(np.array([[service]]), np.array([count]), np.array([servers]))


def test_shapes_that_disagree_and_slos_of_nothing_are_refused() -> None:
    """Both sides are in the message."""
    with pytest.raises(ValueError, match="size classes"):
        weights.solve(Policy.BALANCED, fleet(), Demand(np.ones(2), np.eye(2)), SLO_S)
    with pytest.raises(ValueError, match="slo_s=0"):
        weights.solve(Policy.BALANCED, fleet(), demand(0.5), 0.0)


def test_the_objectives_gradient_is_that_of_finite_differences() -> None:
    """At a table that is neither the start nor the answer, with a default class that mixes kinds."""
    wanted = Demand(np.array([400.0, 60.0, 20.0, 30.0]), np.vstack([np.eye(3), [0.8, 0.15, 0.05]]))
    start = weights.equal_mix(fleet(), wanted)
    objective = weights._Objective(fleet(), wanted, SLO_S, 4, start)  # noqa: SLF001 what L-BFGS is given
    logits = np.log(start).ravel() + np.random.default_rng(2).normal(0, 0.4, 16)
    _, gradient = objective(logits)
    for i in range(len(logits)):
        step = np.zeros_like(logits)
        step[i] = 1e-5
        numeric = (objective(logits + step)[0] - objective(logits - step)[0]) / 2e-5
        assert gradient[i] == pytest.approx(numeric, rel=5e-3, abs=1e-5)
