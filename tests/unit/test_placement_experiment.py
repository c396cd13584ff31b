"""The placement experiments on made-up traces: what they count, and that a policy's result is its own."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from meshctl.core.packing.vocabulary import Policy
from meshctl.sim import openb
from meshctl.sim.openb import Trace, made_up, parse_nodes, parse_pods
from meshctl.sim.placement import Outcome, churn, fill


def ticking() -> float:
    """A clock that goes a second further each time it is read."""
    return float(next(_SECONDS))


_SECONDS = itertools.count()


def trace(nodes: int = 20, pods: int = 300, seed: int = 1) -> Trace:
    first, second = made_up(nodes, pods, seed)
    return Trace(parse_nodes(first, "nodes"), parse_pods(second, "pods"))


def small(*pods: str, cpu_milli: int = 8000) -> Trace:
    """One node of two GPUs, and pods as ``cpu_milli,memory_mib,num_gpu,gpu_milli``."""
    header = "name,cpu_milli,memory_mib,num_gpu,gpu_milli\n"
    lines = "\n".join(f"p{number},{pod}" for number, pod in enumerate(pods))
    nodes = f"sn,cpu_milli,memory_mib,gpu,model\nn0,{cpu_milli},1000,2,T4\n"
    return Trace(parse_nodes(nodes, "nodes"), parse_pods(header + lines, "pods"))


def same(one: Outcome, other: Outcome) -> bool:
    return one.allocated == other.allocated and one.rejected == other.rejected


@pytest.mark.parametrize("policy", list(Policy))
def test_every_policy_fills_a_cluster_and_none_beyond_what_it_has(policy: Policy) -> None:
    """Allocated never exceeds what arrived or what there is, and never falls: nothing departs."""
    outcome = fill(trace(), policy, 1, 1.3, ticking)

    assert list(outcome.allocated) == [100, 110, 120, 130]
    shares = list(outcome.allocated.values())
    assert shares[0] > 0.6
    assert shares == sorted(shares)
    assert shares[-1] <= 1
    assert set(outcome.decision_s) == {1.0}


@pytest.mark.parametrize("policy", list(Policy))
def test_the_same_seed_gives_the_same_result_and_another_seed_another(policy: Policy) -> None:
    """Deterministic, Random too."""
    first, again, other = (fill(trace(), policy, seed, 1.1, ticking) for seed in (1, 1, 2))
    assert same(first, again)
    assert not same(first, other)


def test_who_does_not_fit_is_lost_and_counted_by_reason() -> None:
    """Three whole GPUs asked of two; CPU for one pod only."""
    room = fill(small("1000,1,1,1000"), Policy.STRANDING, 1, 1.5, ticking)
    assert room.rejected == {"NoRoom": 1}
    assert room.allocated == {100: 1.0, 110: 1.0, 120: 1.0, 130: 1.0, 140: 1.0, 150: 1.0}

    cpu = fill(small("5000,1,1,1000"), Policy.STRANDING, 1, 1.0, ticking)
    assert cpu.rejected == {"Cpu": 1}
    assert cpu.allocated == {100: 0.5}


def test_pods_without_gpus_take_cpu_and_move_no_share() -> None:
    """A pod that asks for CPU only is placed; its events count, its GPUs are none."""
    outcome = fill(small("8000,1,0,0", "1,1,1,1000"), Policy.STRANDING, 1, 1.0, ticking)
    assert outcome.rejected
    assert outcome.allocated[100] < 1


def test_the_whole_trace_comes_once_before_anything_comes_twice() -> None:
    """Ten pods that fill two GPUs: whatever the order, all of them fit, once."""
    pods = ("1,1,1,100", "1,1,1,900", "1,1,1,500", "1,1,1,500")
    for seed in range(5):
        outcome = fill(small(*pods), Policy.STRANDING, seed, 1.0, ticking)
        assert len(outcome.decision_s) == len(pods)


def test_a_per_cent_without_events_has_what_was_allocated_when_it_was_passed() -> None:
    """Whole GPUs of two: events at 50, 100 and 150 %; 110 and 120 look back."""
    outcome = fill(small("1,1,1,1000"), Policy.STRANDING, 1, 1.2, ticking)
    assert outcome.allocated == {100: 1.0, 110: 1.0, 120: 1.0}
    assert fill(small("1,1,1,1000"), Policy.STRANDING, 1, 0.5, ticking).allocated == {50: 0.5}


def test_departing_pods_make_room_again() -> None:
    """At a low load nearly everything offered is allocated, though far more arrives than fits at once."""
    outcome = churn(trace(pods=100), Policy.STRANDING, 1, 0.3, ticking)
    assert list(outcome.allocated) == [30]
    assert outcome.allocated[30] == pytest.approx(0.3, abs=0.05)
    assert same(outcome, churn(trace(pods=100), Policy.STRANDING, 1, 0.3, ticking))


def test_departures_lose_pods_only_when_it_is_full() -> None:
    """More is lost at a higher load, and never more allocated than offered."""
    calm, full = (churn(trace(pods=100), Policy.FGD, 1, load, ticking) for load in (0.2, 1.5))
    assert calm.rejected == {}
    assert sum(full.rejected.values()) > 0
    assert full.allocated[150] < 1


@pytest.mark.skipif(openb.find(Path(__file__).parents[2]) is None, reason=f"no openb traces here: {openb.ORIGIN}")
def test_on_the_published_trace_fgd_reaches_what_its_authors_measured() -> None:
    """95.23 % at 100 % arrived, mean of ten draws whose standard deviation is 0.1; here one."""
    directory = openb.find(Path(__file__).parents[2])
    assert directory is not None
    outcome = fill(openb.published("default", directory), Policy.FGD, 0, 1.0, ticking)
    assert outcome.allocated[100] == pytest.approx(0.9523, abs=0.005)
