"""A route that is changed: profiles, endpoints, readiness and size classes come and go."""

from __future__ import annotations

import dataclasses

import pytest

from meshctl.model import DEFAULT_CLASS, NO_SIGNALS, ReasonCode, ServiceProfile, SizeClass
from meshctl.sim import reference
from tests.harness.core import CAPACITY_RPS, K40, V100, Rounds, endpoint, measured, reasons, route, settled, work_of


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
