"""Signals in, weights and reasons out: one scenario per state that a route can be in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from meshctl.model import (
    DEFAULT_CLASS,
    NO_SIGNALS,
    EndpointSignals,
    Guard,
    Policy,
    ReasonCode,
    RouteSignals,
    ServiceProfile,
    Signal,
    SignalState,
    SizeClass,
)
from meshctl.sim import reference
from tests.harness.core import (
    CAPACITY_RPS,
    Rounds,
    endpoint,
    healthy,
    measured,
    reasons,
    route,
    weights_of,
    work_of,
)

V100, P100, K40 = endpoint(0), endpoint(3), endpoint(11)


def settled(**spec: Any) -> Rounds:
    """A fleet that has been well for half a minute."""
    rounds = Rounds(route(**spec))
    rounds.well()
    return rounds


def only(index: int, **fields: Signal) -> Callable[[Rounds, float], RouteSignals]:
    """Signals of a fleet that is well but for some of endpoint `index`."""

    def signals(rounds: Rounds, at_s: float) -> RouteSignals:
        e = rounds.route.endpoints[index]
        return measured(rounds.route, at_s, changed={e.id: dataclasses.replace(healthy(e, at_s), **fields)})

    return signals


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


def failing(rounds: Rounds, at_s: float, who: str = "failed_rps", part: float = 0.9) -> RouteSignals:
    fields = {who: Signal(40.0 * part, at_s)}
    if who == "failed_rps":
        fields["completed_rps"] = Signal(40.0 * (1 - part), at_s)
    return only(0, **fields)(rounds, at_s)


@pytest.mark.parametrize("who", ["failed_rps", "proxy_failed_rps"])
def test_an_endpoint_that_fails_its_requests_is_drained_at_once(who: str) -> None:
    """By the server's word or by the proxies'; no step limit or dwell holds it back, the others keep their ratios."""
    rounds = settled()
    plan = rounds.decide(failing(rounds, rounds.now_s + 1, who))
    assert plan.drained == {V100}
    assert work_of(plan, V100) == 0
    (why,) = reasons(plan, ReasonCode.DRAINED_ERRORS)
    assert (why.subject, why.inputs[0].value, why.inputs[0].unit) == (V100, 36.0, "requests/s")
    assert why.inputs[0].at_s == rounds.now_s


@pytest.mark.parametrize("part", [0.0, 0.3, 0.5])
def test_failures_within_the_limit_drain_nobody(part: float) -> None:
    """spec.guard.errorRatio is 0.5."""
    rounds = settled()
    assert not rounds.decide(failing(rounds, rounds.now_s + 1, part=part)).drained


def hanging(rounds: Rounds, at_s: float) -> RouteSignals:
    zero = Signal(0.0, at_s)
    return only(0, completed_rps=zero, proxy_rps=zero, pending=Signal(9.0, at_s))(rounds, at_s)


def test_an_endpoint_that_hangs_while_it_looks_idle_is_drained() -> None:
    """Pending requests and no completion, measured over hangAfter; not before."""
    rounds = settled()
    for second in range(4):
        plan = rounds.decide(hanging(rounds, rounds.now_s + 1))
        assert (V100 in plan.drained) == (second >= 3)
    (why,) = reasons(plan, ReasonCode.DRAINED_HANG)
    assert [(i.name, i.value, i.unit) for i in why.inputs] == [
        ("pending", 9.0, "requests"),
        ("in flight at the proxies", 1.0, "requests"),
        ("completed", 0.0, "requests/s"),
        ("for", 3.0, "s"),
    ]
    assert work_of(plan, V100) == 0


def test_one_look_at_a_busy_endpoint_that_grows_old_drains_nobody() -> None:
    """A server that is not measured any more is not seen to hang."""
    rounds = settled()
    e = rounds.route.endpoints[0]
    zero = Signal(0.0, rounds.now_s + 1)
    look = dataclasses.replace(healthy(e, rounds.now_s + 1), completed_rps=zero, proxy_rps=zero)
    plan = rounds.run(20, lambda at_s: measured(rounds.route, at_s, changed={e.id: look}))
    assert not plan.drained


def test_a_hang_that_takes_the_metrics_with_it_is_seen_by_the_proxies() -> None:
    """The server's page hangs too: requests in flight at the proxies, and none ends there."""
    rounds = settled()
    old, silent_s = rounds.route.endpoints[0], rounds.now_s

    def signals(at_s: float) -> RouteSignals:
        ended, active = Signal(0.0, at_s), Signal(12.0, at_s)
        seen = dataclasses.replace(healthy(old, silent_s), proxy_rps=ended, proxy_active=active)
        return measured(rounds.route, at_s, changed={V100: seen})

    assert rounds.run(9, signals).drained == {V100}


def test_a_drained_endpoint_comes_back_by_a_small_weight() -> None:
    """After its rest it gets a tenth of its fair share, with the reason; when it answers, all of it."""
    rounds = settled()
    fair = work_of(rounds.well(1), V100)
    rounds.decide(failing(rounds, rounds.now_s + 1))
    plan = rounds.well(9)
    assert plan.drained == {V100}
    assert work_of(plan, V100) == 0
    plan = rounds.well(8)
    assert not plan.drained
    assert 0 < work_of(plan, V100) < 0.2 * fair
    (why,) = reasons(plan, ReasonCode.PROBATION)
    assert (why.subject, why.inputs[0].value, why.inputs[0].unit) == (V100, 0.1, "ratio")
    plan = rounds.well(30)
    assert not reasons(plan, ReasonCode.PROBATION)
    assert work_of(plan, V100) == pytest.approx(fair, abs=6)


def test_probation_ends_where_only_the_proxies_measure() -> None:
    """Without the server's own metrics the proxies' successes are the proof."""
    rounds = settled()
    rounds.decide(failing(rounds, rounds.now_s + 1, "proxy_failed_rps"))

    def proxies_only(at_s: float) -> RouteSignals:
        seen = EndpointSignals(
            proxy_rps=Signal(4.0, at_s), proxy_failed_rps=Signal(0.0, at_s), proxy_active=Signal(1.0, at_s)
        )
        return measured(rounds.route, at_s, changed={V100: seen})

    plan = rounds.run(40, proxies_only)
    assert not reasons(plan, ReasonCode.PROBATION)
    assert not plan.drained


def test_a_relapse_rests_twice_as_long() -> None:
    """An endpoint that flaps gets less and less often a try."""
    rounds = settled()
    drained = []
    for _ in range(60):
        at_s = rounds.now_s + 1
        drained.append(V100 in rounds.decide(failing(rounds, at_s)).drained)
    rests = [len(run) for run in "".join("x" if d else " " for d in drained).split()]
    assert rests[0] == 10
    assert rests[1] == 20


def test_when_all_fail_all_are_used() -> None:
    """A slow answer beats a refused one; the reason says so."""
    rounds = settled()
    at_s = rounds.now_s + 1
    ill = {e.id: dataclasses.replace(healthy(e, at_s), failed_rps=Signal(400.0, at_s)) for e in rounds.route.endpoints}
    plan = rounds.decide(measured(rounds.route, at_s, changed=ill))
    assert len(plan.drained) == 12
    assert reasons(plan, ReasonCode.ALL_DRAINED)
    assert min(work_of(plan, e.id) for e in rounds.route.endpoints) > 0


def test_more_than_the_fleet_can_do_is_said_with_the_best_there_is() -> None:
    """At 130 % no table meets the SLO: infeasible, the worst class's figure, and still weights for all."""
    rounds = Rounds(route())
    plan = rounds.well(30, load_ratio=1.3)
    assert not plan.feasible
    (why,) = reasons(plan, ReasonCode.INFEASIBLE)
    named = {i.name: i.value for i in why.inputs}
    assert named["percentile"] == 0.99
    assert named["its attainment"] == min(plan.attainment[c.name] for c in reference.SIZES)
    assert reasons(rounds.well(120, load_ratio=0.6), ReasonCode.SOLVED)
    assert rounds.plan is not None
    assert rounds.plan.feasible


def test_a_route_whose_signals_are_all_lost_is_frozen_and_thaws() -> None:
    """The weights stay, however long; nobody decays, is drained or comes back; fresh signals go on as before."""
    rounds = Rounds(route())
    before = weights_of(rounds.well(30, slow={V100: 2.0}))
    last = measured(rounds.route, rounds.now_s, slow={V100: 2.0})
    for signals in (last, NO_SIGNALS):
        for _ in range(200):
            plan = rounds.decide(signals)
            assert weights_of(plan) == before
        (why,) = reasons(plan, ReasonCode.FROZEN)
        assert why.inputs[0].state in (SignalState.STALE, SignalState.ABSENT)
    assert weights_of(rounds.well(5, slow={V100: 2.0})) == before
    assert rounds.plan is not None
    assert not reasons(rounds.plan, ReasonCode.FROZEN)


def test_a_suspended_route_keeps_its_weights_and_says_so() -> None:
    """Whatever is measured; set free, it goes on."""
    rounds = settled()
    work_before = work_of(rounds.well(1), V100)
    before = weights_of(rounds.well(1))
    free = rounds.route
    rounds.route = dataclasses.replace(free, spec=dataclasses.replace(free.spec, suspend=True))
    plan = rounds.run(20, lambda at_s: failing(rounds, at_s))
    plan = rounds.well(20, slow={V100: 3.0})
    assert weights_of(plan) == before
    assert reasons(plan, ReasonCode.SUSPENDED)
    rounds.route = free
    assert work_of(rounds.well(20, slow={V100: 3.0}), V100) < work_before


def test_a_small_change_stays_within_the_dead_band() -> None:
    """A new table that differs by less than it is not put in force, and the reason has both numbers."""
    guard = Guard(dead_band_ratio=0.5)
    rounds = settled(guard=guard)
    before = weights_of(rounds.well(1))
    plan = rounds.well(30, slow={V100: 1.2})
    assert weights_of(plan) == before
    (why,) = reasons(plan, ReasonCode.DEAD_BAND)
    wanted, band = why.inputs
    assert 0 < float(str(wanted.value)) <= 0.5
    assert (band.value, band.unit) == (0.5, "ratio")


def test_steps_are_limited_and_improvements_rest_between() -> None:
    """A new policy moves a tenth of each size at a time; the next improvement waits for the dwell."""
    rounds = settled(guard=Guard(max_step_ratio=0.1, dwell_s=8.0))
    old = weights_of(rounds.well(1))
    spec = dataclasses.replace(rounds.route.spec, policy=Policy.ROUND_ROBIN)
    rounds.route = dataclasses.replace(rounds.route, spec=spec)
    for _ in range(25):
        plan = rounds.well(1)
        new = weights_of(plan)
        assert all(sum(abs(new[s][e] - old[s][e]) for e in new[s]) / 2 <= 102 for s in new)
        if new != old and rounds.moves == 1:
            assert reasons(plan, ReasonCode.STEP_LIMITED)[0].inputs[0].value == 0.1
        old = new
    assert all(82 <= w <= 85 for row in new.values() for w in row.values()), "and arrives"
    rounds.route = dataclasses.replace(rounds.route, spec=dataclasses.replace(spec, policy=Policy.PROPORTIONAL))
    plan = rounds.well(1)
    if weights_of(plan) == old:
        (why,) = reasons(plan, ReasonCode.DWELL)
        assert [i.unit for i in why.inputs] == ["s", "s"]
    assert weights_of(rounds.well(30)) != old


def test_a_changed_profile_counts_although_demand_stands_still() -> None:
    """K40s that become as fast as V100s are used like them; what was observed against the old profile is forgotten."""
    rounds = Rounds(route())
    before = work_of(rounds.decide(NO_SIGNALS), K40)
    quick = {**reference.PROFILES, "K40": reference.PROFILES["V100"]}
    rounds.route = dataclasses.replace(rounds.route, profiles=quick)
    for _ in range(20):
        plan = rounds.decide(NO_SIGNALS)
    assert work_of(plan, K40) > 3 * before
    assert work_of(plan, K40) == pytest.approx(work_of(plan, V100), abs=6)

    slow = Rounds(route())
    slow.well(30, slow={e.id: 2.0 for e in slow.route.endpoints[:3]})
    right = ServiceProfile.affine(*(2 * t for t in reference.SERVICE_S["V100"]))
    slow.route = dataclasses.replace(slow.route, profiles={**reference.PROFILES, "V100": right})
    plan = slow.decide(measured(slow.route, slow.now_s + 1, slow={e.id: 2.0 for e in slow.route.endpoints[:3]}))
    assert reasons(plan, ReasonCode.OBSERVED_SERVICE_TIME, V100)[0].inputs[3].value == 1.0


def test_a_gpu_without_a_profile_is_taken_for_the_slowest_known() -> None:
    """And without any profile for a prior; both are said, and observation corrects them."""
    known = {"T4": reference.PROFILES["T4"]}
    plan = Rounds(dataclasses.replace(route(), profiles=known)).decide(NO_SIGNALS)
    assert [r.subject for r in reasons(plan, ReasonCode.NO_PROFILE)] == [
        endpoint(i) for i in (0, 1, 2, 3, 4, 5, 9, 10, 11)
    ]
    assert work_of(plan, V100) == pytest.approx(work_of(plan, endpoint(6)), abs=6)
    blank = Rounds(dataclasses.replace(route(), profiles={}))
    assert len(reasons(blank.decide(NO_SIGNALS), ReasonCode.NO_PROFILE)) == 12
    plan = blank.well(30)
    assert work_of(plan, V100) > 2 * work_of(plan, K40)


def test_endpoints_come_and_go_and_names_change() -> None:
    """In mid-shift too: a gone one is forgotten, a new one is used, a renamed size class starts at its table."""
    rounds = settled()
    full = rounds.route
    rounds.well(1, slow={V100: 3.0})
    rounds.route = dataclasses.replace(full, endpoints=full.endpoints[1:])
    assert V100 not in rounds.well(2).weights["small"]
    rounds.route = full
    assert work_of(rounds.well(20), V100) > 100
    sizes = tuple(dataclasses.replace(c, name=f"{c.name}-2") for c in reference.SIZES)
    rounds.route = dataclasses.replace(full, spec=dataclasses.replace(full.spec, sizes=sizes))
    for load_ratio in (0.7, 0.4):
        plan = rounds.well(40, load_ratio=load_ratio)
        assert plan.load_rps == pytest.approx(1.05 * load_ratio * CAPACITY_RPS, rel=0.05), "old names do not count"
    unsized = SizeClass("all", 1, 128, 8.0, 1.0)
    rounds.route = dataclasses.replace(full, spec=dataclasses.replace(full.spec, sizes=(unsized,)))
    assert set(rounds.well(2).weights) == {"all", DEFAULT_CLASS}


def test_endpoints_that_are_not_ready_get_nothing_while_another_is() -> None:
    """Without any that is ready the weights still sum, nothing is claimed, and the first that comes back gets all."""
    rounds = settled()
    full = rounds.route

    def ready(*indices: int) -> None:
        endpoints = tuple(dataclasses.replace(e, ready=i in indices) for i, e in enumerate(full.endpoints))
        rounds.route = dataclasses.replace(full, endpoints=endpoints)

    ready(*range(1, 12))
    plan = rounds.well(1)
    assert work_of(plan, V100) == 0
    assert [r.subject for r in reasons(plan, ReasonCode.NOT_READY)] == [V100]
    ready()
    plan = rounds.well(3)
    assert reasons(plan, ReasonCode.NO_ENDPOINTS)
    assert not plan.feasible
    ready(4)
    plan = rounds.well(1)
    assert {row[endpoint(4)] for row in plan.weights.values()} == {1000}
    ready(*range(12))
    assert work_of(rounds.well(20), V100) > 100


def test_a_size_class_whose_every_endpoint_drains_goes_where_the_table_says() -> None:
    """Large requests went to the V100s only; without them they go to P100s at once, none to a K40 (345 ms)."""
    rounds = settled()
    large = rounds.well(1).weights["large"]
    assert {e for e, w in large.items() if w > 0} == {endpoint(i) for i in range(3)}
    at_s = rounds.now_s + 1
    ill = {
        e.id: dataclasses.replace(healthy(e, at_s), failed_rps=Signal(400.0, at_s)) for e in rounds.route.endpoints[:3]
    }
    plan = rounds.decide(measured(rounds.route, at_s, changed=ill))
    assert [plan.weights["large"][endpoint(i)] for i in (0, 1, 2, 9, 10, 11)] == [0] * 6
    assert plan.weights["large"][P100] > 200


@pytest.mark.parametrize("count", [0, 1, 12, 252])
def test_any_number_of_endpoints_has_weights(count: int) -> None:
    """None, one, many: the invariants hold in every round, and equal endpoints get equal weights but for rounding."""
    many = route(per_gpu=max(1, count // 4))
    rounds = Rounds(dataclasses.replace(many, endpoints=many.endpoints[:count]))
    plan = rounds.well(3)
    assert len(plan.weights["small"]) == count
    assert bool(reasons(plan, ReasonCode.NO_ENDPOINTS)) == (count == 0)
    v100 = [plan.weights["small"][e.id] for e in rounds.route.endpoints if e.gpu == "V100"]
    assert max(v100, default=0) - min(v100, default=0) <= 2


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
