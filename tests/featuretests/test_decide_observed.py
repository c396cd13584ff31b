"""What is measured of load, mix and endpoints, in weights and reasons: observed, of others, stale, absent, absurd."""

from __future__ import annotations

import dataclasses

import pytest

from meshctl.model import DEFAULT_CLASS, NO_SIGNALS, EndpointSignals, ReasonCode, RouteSignals, Signal, SignalState
from tests.harness.core import (
    CAPACITY_RPS,
    K40,
    V100,
    Rounds,
    endpoint,
    healthy,
    measured,
    only,
    reasons,
    route,
    settled,
    weights_of,
    work_of,
)


def test_fresh_signals_say_what_was_believed_and_when() -> None:
    """Load, mix, profile and observed service time are named with values, units and the time of the measurement."""
    rounds = Rounds(route())
    plan = rounds.decide(measured(rounds.route, 0.7))
    (load,) = reasons(plan, ReasonCode.LOAD_OBSERVED)
    assert (load.inputs[0].name, load.inputs[0].unit, load.inputs[0].at_s) == ("observed", "requests/s", 0.7)
    assert load.inputs[0].value == pytest.approx(0.7 * CAPACITY_RPS)
    assert plan.load_rps == pytest.approx(1.05 * 0.7 * CAPACITY_RPS)
    (mix,) = reasons(plan, ReasonCode.MIX_OBSERVED)
    assert {i.name: round(float(str(i.value)), 2) for i in mix.inputs} == {
        "small": 0.8,
        "medium": 0.15,
        "large": 0.05,
        DEFAULT_CLASS: 0.0,
    }
    (seen,) = reasons(plan, ReasonCode.OBSERVED_SERVICE_TIME, V100)
    assert [(i.name, i.unit, i.at_s, i.state) for i in seen.inputs] == [
        ("service time", "ms", 0.7, SignalState.FRESH),
        ("mean batch", "items", 0.7, None),
        ("observed over profile", "x", 0.7, None),
        ("slowdown in use", "x", None, None),
    ]
    (profile,) = reasons(plan, ReasonCode.PROFILE, V100)
    assert [(i.value, i.unit) for i in profile.inputs] == [("V100", ""), (pytest.approx(5.8), "ms")]
    (verdict,) = reasons(plan, ReasonCode.SOLVED)
    assert {i.name for i in verdict.inputs} >= {"worst size class", "its attainment", "solved for", "proxies"}
    assert plan.feasible
    assert not plan.drained


def test_without_signals_the_profile_and_the_declared_load_count() -> None:
    """Absent is said for each endpoint; the weights are those of the prior, and feasibility is claimed of nothing."""
    rounds = Rounds(route(expected_load_rps=500.0))
    plan = rounds.decide(NO_SIGNALS)
    assert len(reasons(plan, ReasonCode.SIGNAL_ABSENT)) == 12
    assert plan.load_rps == pytest.approx(525)
    assert reasons(plan, ReasonCode.LOAD_DECLARED)[0].inputs[0].unit == "requests/s"
    assert reasons(plan, ReasonCode.MIX_DECLARED)
    unknown = Rounds(route()).decide(NO_SIGNALS)
    assert unknown.load_rps == pytest.approx(0.7 * CAPACITY_RPS)
    assert unknown.feasible


def test_an_observed_slow_gpu_loses_weight() -> None:
    """Twice the profile's service time: less traffic, and the factor is in the reason."""
    rounds = settled()
    before = rounds.well(1)
    plan = rounds.well(20, slow={V100: 2.0})
    assert work_of(plan, V100) < work_of(before, V100)
    assert plan.weights["large"][V100] < 0.75 * before.weights["large"][V100]
    (seen,) = reasons(plan, ReasonCode.OBSERVED_SERVICE_TIME, V100)
    assert seen.inputs[3].value == pytest.approx(2.0, rel=0.03)
    assert work_of(plan, endpoint(1)) >= work_of(before, endpoint(1)) - 1


def test_a_slow_gpu_loses_weight_although_all_are_in_time() -> None:
    """At a twentieth of the load nothing is late with any table: the mean time decides."""
    rounds = Rounds(route())
    before = rounds.well(30, load_ratio=0.05)
    assert before.weights["large"][V100] > 300
    plan = rounds.well(30, load_ratio=0.05, slow={V100: 2.0})
    assert plan.weights["large"][V100] < 100


def test_work_of_others_on_the_gpu_lowers_weights_before_latency_shows_it() -> None:
    """Utilisation above our own busy share, service times unchanged: the first round moves weight away."""
    rounds = settled()
    before = rounds.well(1)
    plan = rounds.decide(measured(rounds.route, rounds.now_s + 1, foreign={V100: 0.5}))
    assert plan.weights["large"][V100] < before.weights["large"][V100]
    plan = rounds.well(10, foreign={V100: 0.5})
    assert plan.weights["large"][V100] < 0.75 * before.weights["large"][V100]
    (why,) = reasons(plan, ReasonCode.FOREIGN_UTILIZATION, V100)
    assert [(i.name, i.unit) for i in why.inputs] == [
        ("GPU utilisation", "ratio"),
        ("own busy share", "ratio"),
        ("foreign share", "ratio"),
        ("slowdown in use", "x"),
    ]
    after = rounds.well(60)
    assert after.weights["large"][V100] == pytest.approx(before.weights["large"][V100], abs=30), (
        "when the others are gone, it is as before"
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("nothing else measured", {"busy_ratio": Signal.ABSENT, "completed_rps": Signal.ABSENT}),
        ("busy unknown while we complete", {"busy_ratio": Signal.ABSENT}),
        ("busy an age old", {"busy_ratio": Signal(0.0, 0.0)}),
        (
            "long requests in flight, none completed yet",
            {"busy_ratio": Signal.ABSENT, "completed_rps": Signal(0.0, 60.0), "pending": Signal(1.0, 60.0)},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_our_own_work_is_never_taken_for_that_of_others(name: str, fields: dict[str, Signal]) -> None:
    """Full utilisation, and our own share is not known: it says nothing."""
    rounds = settled()
    rounds.now_s = 59.0
    before = weights_of(rounds.well(1))
    plan = rounds.decide(only(0, gpu_utilization_ratio=Signal(1.0, 60.5), **fields)(rounds, 60.5))
    assert not reasons(plan, ReasonCode.FOREIGN_UTILIZATION)
    assert weights_of(plan) == before


def test_others_on_a_gpu_that_we_leave_idle_count() -> None:
    """Nothing completed, nothing pending: all of the utilisation is foreign."""
    rounds = settled()
    now_s = rounds.now_s + 1
    idle = Signal(0.0, now_s)
    signals = only(
        0,
        gpu_utilization_ratio=Signal(0.6, now_s),
        busy_ratio=Signal.no_traffic(now_s),
        completed_rps=idle,
        pending=idle,
        proxy_active=idle,
    )
    (why,) = reasons(rounds.decide(signals(rounds, now_s)), ReasonCode.FOREIGN_UTILIZATION, V100)
    assert why.inputs[2].value == pytest.approx(0.6)


def test_one_silent_endpoint_decays_to_its_profile_alone() -> None:
    """Its slowness is held while fresh, then forgotten; the reasons say so, and the route is not frozen."""
    rounds = Rounds(route())
    slow = work_of(rounds.well(30, slow={V100: 2.0}), V100)
    last = healthy(rounds.route.endpoints[0], rounds.now_s, slowdown=2.0)

    def silent(at_s: float) -> RouteSignals:
        return measured(rounds.route, at_s, changed={V100: last})

    plan = rounds.run(9, silent)
    assert work_of(plan, V100) == slow
    assert not reasons(plan, ReasonCode.SIGNAL_STALE)
    plan = rounds.run(5, silent)
    (why,) = reasons(plan, ReasonCode.SIGNAL_STALE)
    assert (why.subject, why.inputs[0].state, why.inputs[0].at_s) == (V100, SignalState.STALE, 30.0)
    plan = rounds.run(80, silent)
    assert reasons(plan, ReasonCode.DECAYED, V100)
    assert work_of(plan, V100) == pytest.approx(work_of(plan, endpoint(1)), abs=6)
    assert not reasons(plan, ReasonCode.FROZEN)


def test_no_traffic_is_said_and_moves_nothing_at_once() -> None:
    """0/0 at an endpoint is neither a slow nor a fast answer."""
    rounds = settled()
    before = weights_of(rounds.well(1))

    def quiet(at_s: float) -> RouteSignals:
        nothing, zero = Signal.no_traffic(at_s), Signal(0.0, at_s)
        idle = EndpointSignals(zero, nothing, nothing, nothing, nothing, zero, zero, zero, zero, zero, zero)
        return measured(rounds.route, at_s, changed={K40: idle})

    plan = rounds.run(5, quiet)
    assert [r.subject for r in reasons(plan, ReasonCode.NO_TRAFFIC)] == [K40]
    assert weights_of(plan) == before


def test_absurd_and_negative_signals_move_nobody_into_nonsense() -> None:
    """Whatever is finite: the invariants hold, nothing raises, and sense restores the weights."""
    rounds = settled()
    before = rounds.well(1)
    for value in (-1.0, -1e308, 1e308, 1e-308, 0.0):
        at_s = rounds.now_s + 1
        absurd = EndpointSignals(*(Signal(value, at_s) for _ in dataclasses.fields(EndpointSignals)))
        arrivals = {name: Signal(value, at_s) for name in before.weights}
        rounds.decide(RouteSignals(arrivals, {e.id: absurd for e in rounds.route.endpoints[:6]}))
    after = rounds.well(150)
    assert not after.drained
    for size, row in before.weights.items():
        assert after.weights[size] == pytest.approx(row, abs=30)


def test_signals_from_the_future_and_a_clock_that_steps_back_are_survived() -> None:
    """No age is negative, nothing raises, and the route goes on when time does."""
    rounds = settled()
    before = weights_of(rounds.well(1))
    assert weights_of(rounds.decide(measured(rounds.route, rounds.now_s + 500))) == before
    assert weights_of(rounds.decide(measured(rounds.route, rounds.now_s), after_s=-25.0)) == before
    assert weights_of(rounds.well(10)) == before
