"""Endpoints that fail or hang are drained at once, say why, and come back by a small weight."""

from __future__ import annotations

import dataclasses

import pytest

from meshctl.model import EndpointSignals, ReasonCode, RouteSignals, Signal
from tests.harness.core import (
    P100,
    V100,
    Rounds,
    endpoint,
    failing,
    healthy,
    measured,
    only,
    reasons,
    settled,
    work_of,
)


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
