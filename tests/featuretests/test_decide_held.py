"""What holds weights where they are, or lets them move a little at a time, and says so."""

from __future__ import annotations

import dataclasses

from meshctl.model import NO_SIGNALS, Guard, Policy, ReasonCode, SignalState
from meshctl.sim import reference
from tests.harness.core import V100, Rounds, failing, measured, reasons, route, settled, weights_of, work_of


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
