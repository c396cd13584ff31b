"""What the mesh serves already is taken over: by a restart, by a replica that follows, by one that takes the lead."""

from __future__ import annotations

import pytest

from meshctl.core.decide import Memory, decide
from meshctl.model import DEFAULT_CLASS, NO_SIGNALS, Guard, ReasonCode, Snapshot
from tests.harness.core import ROUTE, Rounds, Weights, endpoint, measured, reasons, route, weights_of


def settled() -> Rounds:
    """A leader that has found its table."""
    rounds = Rounds(route())
    rounds.well(60)
    return rounds


def nonzero(weights: Weights) -> Weights:
    """As the mesh has it: an endpoint of weight 0 is not there."""
    return {size: {e: w for e, w in row.items() if w} for size, row in weights.items()}


@pytest.mark.parametrize("leading", [True, False])
def test_a_restart_without_memory_takes_over_what_is_in_force(leading: bool) -> None:
    """Not one weight moves, before and after the first signals; a leader has a verdict, a follower says it follows."""
    live = weights_of(settled().well(1))
    rounds = Rounds(route(), in_force=nonzero(live), leading=leading)
    assert weights_of(rounds.decide(NO_SIGNALS)) == live
    plan = rounds.well(60)
    assert weights_of(plan) == live
    assert rounds.moves == 0
    assert bool(reasons(plan, ReasonCode.FOLLOWING)) is not leading
    assert set(plan.attainment) == set(live)


def test_a_follower_follows_every_move_of_the_leader() -> None:
    """Each table that the leader puts in force is the follower's too, whatever it thinks itself."""
    leader, follower = Rounds(route(guard=Guard(max_step_ratio=0.05))), Rounds(route(), leading=False)
    for second in range(40):
        slow = {endpoint(0): 3.0} if second > 20 else {}
        now_s = leader.now_s + 1
        plan = leader.decide(measured(leader.route, now_s, slow=slow))
        follower.in_force = nonzero(weights_of(plan))
        assert weights_of(follower.decide(measured(follower.route, now_s, load_ratio=0.4))) == weights_of(plan)
    assert leader.moves > 3


def test_taking_the_lead_moves_nothing() -> None:
    """The new leader has other estimates, made of other samples, and still keeps the table it finds."""
    leader, follower = settled(), Rounds(route(), leading=False)
    live = weights_of(leader.well(1))
    follower.in_force = nonzero(live)
    follower.well(20, load_ratio=0.68)
    follower.leading = True
    assert weights_of(follower.well(30, load_ratio=0.69)) == live
    assert follower.moves == 0


def test_a_new_leader_acts_on_what_it_sees() -> None:
    """Holding still is not for ever: an endpoint that became slow loses traffic."""
    live = weights_of(settled().well(1))
    rounds = Rounds(route(), in_force=nonzero(live))
    rounds.well(20)
    plan = rounds.well(30, slow={endpoint(0): 4.0})
    assert plan.weights["large"][endpoint(0)] < live["large"][endpoint(0)]


def test_a_leader_is_not_overruled_by_what_is_read_back() -> None:
    """What is live lags behind what was decided; going back to it would undo a move in its middle."""
    rounds = settled()
    before = weights_of(rounds.well(1))
    rounds.in_force = {size: {endpoint(0): 1000} for size in before}
    assert weights_of(rounds.well(5)) == before


def test_endpoints_that_came_and_went_meanwhile_are_settled_at_once() -> None:
    """Those that are gone give their share to the others in proportion; a new one has none yet."""
    live = weights_of(settled().well(1))
    gone = {size: {**row, endpoint(99): 100, endpoint(3): 0} for size, row in live.items()}
    plan = Rounds(route(), in_force=gone).decide(NO_SIGNALS)
    for size, row in plan.weights.items():
        assert sum(row.values()) == 1000
        assert endpoint(99) not in row
        assert row[endpoint(3)] == 0, size


def test_a_size_class_that_is_new_starts_from_the_solver() -> None:
    """The rows that are live stay; one that is not there, or is all zero, takes its target."""
    live = weights_of(settled().well(1))
    part = {size: row for size, row in live.items() if size != DEFAULT_CLASS}
    plan = Rounds(route(), in_force={**part, DEFAULT_CLASS: {}}).decide(NO_SIGNALS)
    assert {size: row for size, row in weights_of(plan).items() if size in part} == part
    assert sum(plan.weights[DEFAULT_CLASS].values()) == 1000


def test_nothing_in_force_is_a_new_route() -> None:
    """A follower that finds nothing decides as a leader would, for its own proxies."""
    plan, _ = decide(Snapshot({ROUTE: route()}, {}, leading=False), Memory(), 0.0)
    alone, _ = decide(Snapshot({ROUTE: route()}, {}), Memory(), 0.0)
    assert plan.routes[ROUTE].weights == alone.routes[ROUTE].weights
