"""What is made of signals: estimates, service times, demand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshctl.core import capacity, demand
from meshctl.core.capacity import Speed
from meshctl.core.demand import Arrivals
from meshctl.core.estimate import Estimate, believed, follow
from meshctl.model import DEFAULT_CLASS, EndpointSignals, Guard, ReasonCode, RouteSignals, ServiceProfile, Signal
from tests.harness.core import CAPACITY_RPS, route

GUARD = Guard()
SPEC = route().spec


def test_an_estimate_follows_in_the_signals_own_time() -> None:
    """63 % of a change after the time constant, in one sample or in many; the first sample is believed."""
    start = follow(None, Signal(10.0, 0.0), 5.0)
    assert start == Estimate(10.0, 0.0)
    once = follow(start, Signal(20.0, 5.0), 5.0)
    many: Estimate | None = start
    for i in range(1, 51):
        many = follow(many, Signal(20.0, i / 10), 5.0)
    assert once is not None
    assert many is not None
    assert once.value == pytest.approx(20 - 10 * math.exp(-1))
    assert many.value == pytest.approx(once.value)


@pytest.mark.parametrize("signal", [Signal.ABSENT, Signal.no_traffic(9.0), Signal(99.0, 5.0), Signal(99.0, -3.0)])
def test_what_says_nothing_new_changes_nothing(signal: Signal) -> None:
    """Absent, no traffic, a repeated sample, one from before: the same object."""
    before = Estimate(10.0, 5.0)
    assert follow(before, signal, 5.0) is before


def test_bad_news_are_believed_at_once_and_good_news_slowly() -> None:
    """A rise beyond the jump replaces the estimate."""
    before = Estimate(10.0, 0.0)
    assert follow(before, Signal(13.0, 1.0), 5.0, jump=2.5) == Estimate(13.0, 1.0)
    down = follow(before, Signal(7.0, 1.0), 5.0, jump=2.5)
    assert down is not None
    assert 9 < down.value < 10


@pytest.mark.parametrize(("age_s", "value"), [(0, 3.0), (10, 3.0), (40, 2.0), (70, 1.0), (1e9, 1.0), (-50, 3.0)])
def test_belief_is_held_then_decays_to_the_prior(age_s: float, value: float) -> None:
    """Fresh for 10 s, then 60 s of decay; an estimate from the future is fresh."""
    assert believed(Estimate(3.0, 100.0), 1.0, 100.0 + age_s, 10.0, 60.0) == pytest.approx(value)


@pytest.mark.parametrize(
    ("batch", "ms"), [(1, 10), (4, 25), (8, 45), (64, 325), (0.5, 7.5), (12, 65), (-100, 1.0)], ids=str
)
def test_service_times_are_interpolated_and_never_nothing(batch: float, ms: float) -> None:
    """Linear between the points and beyond them; at least a tenth of the first."""
    profile = ServiceProfile(((1.0, 0.010), (8.0, 0.045), (16.0, 0.085)))
    assert capacity.service_s(profile, batch) == pytest.approx(ms / 1e3)
    assert capacity.service_s(ServiceProfile(((4.0, 0.02),)), batch) == 0.02


def looks(values: list[float], start: Speed = Speed()) -> list[float]:  # noqa: B008 frozen
    """The slowdowns in use after each observed ratio, one a second."""
    profile, speed, used = ServiceProfile(((1.0, 0.010),)), start, []
    for i, value in enumerate(values):
        signals = EndpointSignals(service_s=Signal(0.010 * value, float(i)), batch=Signal(1.0, float(i)))
        speed = capacity.update(speed, profile, signals, GUARD, float(i), frozen=False)
        used.append(speed.slowdown)
    return used


def test_a_profile_that_is_nearly_right_is_right() -> None:
    """Within 7 %: exactly 1, so that equal GPUs stay one class."""
    assert set(looks([1.0, 1.05, 0.95, 1.06, 0.94] * 10)) == {1.0}


@given(st.lists(st.floats(-0.05, 0.05), min_size=30, max_size=30), st.floats(0.3, 20))
def test_a_slowdown_in_use_does_not_follow_noise(noise: list[float], level: float) -> None:
    """Five per cent either way about any level: at most one correction after the first seconds."""
    used = looks([level] * 20 + [level * (1 + n) for n in noise])
    assert len(set(used[20:])) <= 2
    assert used[-1] == pytest.approx(level, rel=0.09)


@pytest.mark.parametrize("value", [1e300, 1e-300, -5.0])
def test_absurd_service_times_are_bounded(value: float) -> None:
    """Between a fifth of the profile's time and fifty times it."""
    assert 0.19 < looks([value] * 5)[-1] < 51


def arrivals(at_s: float, **rates: float) -> RouteSignals:
    return RouteSignals({name: Signal(rate, at_s) for name, rate in rates.items()})


def test_the_forecast_is_the_observed_load_with_headroom() -> None:
    """Its mix nearly that observed (the declared one weighs 20 requests), growth extrapolated by half."""
    seen = demand.update(Arrivals(), arrivals(1.0, small=100.0, medium=100.0, large=100.0), SPEC)
    asked = demand.forecast(SPEC, seen, 700.0, 1.0)
    assert sum(asked.rates.values()) == pytest.approx(315)
    assert asked.rates["large"] / 315 == pytest.approx(1 / 3, abs=0.01)
    assert asked.rates[DEFAULT_CLASS] == 0
    grown = demand.update(seen, arrivals(2.0, small=200.0, medium=100.0, large=100.0), SPEC)
    assert 420 < sum(demand.forecast(SPEC, grown, 700.0, 2.0).rates.values()) < 1.05 * 451


def test_a_burst_on_an_idle_fleet_meets_weights_for_a_third_of_it() -> None:
    """The load solved for never falls below 30 % of the capacity."""
    seen = demand.update(Arrivals(), arrivals(1.0, small=0.0), SPEC)
    assert sum(demand.forecast(SPEC, seen, 700.0, 1.0).rates.values()) == pytest.approx(210)


def test_requests_without_a_size_are_a_class_when_there_are_some() -> None:
    """From half a per cent on."""
    few = demand.update(Arrivals(), arrivals(1.0, small=100.0, default=0.4), SPEC)
    some = demand.update(Arrivals(), arrivals(1.0, small=100.0, default=5.0), SPEC)
    assert demand.forecast(SPEC, few, 700.0, 1.0).rates[DEFAULT_CLASS] == 0
    assert demand.forecast(SPEC, some, 700.0, 1.0).rates[DEFAULT_CLASS] > 5


def test_arrivals_that_are_not_measured_any_more_decay_to_the_prior() -> None:
    """Held for 10 s, then within 60 s back to the declared load, with a reason."""
    spec = route(expected_load_rps=400.0).spec
    seen = demand.update(Arrivals(), arrivals(0.0, small=300.0), spec)
    assert sum(demand.forecast(spec, seen, CAPACITY_RPS, 10.0).rates.values()) == pytest.approx(315)
    late = demand.forecast(spec, seen, CAPACITY_RPS, 40.0)
    assert sum(late.rates.values()) == pytest.approx((315 + 420) / 2)
    assert [r.code for r in late.reasons if r.code is ReasonCode.SIGNAL_STALE]
    assert sum(demand.forecast(spec, seen, CAPACITY_RPS, 1e6).rates.values()) == pytest.approx(420)


def test_only_the_routes_own_size_classes_count() -> None:
    """Counters of a class that was renamed, or of somebody else's, are no load."""
    seen = demand.update(Arrivals(), arrivals(1.0, small=50.0, huge=1e6), SPEC)
    assert set(seen.rates) == {"small"}
    old = Arrivals({"gone": Estimate(500.0, 1.0), "small": Estimate(50.0, 1.0)})
    now = demand.update(old, arrivals(2.0, small=50.0), SPEC)
    assert now.total is not None
    assert now.total.value == pytest.approx(50)


def test_nothing_new_is_the_same_object() -> None:
    """So that an unchanged route is recognised."""
    seen = demand.update(Arrivals(), arrivals(1.0, small=50.0), SPEC)
    assert demand.update(seen, arrivals(1.0, small=70.0), SPEC) is seen


def test_a_lull_of_seconds_is_not_believed() -> None:
    """The load before it is what may come back; when it lasts, it is the load. A rise is believed at once."""
    seen = demand.update(Arrivals(), arrivals(0.0, small=500.0), SPEC)
    for second in range(1, 20):
        seen = demand.update(seen, arrivals(float(second), small=200.0), SPEC)
        assert sum(demand.forecast(SPEC, seen, 700.0, second).rates.values()) == pytest.approx(1.05 * 500)
    for second in range(20, 60):
        seen = demand.update(seen, arrivals(float(second), small=200.0), SPEC)
    assert sum(demand.forecast(SPEC, seen, 700.0, 60.0).rates.values()) == pytest.approx(1.05 * 200, rel=0.01)
    again = demand.update(seen, arrivals(61.0, small=600.0), SPEC)
    assert sum(demand.forecast(SPEC, again, 700.0, 61.0).rates.values()) >= 1.05 * 600
